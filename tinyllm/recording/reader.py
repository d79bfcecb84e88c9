"""Reads a recording (see events) that anyone may have written: every value is checked before it is used."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tinyllm.backends.base import KVCacheSpec
from tinyllm.config import KV_DTYPES, EngineConfig
from tinyllm.engine.sequence import Task
from tinyllm.errors import ConfigError, InvalidRequestError, RecordingError, reason
from tinyllm.recording.events import (
    FORMAT,
    MAX_LINE_NBYTES,
    VERSION,
    Abort,
    Admitted,
    BlockChange,
    Copy,
    Event,
    Finished,
    Fork,
    Header,
    Interruption,
    Owner,
    Preempted,
    Ran,
    RequestAdded,
    Step,
    Tokens,
)
from tinyllm.sampling_params import SamplingParams

__all__ = ["Recording", "sampling_params"]

_T = TypeVar("_T")
_MAX_POSITION = 1 << 40
_MAX_INDEX = 1 << 31
_MAX_SECONDS = 1e12
_MAX_NAME = 1 << 16
_DIGITS = frozenset("0123456789abcdef")


class Recording:
    """A recording on disk: its header, and its events in order each time it is iterated over.

    Attributes:
        path: the file.
        header: what ran, and how.
        torn: whether the last line breaks off, as after a crash; known once an iteration has ended. It is left out.

    Raises:
        RecordingError: naming the file and what is wrong with it, when opened or, with the line, while iterating.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.torn = False
        with self._opened() as file:
            first = self._read_line(file, 1)
            if first is None:
                self._fail("is empty: not a recording")
            self.header = self._parse(first, 1, _header)
            if not first.endswith(b"\n"):
                self._fail("breaks off in its first line")

    def __iter__(self) -> Iterator[Event]:
        parser = _EventParser(self.header)
        with self._opened() as file:
            number = 1
            self._read_line(file, number)  # the header
            while (line := self._read_line(file, number := number + 1)) is not None:
                if line.endswith(b"\n"):
                    yield self._parse(line, number, parser.event)
                else:
                    self.torn = True

    def _opened(self) -> io.BufferedReader:
        try:
            return open(self.path, "rb")
        except (OSError, ValueError) as error:
            self._fail_to_read(error)

    def _read_line(self, file: io.BufferedReader, number: int) -> bytes | None:
        try:
            line = file.readline(MAX_LINE_NBYTES + 1)
        except OSError as error:
            self._fail_to_read(error)
        if len(line) > MAX_LINE_NBYTES:
            self._fail(f"line {number} has more than {MAX_LINE_NBYTES} bytes" if number > 1 else "is not a recording")
        return line or None

    def _parse(self, line: bytes, number: int, parse: Callable[[dict[str, Any]], _T]) -> _T:
        try:
            value = json.loads(line.decode("ascii"), parse_constant=_not_a_number)
            if not isinstance(value, dict):
                raise _BadLineError("it is not an object")
            return parse(value)
        except (UnicodeDecodeError, json.JSONDecodeError):
            problem = "it is not JSON"
        except (_BadLineError, InvalidRequestError) as error:
            problem = str(error)
        except RecursionError:
            problem = "it is nested too deeply"
        except ValueError:  # an integer of too many digits
            problem = "it is not JSON"
        if number == 1:
            self._fail(f"is not a recording: {problem}")
        self._fail(f"line {number} is damaged: {problem}")

    def _fail(self, problem: str) -> NoReturn:
        raise RecordingError(f"{self.path} {problem}")

    def _fail_to_read(self, error: Exception) -> NoReturn:
        raise RecordingError(f"cannot read {self.path}: {reason(error)}") from error


def sampling_params(event: RequestAdded) -> SamplingParams:
    """The parameters of a recorded request, without its processors. Raises InvalidRequestError."""
    params = dict(event.params)
    if isinstance(params.get("logit_bias"), list):
        params["logit_bias"] = dict(params["logit_bias"])
    return SamplingParams(**params)


class _BadLineError(ValueError):
    """What is wrong with a line."""


def _not_a_number(name: str) -> NoReturn:
    raise _BadLineError(f"{name} is not a number")


# ---- values


def _integer(value: object, what: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _BadLineError(f"{what} must be an integer from {low} to {high}, not {_short(value)}")
    return value


def _number(value: object, what: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= _MAX_SECONDS:  # type: ignore[operator]
        raise _BadLineError(f"{what} must be a number from 0 to {_MAX_SECONDS:g}, not {_short(value)}")
    return float(value)  # type: ignore[arg-type]


def _string(value: object, what: str, limit: int = MAX_LINE_NBYTES) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise _BadLineError(f"{what} must be a string, not {_short(value)}")
    return value


def _boolean(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise _BadLineError(f"{what} must be true or false, not {_short(value)}")
    return value


def _list(value: object, what: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        size = "" if length is None else f" of {length}"
        raise _BadLineError(f"{what} must be a list{size}, not {_short(value)}")
    return value


def _short(value: object) -> str:
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a large integer"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known_keys(line: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    for key in line:
        if key not in known:
            raise _BadLineError(f"{what} has an unknown field {_short(key)}")


# ---- lines

_HEADER_KEYS = frozenset({"format", "version", "model", "fingerprint", "vocab_size", "engine", "kv"})
_REQUEST_KEYS = frozenset({"request", "after", "at", "prompt", "task", "params", "processors", "session"})
_ABORT_KEYS = frozenset({"abort", "after", "at"})
_INTERRUPTION_KEYS = frozenset({"interrupted", "after", "at"})
_STEP_KEYS = frozenset({"step", *(field.name for field in fields(Step) if field.name != "number")})
_PARAMS_KEYS = frozenset(field.name for field in fields(SamplingParams)) - {"logits_processors"}
_ENGINE_KEYS = frozenset(field.name for field in fields(EngineConfig))


def _header(line: dict[str, Any]) -> Header:
    if line.get("format") != FORMAT:
        raise _BadLineError(f"its first line does not say {FORMAT}")
    if type(line.get("version")) is not int or line["version"] != VERSION:
        raise _BadLineError(f"version {_short(line.get('version'))} is unknown; this tinyllm reads version {VERSION}")
    _known_keys(line, _HEADER_KEYS, "the header")
    engine, kv = line.get("engine"), line.get("kv")
    if not isinstance(engine, dict) or not isinstance(kv, dict):
        raise _BadLineError("the header lacks the engine's options")
    _known_keys(engine, _ENGINE_KEYS, "the engine's options")
    try:
        config = EngineConfig(**engine)
    except ConfigError as error:
        raise _BadLineError(str(error)) from None
    _known_keys(kv, frozenset(field.name for field in fields(KVCacheSpec)), "the KV cache")
    for field in fields(KVCacheSpec):
        if field.name != "dtype":
            _integer(kv.get(field.name), field.name, 1, (1 << 31) - 1)
    if kv.get("dtype") not in KV_DTYPES:
        raise _BadLineError(f"dtype must be one of {', '.join(KV_DTYPES)}, not {_short(kv.get('dtype'))}")
    if (config.num_blocks, config.block_size, config.kv_dtype) != (kv["num_blocks"], kv["block_size"], kv["dtype"]):
        raise _BadLineError("the engine's options and the KV cache do not fit together")
    return Header(
        model=_string(line.get("model"), "model", _MAX_NAME),
        fingerprint=_string(line.get("fingerprint"), "fingerprint", _MAX_NAME),
        vocab_size=_integer(line.get("vocab_size"), "vocab_size", 1, 1 << 24),
        engine=engine,
        kv=kv,
    )


class _EventParser:
    """Parses the lines after the header; what they name must exist, and steps must follow one another."""

    def __init__(self, header: Header) -> None:
        self._last_token = header.vocab_size - 1
        self._last_block = header.num_blocks - 1
        self._max_count = header.max_batch_tokens
        self._num_steps = 0
        self._at = 0.0
        self._known: set[str] = set()
        self._kinds: dict[str, Callable[[dict[str, Any], float], Event]] = {
            "request": self._request,
            "abort": self._abort,
            "interrupted": self._interruption,
            "step": self._step,
        }

    def event(self, line: dict[str, Any]) -> Event:
        kinds = [kind for kind in self._kinds if kind in line]
        if len(kinds) != 1:
            raise _BadLineError("it is neither a request, an abort nor a step")
        at = _number(line.get("at"), "at")
        if at < self._at:
            raise _BadLineError("its time is before that of the line above")
        self._at = at
        return self._kinds[kinds[0]](line, at)

    def _request(self, line: dict[str, Any], at: float) -> RequestAdded:
        _known_keys(line, _REQUEST_KEYS, "the request")
        params = line.get("params", {})
        if not isinstance(params, dict):
            raise _BadLineError(f"params must be a mapping, not {_short(params)}")
        _known_keys(params, _PARAMS_KEYS, "params")
        if "logit_bias" in params:
            for pair in _list(params["logit_bias"], "logit_bias"):
                token, _ = _list(pair, "a pair of logit_bias", 2)
                self._token(token)
        task = line.get("task")
        if task not in [known.value for known in Task]:
            raise _BadLineError(f"task {_short(task)} is unknown")
        event = RequestAdded(
            request_id=_string(line["request"], "request"),
            after=self._after(line),
            at=at,
            prompt=tuple(map(self._token, _list(line.get("prompt"), "prompt"))),
            task=task,
            params=params,
            processors=_integer(line.get("processors", 0), "processors", 0, _MAX_INDEX),
            session=_boolean(line.get("session", False), "session"),
        )
        if not event.prompt:
            raise _BadLineError("the prompt is empty")
        sampling_params(event)
        self._known.add(event.request_id)
        return event

    def _abort(self, line: dict[str, Any], at: float) -> Abort:
        _known_keys(line, _ABORT_KEYS, "the abort")
        return Abort(request_id=self._id(line["abort"]), after=self._after(line), at=at)

    def _interruption(self, line: dict[str, Any], at: float) -> Interruption:
        _known_keys(line, _INTERRUPTION_KEYS, "the interruption")
        if line["interrupted"] is not True:
            raise _BadLineError("interrupted must be true")
        return Interruption(after=self._after(line), at=at)

    def _step(self, line: dict[str, Any], at: float) -> Step:
        _known_keys(line, _STEP_KEYS, "the step")
        number = _integer(line["step"], "step", 1, _MAX_POSITION)
        if number != self._num_steps + 1:
            raise _BadLineError(f"step {number} follows step {self._num_steps}")
        self._num_steps = number
        digest = _string(line.get("digest", ""), "digest")
        if digest and not (len(digest) == 16 and _DIGITS.issuperset(digest)):
            raise _BadLineError(f"digest must be 16 hexadecimal digits, not {_short(digest)}")

        def items(name: str, parse: Callable[[Any], _T]) -> tuple[_T, ...]:
            return tuple(map(parse, _list(line.get(name, []), name)))

        step = Step(
            number=number,
            at=at,
            ran=items("ran", self._ran),
            admitted=items("admitted", self._admitted),
            preempted=items("preempted", lambda item: Preempted(*self._name(_list(item, "preempted", 2)))),
            evicted=items("evicted", self._block),
            copies=items("copies", lambda item: Copy(*map(self._block, _list(item, "copies", 2)))),
            rows=_integer(line.get("rows", 0), "rows", 0, _MAX_POSITION),
            digest=digest,
            forks=items("forks", self._fork),
            tokens=items("tokens", self._tokens),
            finished=items("finished", self._finished),
            blocks=items("blocks", self._change),
            free=_integer(line.get("free", 0), "free", 0, self._last_block + 1),
            waiting=_integer(line.get("waiting", 0), "waiting", 0, _MAX_INDEX),
            running=_integer(line.get("running", 0), "running", 0, _MAX_INDEX),
        )
        if sum(item.num_tokens for item in step.ran) > self._max_count:
            raise _BadLineError(f"more tokens ran than the budget of {self._max_count}")
        return step

    # ---- parts of a line

    def _after(self, line: dict[str, Any]) -> int:
        after = line.get("after")
        if type(after) is not int or after != self._num_steps:
            raise _BadLineError(f"it says after step {_short(after)}, but follows step {self._num_steps}")
        return after

    def _id(self, value: object) -> str:
        request_id = _string(value, "a request's id")
        if request_id not in self._known:
            raise _BadLineError(f"there is no request {_short(request_id)}")
        return request_id

    def _name(self, item: list[Any]) -> tuple[str, int]:
        return self._id(item[0]), _integer(item[1], "a sequence's index", 0, _MAX_INDEX)

    def _token(self, value: object) -> int:
        return _integer(value, "a token id", 0, self._last_token)

    def _block(self, value: object) -> int:
        return _integer(value, "a block", 0, self._last_block)

    def _ran(self, value: object) -> Ran:
        item = _list(value, "ran", 4)
        start = _integer(item[2], "a position", 0, _MAX_POSITION)
        return Ran(*self._name(item), start, _integer(item[3], "a count of tokens", 1, self._max_count))

    def _admitted(self, value: object) -> Admitted:
        item = _list(value, "admitted", 3)
        return Admitted(*self._name(item), _integer(item[2], "a count of tokens", 0, _MAX_POSITION))

    def _fork(self, value: object) -> Fork:
        item = _list(value, "forks", 3)
        return Fork(*self._name(item), _integer(item[2], "a sequence's index", 0, _MAX_INDEX))

    def _tokens(self, value: object) -> Tokens:
        item = _list(value, "tokens", 4)
        position = _integer(item[2], "a position", 0, _MAX_POSITION)
        return Tokens(*self._name(item), position, tuple(map(self._token, _list(item[3], "tokens"))))

    def _finished(self, value: object) -> Finished:
        item = _list(value, "finished", 3)
        return Finished(*self._name(item), None if item[2] is None else _string(item[2], "a reason", _MAX_NAME))

    def _change(self, value: object) -> BlockChange:
        item = _list(value, "blocks", 3)
        owners = tuple(map(self._owner, _list(item[2], "a block's owners")))
        return BlockChange(self._block(item[0]), _boolean(item[1], "cached"), owners)

    def _owner(self, value: object) -> Owner:
        item = _list(value, "a block's owner", 3)
        index = _integer(item[1], "a sequence's index", 0, _MAX_INDEX)
        return Owner(_string(item[0], "a request's id"), index, _integer(item[2], "a place", 0, _MAX_POSITION))
