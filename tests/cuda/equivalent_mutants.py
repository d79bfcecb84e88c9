"""Mutants of the GPU kernels that compute the same: name to the reason, each thought through.

A mutant belongs here only if no launch that the launchers allow can tell it from the original: neither a result's bits
nor a check of the emulator.
"""

from __future__ import annotations

__all__ = ["EQUIVALENT"]

EQUIVALENT: dict[str, str] = {}
