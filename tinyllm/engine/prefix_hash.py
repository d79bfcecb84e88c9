"""Names for the contents of full KV blocks: a chain of hashes, each over all tokens up to its block's end."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

__all__ = ["block_hash", "root_hash"]

HASH_NBYTES = 32


def root_hash(*extra_keys: object) -> bytes:
    """Where a chain begins: what keys and values depend on besides the tokens, and who may share them."""
    return hashlib.blake2b(repr(extra_keys).encode(), digest_size=HASH_NBYTES, person=b"tinyllm.root").digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """H(parent's hash, token ids): a cryptographic hash, so no prompt can be made to meet another's blocks."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=HASH_NBYTES, key=parent).digest()
