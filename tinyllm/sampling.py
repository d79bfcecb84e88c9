"""From one row of logits to one token: plain numpy, one row at a time, and randomness without state.

A draw adds Gumbel noise to the scaled logits and takes the largest (the Gumbel-max trick: the winner is distributed
as the softmax). The noise of a token id is a counter-based function of (seed, fork path, position, token id), so a
request draws the same tokens however it is batched, preempted or resumed, and filtering one token leaves the others'
noise alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tinyllm.errors import InvalidRequestError
from tinyllm.sampling_params import LogitsProcessor, SamplingParams

__all__ = [
    "SampledToken",
    "SamplingParams",
    "TokenHistory",
    "TokenLogprob",
    "adjust",
    "gumbel_noise",
    "noise_key",
    "sample",
    "token_logprobs",
]

NOTHING_LEFT = "every token is forbidden: no logit is above -inf"
NOTHING_FITS = "every token is forbidden: no logit that the structured output allows is above -inf"
GREEDY_BELOW = 1e-5  # a lower temperature would overflow where it should only sharpen

F32Array = NDArray[np.float32]
F64Array = NDArray[np.float64]
IdArray = NDArray[np.intp]


@dataclass(frozen=True)
class TokenLogprob:
    """log p(token) under the model, and the token's rank (1 = most likely)."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class SampledToken:
    """A chosen token; `logprobs` holds it first, then the requested most likely ones, when asked for."""

    token_id: int
    logprobs: tuple[TokenLogprob, ...] | None


@dataclass
class TokenHistory:
    """The tokens that penalties look at: all that were seen, and how often each was generated."""

    seen: set[int]
    generated: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, prompt: Sequence[int]) -> TokenHistory:
        return cls(set(prompt))

    def append(self, token_id: int) -> None:
        self.seen.add(token_id)
        self.generated[token_id] += 1

    def copy(self) -> TokenHistory:
        return TokenHistory(set(self.seen), Counter(self.generated))


def sample(
    logits: F32Array,
    params: SamplingParams,
    *,
    token_ids: Sequence[int],
    history: TokenHistory,
    fork_path: tuple[int, ...],
    banned_ids: Sequence[int] = (),
    allowed_ids: IdArray | None = None,
) -> SampledToken:
    """Chooses the token at position len(token_ids).

    Args:
        logits: (V,) float32, contiguous; not changed.
        token_ids: prompt and output so far.
        history: the same tokens, counted.
        fork_path: which of the request's sequences this is.
        banned_ids: end tokens not allowed yet (min_tokens).
        allowed_ids: ascending, the only ids that may be chosen (structured output); None leaves all.

    Raises:
        InvalidRequestError: no token is left to choose, a logit is NaN, or a logits processor failed.
    """
    adjusted = adjust(logits, params, token_ids, history, banned_ids)
    if allowed_ids is None:
        token = _choose(adjusted, None, params, len(token_ids), fork_path)
    else:  # the same as with the others at -inf, and quicker where few are left
        token = _choose(adjusted[allowed_ids], allowed_ids, params, len(token_ids), fork_path)
    logprobs = None if params.logprobs is None else token_logprobs(logits, token, params.logprobs)
    return SampledToken(token, logprobs)


def _choose(
    logits: F32Array, ids: IdArray | None, params: SamplingParams, position: int, fork_path: tuple[int, ...]
) -> int:
    """One of `ids`, whose logits these are; None stands for all ids."""
    top = logits.max(initial=-np.inf)
    if np.isnan(top):
        raise InvalidRequestError("the logits contain NaN")
    if top == -np.inf:
        raise InvalidRequestError(NOTHING_LEFT if ids is None else NOTHING_FITS)
    if params.temperature < GREEDY_BELOW or top == np.inf:
        best = int(logits.argmax())
        return best if ids is None else int(ids[best])
    places, scaled = _filter(logits, params)
    kept = places if ids is None else ids[places]
    noise = gumbel_noise(params.seed, fork_path, position, kept)
    return int(kept[(scaled + noise).argmax()])


def adjust(
    logits: F32Array,
    params: SamplingParams,
    token_ids: Sequence[int],
    history: TokenHistory,
    banned_ids: Sequence[int],
) -> F32Array:
    """Penalties, bias, bans and the user's processors, on a copy where anything changes."""
    adjusted = logits
    penalise = params.presence_penalty != 0 or params.frequency_penalty != 0
    if params.repetition_penalty != 1 or penalise or params.logit_bias or len(banned_ids) or params.logits_processors:
        adjusted = logits.copy()
    if params.repetition_penalty != 1 and history.seen:
        ids = np.fromiter(history.seen, np.intp)
        penalty = np.float32(params.repetition_penalty)
        adjusted[ids] = np.where(adjusted[ids] > 0, adjusted[ids] / penalty, adjusted[ids] * penalty)
    if penalise and history.generated:
        ids = np.fromiter(history.generated.keys(), np.intp)
        counts = np.fromiter(history.generated.values(), np.float32)
        adjusted[ids] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * counts
    for token, bias in (params.logit_bias or {}).items():
        adjusted[token] += np.float32(bias)
    if len(banned_ids):
        adjusted[np.asarray(banned_ids, np.intp)] = -np.inf
    for processor in params.logits_processors:
        adjusted = _apply(processor, token_ids, adjusted)
    return adjusted


def _apply(processor: LogitsProcessor, token_ids: Sequence[int], logits: F32Array) -> F32Array:
    """Runs a user's function; whatever it raises ends this request alone, with the function's own message."""
    shape = logits.shape
    try:
        array = np.asarray(processor(list(token_ids), logits))
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        raise InvalidRequestError(f"a logits processor failed: {type(error).__name__}: {message}") from error
    if array.shape != shape or array.dtype.kind not in "fiu":
        raise InvalidRequestError(
            f"a logits processor must return {shape[0]} numbers, not {array.dtype} of shape {array.shape}"
        )
    return np.ascontiguousarray(array, np.float32)


def _filter(logits: F32Array, params: SamplingParams) -> tuple[IdArray, F64Array]:
    """The ids that top_k, top_p and min_p leave, ascending, and their logits divided by the temperature."""
    scaled = logits.astype(np.float64) / params.temperature
    ids = top_ids(scaled, params.top_k) if 0 < params.top_k < scaled.size else np.flatnonzero(scaled > -np.inf)
    if params.top_p < 1:
        ids = _nucleus(scaled, ids, params.top_p)
    if params.min_p > 0:
        ids = ids[scaled[ids] >= scaled[ids].max() + np.log(params.min_p)]
    ids = np.sort(ids)
    return ids, scaled[ids]


def _nucleus(scaled: F64Array, ids: IdArray, top_p: float) -> IdArray:
    """The fewest of the most likely `ids` whose probabilities reach top_p. Sorts no more of them than it must."""
    ids = np.sort(ids)
    values = scaled[ids]
    weights = np.exp(values - values.max())
    target = top_p * weights.sum()
    count = 64
    while True:
        best = top_ids(values, min(count, values.size))
        reached = np.cumsum(weights[best]) >= target
        if reached.any():
            return ids[best[: int(reached.argmax()) + 1]]
        if count >= values.size:
            return ids
        count *= 8


def top_ids(values: NDArray[np.floating], k: int) -> IdArray:
    """Indices of the k largest finite values, largest first, ties by the lowest index; values (V,) without NaN."""
    if k < values.size:
        kth = np.partition(values, values.size - k)[values.size - k]
        above = np.flatnonzero(values > kth)
        candidates = np.concatenate([above, np.flatnonzero(values == kth)[: k - above.size]])
    else:
        candidates = np.arange(values.size)
    candidates = np.sort(candidates[values[candidates] > -np.inf])
    return candidates[np.argsort(-values[candidates], kind="stable")]


def token_logprobs(logits: F32Array, token_id: int, num_top: int) -> tuple[TokenLogprob, ...]:
    """log p of `token_id`, then of the num_top most likely tokens, under softmax(logits (V,))."""
    log_total = log_sum_exp(logits)

    def entry(token: int, rank: int) -> TokenLogprob:
        return TokenLogprob(token, float(np.float64(logits[token]) - log_total), rank)

    rank = 1 + int(np.count_nonzero(logits > logits[token_id]))
    best = top_ids(logits, num_top) if num_top else ()
    return (entry(token_id, rank), *(entry(int(token), place) for place, token in enumerate(best, 1)))


def log_sum_exp(logits: F32Array) -> np.float64:
    """log(sum(exp(logits))) of one contiguous row (V,), exponentials in float32, their sum in float64."""
    top = logits.max()
    return np.float64(top) + np.log(np.exp(logits - top).sum(dtype=np.float64))


def noise_key(seed: int, fork_path: tuple[int, ...], position: int) -> int:
    """What the noise of a draw is a function of, besides the token id: 64 bits."""
    message = struct.pack(f"<QQ{len(fork_path)}Q", seed & 0xFFFFFFFFFFFFFFFF, position, *fork_path)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")


def gumbel_noise(seed: int, fork_path: tuple[int, ...], position: int, token_ids: IdArray) -> F64Array:
    """Standard Gumbel noise for token ids (N,), from a counter-based generator.

    The key is a 64-bit BLAKE2b hash of (seed, fork path, position); the counter is the token id; the mixing function is
    SplitMix64's finaliser (Steele, Lea and Flood 2014).
    """
    key = np.uint64(noise_key(seed, fork_path, position))
    x = key + (token_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    uniform = ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # in (0, 1), both ends left out
    return -np.log(-np.log(uniform))
