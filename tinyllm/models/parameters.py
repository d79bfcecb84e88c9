"""How a model gets its parameters from a checkpoint: asked for by canonical name, with the shape it needs.

A model's constructor declares each parameter once, as a call to `Parameters`. It runs twice: over a ParameterPlan,
which reads nothing but the tensor directory, checks every name and shape and adds up the bytes; then, once all is
known to fit, over a ParameterLoader, which packs the tensors one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from tinyllm.backends.base import Backend, F32Array, Weight
from tinyllm.errors import ModelFileError
from weights import Checkpoint, Tensor
from weights.names import NameMap
from weights.quants import FORMATS

__all__ = ["Adaptation", "ParameterLoader", "ParameterPlan", "Parameters", "Part"]

Part = tuple[str, tuple[int, ...]]  # a canonical name and the shape it must have

MAX_NAMES_SHOWN = 3


class Parameters(Protocol):
    """Where a model's constructor takes its parameters from."""

    def matrix(self, *parts: Part, near_output: bool = False) -> Weight:
        """(out_i, in) each -> one packed matrix (sum of out_i, in); near_output: see Backend.load_matrix."""
        ...

    def vector(self, *parts: Part) -> F32Array:
        """(n_i,) each -> (sum of n_i,)"""
        ...


@dataclass(frozen=True)
class Adaptation:
    """What a file's convention asks of one tensor before it is used.

    Attributes:
        apply: makes the canonical tensor of the file's.
        transposes: whether the file stores the matrix as (in, out).
    """

    apply: Callable[[Tensor], Tensor]
    transposes: bool = False


class Source:
    """Tensors of a checkpoint by canonical name, in canonical form.

    Attributes:
        adaptations: by the last part of a canonical name ("q" for "layers.3.q").
    """

    def __init__(
        self, checkpoint: Checkpoint, names: NameMap, adaptations: dict[str, Adaptation] | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.names = names
        self.adaptations = adaptations or {}

    def adaptation(self, canonical: str) -> Adaptation | None:
        return self.adaptations.get(canonical.rpartition(".")[2])


class ParameterPlan:
    """Checks a checkpoint against what a model declares, without reading a tensor.

    Attributes:
        nbytes: what the backend will hold for the parameters declared so far.
    """

    def __init__(self, source: Source, backend: Backend) -> None:
        self.nbytes = 0
        self._source = source
        self._backend = backend
        self._used: set[str] = set()
        self._missing: list[str] = []
        self._misshapen: list[str] = []
        self._unusable: list[str] = []

    def matrix(self, *parts: Part, near_output: bool = False) -> Weight:
        stored = []
        for canonical, shape in parts:
            tensor = self._find(canonical, shape)
            if tensor is not None:
                stored.append((tensor.dtype, (shape[0], shape[1])))
        if len(stored) == len(parts):
            self.nbytes += self._backend.matrix_nbytes(stored)
        return cast(Weight, None)  # the planned model is thrown away

    def vector(self, *parts: Part) -> F32Array:
        for part in parts:
            self._find(*part)
        self.nbytes += sum(4 * shape[0] for _, shape in parts)
        return cast(F32Array, None)

    def _find(self, canonical: str, shape: tuple[int, ...]) -> Tensor | None:
        name = self._source.names.file_name(canonical)
        tensor = self._source.checkpoint.tensors.get(name)
        self._used.add(name)
        if tensor is None:
            self._missing.append(name)
            return None
        if tensor.dtype not in FORMATS:
            self._unusable.append(f"{name} is {tensor.dtype}")
            return None
        adaptation = self._source.adaptation(canonical)
        expected = shape[::-1] if adaptation is not None and adaptation.transposes else shape
        if tensor.shape != expected:
            self._misshapen.append(f"{name} has shape {tensor.shape} where {expected} is due")
            return None
        return tensor

    def use(self, canonical: str) -> None:
        """Counts a tensor as used that the configuration was read from."""
        self._used.add(self._source.names.file_name(canonical))

    def check(self, architecture: str) -> None:
        """Raises ModelFileError where the checkpoint's tensors are not exactly those declared."""
        path, names = self._source.checkpoint.path, self._source.names
        left_over = [n for n in self._source.checkpoint.tensors if n not in self._used and not names.is_extra(n)]
        for found, what in (
            (self._missing, "missing"),
            (self._misshapen, "of the wrong shape"),
            (self._unusable, "of a dtype that is not supported"),
            (left_over, f"left over: a {architecture} model does not have them"),
        ):
            if found:
                count = f"{len(found)} tensor{'s' if len(found) > 1 else ''}"
                shown = ", ".join(map(_shown, found[:MAX_NAMES_SHOWN]))
                more = ", ..." if len(found) > MAX_NAMES_SHOWN else ""
                raise ModelFileError(f"{path}: {count} {what} ({shown}{more})")


def _shown(text: str) -> str:
    """A name from a file, safe to print on one line."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 160 else text[:157] + "..."


class ParameterLoader:
    """Packs the tensors of a checkpoint that a ParameterPlan has checked.

    Attributes:
        nbytes: what the backend holds so far.
    """

    def __init__(
        self, source: Source, backend: Backend, total_nbytes: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.nbytes = 0
        self._source = source
        self._backend = backend
        self._total_nbytes = total_nbytes
        self._progress = progress

    def matrix(self, *parts: Part, near_output: bool = False) -> Weight:
        tensors = [self._tensor(canonical) for canonical, _ in parts]
        weight = self._backend.load_matrix(tensors, near_output=near_output)
        self._done(parts, weight.nbytes)
        return weight

    def vector(self, *parts: Part) -> F32Array:
        vector = self._backend.load_vector([self._tensor(canonical) for canonical, _ in parts])
        self._done(parts, vector.nbytes)
        return vector

    def _file_tensor(self, canonical: str) -> Tensor:
        return self._source.checkpoint.tensors[self._source.names.file_name(canonical)]

    def _tensor(self, canonical: str) -> Tensor:
        tensor = self._file_tensor(canonical)
        adaptation = self._source.adaptation(canonical)
        return (tensor if adaptation is None else adaptation.apply(tensor)).renamed(canonical)

    def _done(self, parts: Sequence[Part], nbytes: int) -> None:
        for canonical, _ in parts:
            self._source.checkpoint.release(self._file_tensor(canonical))
        self.nbytes += nbytes
        if self._progress is not None:
            self._progress(self.nbytes, self._total_nbytes)
