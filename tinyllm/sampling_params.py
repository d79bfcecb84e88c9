"""What a request asks of the sampler, validated where it enters."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyllm.errors import InvalidRequestError
from tinyllm.structured_output import StructuredOutput

__all__ = ["LogitsProcessor", "SamplingParams", "as_int"]

LogitsProcessor = Callable[[list[int], NDArray[np.float32]], NDArray[np.float32]]

MAX_N = 4096
MAX_STOP_STRINGS = 256
MAX_STOP_LENGTH = 4096
MAX_SINKS = 256  # attention keeps the sinks in one of its splits
MAX_SALT_LENGTH = 4096


def as_int(value: object, name: str, low: int, high: int) -> int:
    """An integer of any kind but bool, within [low, high]. Raises InvalidRequestError naming `name`."""
    if not isinstance(value, (bool, np.bool_)):
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
        else:
            if low <= number <= high:
                return number
    raise InvalidRequestError(f"{name} must be an integer from {low} to {high}, not {_short(value)}")


def _short(value: object) -> str:
    """A one-line, bounded rendering of a user's value; never fails, whatever the value is."""
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    text = text.replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _as_float(value: object, name: str, low: float, high: float, *, above_low: bool = False) -> float:
    """A finite number in [low, high], or in (low, high] if `above_low`."""
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and low <= number <= high and not (above_low and number == low):
            return number
    interval = f"{'above' if above_low else 'at least'} {low:g}"
    if high < math.inf:
        interval += f" and at most {high:g}"
    raise InvalidRequestError(f"{name} must be a finite number {interval}, not {_short(value)}")


def _as_bool(value: object, name: str) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise InvalidRequestError(f"{name} must be True or False, not {_short(value)}")


def _as_stop(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if strings is None:
        return ()
    if not isinstance(strings, Sequence) or isinstance(strings, (bytes, bytearray)):
        raise InvalidRequestError(f"stop must be a string or a list of strings, not {_short(value)}")
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"stop has {len(strings)} strings; at most {MAX_STOP_STRINGS} are allowed")
    for string in strings:
        if not isinstance(string, str) or not 0 < len(string) <= MAX_STOP_LENGTH:
            raise InvalidRequestError(
                f"each stop string must have 1 to {MAX_STOP_LENGTH} characters, not {_short(string)}"
            )
    return tuple(strings)


def _as_sequence(value: object, name: str) -> Sequence[Any]:
    if value is None:
        return ()
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return value
    raise InvalidRequestError(f"{name} must be a list, not {_short(value)}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. The defaults sample from the model's own distribution, reproducibly (seed 0).

    The order: repetition, presence and frequency penalties, logit_bias, min_tokens, the user's logits processors,
    what structured_output leaves, temperature, top_k, top_p, min_p, then one draw. Every draw is a function of (seed,
    which of the n, position) and the logits alone. Log-probabilities are those of the model's own distribution, before
    any of these.

    With `beams` there is no draw: beam search keeps the most likely continuations, by the sum of the log-probabilities
    (penalties, logit_bias, min_tokens, processors and structured_output applied to them), and temperature, top_k,
    top_p, min_p and seed play no part. `window` turns on StreamingLLM (arXiv:2309.17453): generation without end in
    constant memory.

    Attributes:
        n: how many continuations to give back; they share the prompt's computation and memory.
        best_of: make this many, and give back the n with the highest log-probability per token; None makes n.
        beams: beam search with this many beams, which gives back the n best; None samples.
        length_penalty: beam search divides a sum of log-probabilities by (tokens generated) ** length_penalty.
        early_stopping: beam search ends when it has `beams` finished candidates (True), when the current best can no
            longer win at its present length (False), or at no length that is still to come ("never").
        window: each token sees this many tokens up to itself, and the sinks; None sees everything.
        sinks: with a window, the first tokens of the prompt that every token goes on seeing.
        cache_salt: only requests with the same salt share cached prefixes.
        priority: higher is served first and preempted last.
        max_tokens: the most tokens to generate.
        min_tokens: no end-of-sequence, stop token or stop string before this many tokens.
        temperature: divides the logits; 0 (or below 1e-5) takes the most likely token (ties: the lowest id).
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities reach top_p (arXiv:1904.09751).
        min_p: keep tokens at least min_p times as likely as the most likely (arXiv:2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output
            (arXiv:1909.05858); 1 is none.
        presence_penalty: subtracted from the logits of tokens already generated.
        frequency_penalty: subtracted once for each time that a token was generated.
        logit_bias: token id -> number added to its logit.
        seed: any integer of 64 bits.
        stop: strings that end the text; they are left out of it unless include_stop_str_in_output.
        stop_token_ids: token ids that end the sequence; the id stays in token_ids.
        ignore_eos: go on after the model's end-of-sequence token.
        logprobs: report this many most likely tokens at each step, besides the chosen one; None reports nothing.
        prompt_logprobs: the same for the tokens of the prompt.
        logits_processors: functions (token_ids of prompt and output, logits (V,) float32) -> logits (V,).
        skip_special_tokens: leave special tokens out of the text.
        structured_output: what the text must match (StructuredOutput, or a mapping of its fields). Tokens that could
            not go on to a matching text are left out. The sequence ends with "stop" where the text is complete and
            nothing could follow, with ignore_eos too; a stop string or max_tokens may end it earlier, incomplete.

    Raises:
        InvalidRequestError: a value is of the wrong type or outside its range.
    """

    n: int = 1
    best_of: int | None = None
    beams: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    window: int | None = None
    sinks: int = 4
    cache_salt: str = ""
    priority: int = 0
    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int = 0
    stop: Sequence[str] | str = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    skip_special_tokens: bool = True
    structured_output: StructuredOutput | None = None

    def __post_init__(self) -> None:
        def store(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        store("n", as_int(self.n, "n", 1, MAX_N))
        for name in ("best_of", "beams"):
            value = getattr(self, name)
            store(name, None if value is None else as_int(value, name, self.n, MAX_N))
        if self.beams is not None:
            self._check_beams()
        store("length_penalty", _as_float(self.length_penalty, "length_penalty", -100, 100))
        if self.early_stopping != "never":
            if isinstance(self.early_stopping, str):
                raise InvalidRequestError(
                    f'early_stopping must be True, False or "never", not {_short(self.early_stopping)}'
                )
            store("early_stopping", _as_bool(self.early_stopping, "early_stopping"))
        store("window", None if self.window is None else as_int(self.window, "window", 1, 1 << 30))
        store("sinks", as_int(self.sinks, "sinks", 0, MAX_SINKS))
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_SALT_LENGTH:
            raise InvalidRequestError(f"cache_salt must be a string of at most {MAX_SALT_LENGTH} characters")
        try:
            self.cache_salt.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError("cache_salt is not valid Unicode") from None
        store("priority", as_int(self.priority, "priority", -(1 << 31), 1 << 31))
        store("max_tokens", as_int(self.max_tokens, "max_tokens", 1, 1 << 40))
        store("min_tokens", as_int(self.min_tokens, "min_tokens", 0, self.max_tokens))
        store("temperature", _as_float(self.temperature, "temperature", 0, math.inf))
        store("top_k", as_int(self.top_k, "top_k", -1, 1 << 31))
        store("top_p", _as_float(self.top_p, "top_p", 0, 1, above_low=True))
        store("min_p", _as_float(self.min_p, "min_p", 0, 1))
        store(
            "repetition_penalty",
            _as_float(self.repetition_penalty, "repetition_penalty", 0, math.inf, above_low=True),
        )
        store("presence_penalty", _as_float(self.presence_penalty, "presence_penalty", -2, 2))
        store("frequency_penalty", _as_float(self.frequency_penalty, "frequency_penalty", -2, 2))
        store("seed", as_int(self.seed, "seed", -(1 << 63), (1 << 64) - 1))
        store("stop", _as_stop(self.stop))
        ids = _as_sequence(self.stop_token_ids, "stop_token_ids")
        store("stop_token_ids", tuple(as_int(i, "a stop token id", 0, 1 << 31) for i in ids))
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise InvalidRequestError(f"logit_bias must be a mapping, not {_short(self.logit_bias)}")
            bias = {
                as_int(token, "a token id in logit_bias", 0, 1 << 31): _as_float(
                    value, "a value of logit_bias", -1e9, 1e9
                )
                for token, value in self.logit_bias.items()
            }
            store("logit_bias", bias)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            store(name, _as_bool(getattr(self, name), name))
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            store(name, None if value is None else as_int(value, name, 0, 1 << 31))
        processors = _as_sequence(self.logits_processors, "logits_processors")
        for processor in processors:
            if not callable(processor):
                raise InvalidRequestError(f"a logits processor must be callable, not {_short(processor)}")
        store("logits_processors", tuple(processors))
        if self.structured_output is not None:
            store("structured_output", StructuredOutput.of(self.structured_output))

    @property
    def num_sequences(self) -> int:
        """How many sequences run for one request."""
        return self.beams or self.best_of or self.n

    @property
    def ranked(self) -> bool:
        """Whether what is given back is chosen among more sequences at the end; there is nothing to stream before."""
        return self.beams is not None or self.num_sequences > self.n

    def _check_beams(self) -> None:
        for name, given in (
            ("best_of", self.best_of is not None),
            ("stop", bool(self.stop)),
            ("logprobs", self.logprobs is not None),
        ):
            if given:
                raise InvalidRequestError(f"beam search does not go with {name}")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Checks what depends on the model: ids and counts against its vocabulary. Raises InvalidRequestError."""
        last = vocab_size - 1
        for token in self.stop_token_ids:
            as_int(token, "a stop token id", 0, last)
        for token in self.logit_bias or ():
            as_int(token, "a token id in logit_bias", 0, last)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                as_int(getattr(self, name), name, 0, vocab_size)
