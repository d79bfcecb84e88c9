"""Sessions: sequences that a user keeps, continues, forks, and saves to resume bit for bit in another process."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from tinyllm.engine.request_loop import RequestLoop
from tinyllm.engine.sequence import Sequence, Task
from tinyllm.engine.snapshot import Snapshot
from tinyllm.errors import InvalidRequestError
from tinyllm.outputs import CompletionOutput, RequestOutput, StreamChunk
from tinyllm.sampling_params import SamplingParams
from tinyllm.snapshot_file import save_snapshot

if TYPE_CHECKING:
    from tinyllm.llm import LLM, Prompt

__all__ = ["Session"]


class Session:
    """A sequence of tokens, and what is computed of it in the KV cache. Made by LLM.session, LLM.restore and fork.

    `session.generate(params)` gives the same bits as `llm.generate(session.token_ids, params)` with the session's
    window, sinks and salt, but computes only what is new since the last call. When requests need the session's blocks,
    they get them, and it is computed again: nothing changes but the time it takes.

    Close a session, or use it in a `with` statement, to give its blocks back; the garbage collector does it too.

    Attributes:
        window, sinks, cache_salt: see SamplingParams; those of every request of the session.

    Raises (all methods):
        InvalidRequestError: what was asked cannot be served, or the session is closed; the session is as it was before.
    """

    def __init__(self, llm: LLM, loop: RequestLoop, settings: SamplingParams, parked: Sequence | None = None) -> None:
        """parked: a sequence at rest, the session's from now on. `settings` hold window, sinks and salt."""
        self._llm = llm
        self._loop = loop
        self._settings = settings
        self._parked = parked  # its tokens begin the session's
        self._token_ids = [] if parked is None else parked.token_ids.copy()
        self._request_id: str | None = None  # of the request that runs
        self._closed = False

    # ---- what it holds

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far: those appended and those generated."""
        return self._token_ids.copy()

    @property
    def text(self) -> str:
        """The tokens as text, without the special ones; "" without a tokenizer."""
        tokenizer = self._llm.tokenizer
        return "" if tokenizer is None else tokenizer.decode(self._token_ids)

    def __len__(self) -> int:
        return len(self._token_ids)

    def __repr__(self) -> str:
        return f"<Session of {len(self)} tokens{', closed' if self._closed else ''}>"

    @property
    def window(self) -> int | None:
        return self._settings.window

    @property
    def sinks(self) -> int:
        return self._settings.sinks

    @property
    def cache_salt(self) -> str:
        return self._settings.cache_salt

    # ---- growing

    def append(self, prompt: Prompt) -> None:
        """Adds a text or token ids at the end; they are computed when they are needed.

        A text is encoded by itself; the special tokens that begin a text (bos) come only where the session is empty.
        """
        self._check_idle()
        if isinstance(prompt, str) and not prompt:
            return
        new = self._llm.encode(prompt, add_special_tokens=not self._token_ids, windowed=self.window is not None)
        if new:
            self._token_ids = self._llm.engine.check_request([*self._token_ids, *new], self._settings, Task.PREFILL)

    def generate(self, sampling_params: SamplingParams | None = None) -> CompletionOutput:
        """Continues the session; what is generated becomes part of it.

        All tokens do, those that a stop string cuts off the text and the one that ends the sequence too.
        """
        return self._finish(self._run(self._checked(sampling_params), Task.GENERATE)).outputs[0]

    def stream(self, sampling_params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """The same, yielding text as it is made. The tokens become part of the session when the iterator ends.

        Leaving it early aborts the request: the session is then as it was before.
        """
        return self._run(self._checked(sampling_params), Task.GENERATE)

    # ---- copies

    def fork(self) -> Session:
        """Another session in the same state: it shares every block, and a block is copied only when one writes to it.

        Of an iterator of `stream` that has not ended, the fork has nothing.
        """
        self._check_open()
        parked = None
        if self._parked is not None:
            with self._loop.turn() as engine:
                parked = engine.fork(self._parked)
        child = Session(self._llm, self._loop, self._settings, parked)
        child._token_ids = self._token_ids.copy()
        return child

    def snapshot(self) -> Snapshot:
        """The session as numpy arrays of their own; tokens not computed yet are computed first."""
        self._check_idle()
        self._check_not_empty()
        if self._parked is None or self._parked.num_computed_tokens < len(self._token_ids):
            self._finish(self._run(self._settings, Task.PREFILL))
        assert self._parked is not None
        with self._loop.turn() as engine:
            return engine.snapshot(self._parked)

    def save(self, path: str | Path) -> None:
        """Writes the session to a file, for LLM.restore; a file there is replaced as a whole, or left alone.

        Raises:
            SnapshotError: the file cannot be written.
        """
        save_snapshot(self.snapshot(), path)

    # ---- the end

    def close(self) -> None:
        """Gives the session's blocks back; a stream still under way is aborted. May be called again."""
        self._closed = True
        if self._request_id is not None:
            self._loop.drop(self._request_id)
        self._replace_parked(None)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_parked", None) is not None and not sys.is_finalizing():
            self._replace_parked(None)

    # ---- parts

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequestError("the session is closed")

    def _check_idle(self) -> None:
        self._check_open()
        if self._request_id is not None:
            raise InvalidRequestError("the session is generating: exhaust or close the iterator of its stream first")

    def _check_not_empty(self) -> None:
        if not self._token_ids:
            raise InvalidRequestError("the session is empty: append a prompt first")

    def _checked(self, params: SamplingParams | None) -> SamplingParams:
        """What a request asks, under the session's window, sinks and salt. Raises InvalidRequestError."""
        self._check_idle()
        self._check_not_empty()
        params = params or SamplingParams()
        if params.beams is not None or params.num_sequences > 1:
            raise InvalidRequestError("a session has one continuation: use fork instead of n, best_of or beams")
        if params.prompt_logprobs is not None:
            raise InvalidRequestError(
                "a session does not compute its prompt again: use LLM.generate for prompt_logprobs"
            )
        if params.window is not None and (params.window, params.sinks) != (self.window, self.sinks):
            raise InvalidRequestError(
                f"the session has window {self.window} and sinks {self.sinks}, not {params.window} and {params.sinks}"
            )
        if params.cache_salt not in ("", self.cache_salt):
            raise InvalidRequestError("the session has another cache_salt")
        params = replace(params, window=self.window, sinks=self.sinks, cache_salt=self.cache_salt)
        self._llm.engine.check_request(self._token_ids, params)
        return params

    def _run(self, params: SamplingParams, task: Task) -> Generator[StreamChunk, None, RequestOutput]:
        """Runs one request over the session's tokens; when it has finished, the session is what it left."""
        self._check_idle()
        self._request_id = request_id = self._loop.add(
            self._token_ids, params, task, resume_from=self._parked, keep=True
        )
        try:
            output = yield from self._loop.follow(request_id)
            with self._loop.turn() as engine:
                parked = engine.take_kept(request_id)
            self._replace_parked(parked)
            self._token_ids = parked.token_ids.copy()
            return output
        finally:
            self._request_id = None
            self._loop.drop(request_id)

    @staticmethod
    def _finish(run: Generator[StreamChunk, None, RequestOutput]) -> RequestOutput:
        with closing(run):  # where an interrupt comes between two steps, the request ends here
            while True:
                try:
                    next(run)
                except StopIteration as end:
                    return end.value

    def _replace_parked(self, parked: Sequence | None) -> None:
        old, self._parked = self._parked, parked
        if old is not None:
            self._loop.release(old)
