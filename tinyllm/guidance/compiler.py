"""Compiles structured outputs: first in a process that may die of them, then here; the last ones are kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Collection
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from tinyllm.errors import InvalidRequestError, reason
from tinyllm.guidance import grammar
from tinyllm.guidance.matcher import GuidanceMatcher
from tinyllm.guidance.vocabulary import Vocabulary
from tinyllm.structured_output import StructuredOutput
from tinyllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

__all__ = ["GuidanceCompiler"]

MAX_GRAMMARS = 256
MAX_NBYTES = 512 << 20
TRIAL_SECONDS = 30  # by the clock; other work may keep the trial waiting


class _Compiled(NamedTuple):
    matcher: GuidanceMatcher  # before its first token; only copied
    nbytes: int  # what compiling it took, which is more than what it keeps


class GuidanceCompiler:
    """Makes matchers for a model's vocabulary; safe to use from any thread.

    Args:
        vocab_size: of the model.
        end_ids: ids that end a text.
        max_grammars, max_nbytes: how much is kept of what was compiled; what was used least recently goes first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_ids: Collection[int],
        *,
        max_grammars: int = MAX_GRAMMARS,
        max_nbytes: int = MAX_NBYTES,
    ) -> None:
        self._source = tokenizer, vocab_size, tuple(end_ids)
        self._vocab_size = vocab_size
        self._max_grammars = max_grammars
        self._max_nbytes = max_nbytes
        self._lock = Lock()  # of `_kept`; held for as long as a dictionary takes
        self._kept: OrderedDict[StructuredOutput, _Compiled] = OrderedDict()
        self._tokenizer_lock = Lock()
        self._tokenizer: LLTokenizer | None = None

    def matcher(self, structured_output: StructuredOutput) -> GuidanceMatcher:
        """A matcher of its own, before its first token; compiled where it is not kept.

        Raises:
            InvalidRequestError: it cannot be compiled, or llguidance is not installed.
        """
        with self._lock:
            found = self._kept.get(structured_output)
            if found is not None:
                self._kept.move_to_end(structured_output)
                return found.matcher.copy()
        compiled = self._compile(structured_output)  # twice, where two threads ask at once
        with self._lock:
            self._kept[structured_output] = compiled
            self._kept.move_to_end(structured_output)
            while len(self._kept) > self._max_grammars or self._num_kept_bytes() > self._max_nbytes:
                if len(self._kept) == 1:
                    break
                self._kept.popitem(last=False)
            return compiled.matcher.copy()

    def _num_kept_bytes(self) -> int:
        return sum(compiled.nbytes for compiled in self._kept.values())

    def _compile(self, structured_output: StructuredOutput) -> _Compiled:
        if find_spec("llguidance") is None:
            raise InvalidRequestError("structured output needs llguidance: pip install 'tinyllm[structured]'")
        kind, text = structured_output.kind, structured_output.text
        nbytes = _try(structured_output)
        compiled = grammar.make_matcher(self._llguidance_tokenizer(), kind, text)
        message = grammar.problem(compiled)
        if message is not None:
            raise _refused(kind, message)
        matcher = GuidanceMatcher(compiled, self._vocab_size)
        if matcher.finished or not len(matcher.allowed_ids()):
            raise _refused(kind, "nothing but the empty text matches, or no token of this model begins one that does")
        return _Compiled(matcher, nbytes)

    def _llguidance_tokenizer(self) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                vocabulary = Vocabulary(*self._source)
                self._tokenizer = grammar.make_tokenizer(vocabulary.tokens, vocabulary.special_ids, vocabulary.tokenize)
            return self._tokenizer


def _refused(kind: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"the {kind} cannot be compiled: {message}")


def _cause_of_death(returncode: int) -> str:
    if returncode in (-getattr(signal, "SIGXCPU", 0), -getattr(signal, "SIGKILL", 0)):
        return f"it takes more than {grammar.CPU_SECONDS} s of computing"
    if returncode == -signal.SIGSEGV:
        return "its parts nest too deeply"
    return f"it takes more than {grammar.MEMORY_NBYTES >> 20} MB, or llguidance broke on it"


def _try(structured_output: StructuredOutput) -> int:
    """Compiles in a process of its own; returns the bytes that it took. Raises InvalidRequestError."""
    kind = structured_output.kind
    request = json.dumps({"kind": kind, "text": structured_output.text})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, grammar.__file__],
            input=request.encode(),
            capture_output=True,
            timeout=TRIAL_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise _refused(kind, f"it takes longer than {TRIAL_SECONDS} s") from None
    except OSError as error:
        raise _refused(kind, f"no process could be started for it: {reason(error)}") from error
    if done.returncode != 0 or not done.stdout:
        raise _refused(kind, _cause_of_death(done.returncode))
    answer = json.loads(done.stdout)
    if answer["error"] is not None:
        raise _refused(kind, answer["error"])
    return int(answer["nbytes"])
