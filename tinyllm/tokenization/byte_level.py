"""GPT-2's byte alphabet: each of the 256 bytes spelled as one printable character.

Bytes that print in Latin-1 stand for themselves; the others, in ascending order, take the characters from U+0100 on.
"""

from __future__ import annotations

__all__ = ["BYTE_OF_CHAR", "CHAR_OF_BYTE", "spelled_bytes"]


def _alphabet() -> dict[int, str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


CHAR_OF_BYTE = _alphabet()
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def spelled_bytes(token: str) -> bytes:
    """The bytes that a byte-level token spells; a token with a character outside the alphabet stands for itself."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode("utf-8", "replace")
