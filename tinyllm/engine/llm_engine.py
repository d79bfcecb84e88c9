"""The step loop: requests in, one batch of tokens a step, outputs out. Single-threaded; abort and add between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass

from tinyllm.backends.base import F32Array, KVCacheSpec
from tinyllm.config import EngineConfig
from tinyllm.engine.admission import Admission
from tinyllm.engine.batch import build_batch
from tinyllm.engine.block_manager import BlockManager
from tinyllm.engine.decoding import Decoding
from tinyllm.engine.kv_cache import max_logits_rows
from tinyllm.engine.matcher import MakeMatcher
from tinyllm.engine.model_runner import ModelRunner
from tinyllm.engine.observer import EngineObserver
from tinyllm.engine.output import request_output, stream_chunk
from tinyllm.engine.parking import Parking
from tinyllm.engine.scheduler import ScheduledSequence, Scheduler
from tinyllm.engine.sequence import Request, Sequence, SequenceStatus, Task
from tinyllm.engine.snapshot import Snapshot
from tinyllm.engine.text import TextDecoder
from tinyllm.errors import InvalidRequestError
from tinyllm.models.model import Model
from tinyllm.outputs import RequestOutput, StreamChunk
from tinyllm.sampling_params import SamplingParams
from tinyllm.step_cost import StallLimit

__all__ = ["LLMEngine", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """What one step brought: (request id, chunk) pairs in the order of the batch, and the requests that ended."""

    chunks: list[tuple[str, StreamChunk]]
    finished: list[RequestOutput]


class LLMEngine:
    """Serves requests over one model. Outputs depend on the request alone, not on what else runs.

    Args:
        spec: the KV cache to reserve (see engine.kv_cache.kv_cache_spec).
        eos_token_ids: ids that end a sequence unless ignore_eos.
        make_decoder: makes an incremental decoder for a sequence, given skip_special_tokens; None without a tokenizer.
        token_text: the text of a token id, for log-probabilities.
        make_matcher: compiles what a text must look like; None without a tokenizer.

    Attributes:
        requests: those not finished, by id.
        num_steps, num_preemptions: how often a batch ran, and a sequence lost its blocks.
        observers: told of everything that happens; they may come and go between steps.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        spec: KVCacheSpec,
        *,
        eos_token_ids: Seq[int] = (),
        make_decoder: Callable[[bool], TextDecoder] | None = None,
        token_text: Callable[[int], str] | None = None,
        make_matcher: MakeMatcher | None = None,
    ) -> None:
        eos = frozenset(eos_token_ids)
        self.config = config
        self.model_config = model.config
        self.block_manager = BlockManager(spec.num_blocks, spec.block_size, prefix_caching=config.prefix_caching)
        self.scheduler = Scheduler(
            self.block_manager,
            max_batch_tokens=config.max_batch_tokens,
            max_num_seqs=config.max_num_seqs,
            stall_limit=None if config.max_stall is None else StallLimit(config.max_stall, model.backend.step_cost),
        )
        self.runner = ModelRunner(
            model, spec, max_batch_tokens=config.max_batch_tokens, max_logits_rows=max_logits_rows(config)
        )
        self.requests: dict[str, Request] = {}
        self.observers: list[EngineObserver] = []
        self.num_steps = 0
        self.num_preemptions = 0
        self._admission = Admission(
            model.config,
            config,
            num_blocks=spec.num_blocks,
            eos_token_ids=eos,
            has_tokenizer=make_decoder is not None,
            make_matcher=make_matcher,
        )
        self._decoding = Decoding(self.scheduler, eos, make_decoder, make_matcher)
        self._parking = Parking(self.scheduler, self.runner, self._admission)
        self._token_text = token_text
        self._kept: dict[str, Sequence] = {}

    # ---- requests

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        task: Task = Task.GENERATE,
        resume_from: Sequence | None = None,
        keep: bool = False,
    ) -> None:
        """Validates a request and puts it in the queue.

        Args:
            resume_from: a parked sequence, under the same window, sinks and salt, whose tokens begin the prompt: what
                is computed of it is shared, not computed again.
            keep: when the request has finished, its first sequence is parked; see take_kept.

        Raises:
            InvalidRequestError: naming what is wrong; the engine and its other requests are as before.
        """
        if request_id in self.requests:
            raise InvalidRequestError(f"a request named {request_id!r} is already running")
        request = self._admission.request(
            request_id,
            prompt_token_ids,
            params,
            prompt=prompt,
            task=task,
            resume_from=resume_from,
            keep=keep,
        )
        if resume_from is not None:
            known = resume_from.token_ids
            assert request.prompt_token_ids[: len(known)] == known, "the prompt does not begin as what it resumes"
            assert (request.window, request.sinks) == (resume_from.request.window, resume_from.request.sinks)
            request.prefix_root = resume_from.request.prefix_root
        request.sequences.append(self._decoding.first_sequence(request))
        self.requests[request_id] = request
        self.scheduler.add(request.sequences[0])
        for observer in self.observers:
            observer.request_added(request)

    def check_request(
        self, prompt_token_ids: Seq[int], params: SamplingParams, task: Task = Task.GENERATE
    ) -> list[int]:
        """The prompt as plain ints, if the request can be served. Raises InvalidRequestError otherwise."""
        return self._admission.check(prompt_token_ids, params, task)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request now and frees its blocks; None if there is no such request."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        output = self._end(request, "abort")
        for observer in self.observers:
            observer.request_aborted(request)
        return output

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    # ---- sequences at rest; see engine.parking

    @property
    def fingerprint(self) -> str:
        """Names model, device and cache dtype by what they compute: where it is the same, so are all bits."""
        return self.runner.fingerprint

    def take_kept(self, request_id: str) -> Sequence:
        """The parked sequence of a finished request that was to be kept; it is the caller's to release."""
        return self._kept.pop(request_id)

    def fork(self, parked: Sequence) -> Sequence:
        """Another parked sequence in the same state, on the same blocks."""
        return self._parking.fork(parked)

    def release(self, parked: Sequence) -> None:
        """Gives up a parked sequence and its blocks."""
        self._parking.release(parked)

    def snapshot(self, parked: Sequence) -> Snapshot:
        """What the cache holds of a parked sequence, as numpy arrays."""
        return self._parking.snapshot(parked)

    def restore(self, snapshot: Snapshot) -> Sequence:
        """A parked sequence from a snapshot. Raises SnapshotError or InvalidRequestError; then nothing has changed."""
        return self._parking.restore(snapshot)

    # ---- the step

    def step(self) -> StepResult:
        """Runs one batch: some tokens of every sequence that the budget reaches."""
        output = self.scheduler.schedule()
        if not output.scheduled:
            assert not self.requests, "requests are waiting, but nothing can run"
            return StepResult([], [])
        try:
            batch = build_batch(output.scheduled, self.block_manager.block_size)
            hidden = self.runner.forward(batch, output.copies)
            self._collect_rows(output.scheduled, hidden)
        except BaseException:  # an interrupt too: what was scheduled did not all happen
            self.scheduler.undo(output)
            for observer in self.observers:
                observer.step_undone()
            raise
        stepped = list(dict.fromkeys(item.sequence.request for item in output.scheduled))
        result = self._finish_step(stepped)
        self.num_steps += 1
        self.num_preemptions += len(output.preempted)
        if self.observers:
            gone = [request for request in stepped if request.request_id not in self.requests]
            for observer in self.observers:
                observer.step_finished(output, gone)
        if self.config.debug_checks:
            self.check_invariants()
        return result

    def check_invariants(self) -> None:
        """Asserts that blocks and tables agree; see BlockManager.check."""
        live = [sequence for request in self.requests.values() for sequence in request.sequences]
        self.block_manager.check({*live, *self.scheduler.parked})  # one that is kept may be both

    def _collect_rows(self, scheduled: Seq[ScheduledSequence], hidden: F32Array) -> None:
        """Takes what each sequence needs from the step's hidden states (T, M), and advances the sequences."""
        wanted: list[tuple[Sequence, int]] = []  # (sequence, position) of each row that goes through the LM head
        rows: list[int] = []
        end = 0
        for item in scheduled:
            sequence, request = item.sequence, item.sequence.request
            start, first_row = sequence.num_computed_tokens, end
            end += item.num_tokens
            for position in _logits_positions(sequence, start, start + item.num_tokens):
                wanted.append((sequence, position))
                rows.append(first_row + position - start)
            if request.task is Task.EMBED and request.rows is not None:
                new = max(start, request.num_rows)
                request.rows[new : start + item.num_tokens] = self.runner.host_rows(
                    hidden, first_row + new - start, end
                )
                request.num_rows = max(request.num_rows, start + item.num_tokens)
            sequence.num_computed_tokens += item.num_tokens
        draws = [self._decoding.draws(*item, row) for row, item in enumerate(wanted)]
        readers = [observer for observer in self.observers if observer.wants_logits]
        outcomes = self.runner.outcomes(hidden, rows, draws, keep_logits=bool(readers))
        for (sequence, position), (logits, tokens) in zip(wanted, outcomes, strict=True):
            for reader in readers:
                assert logits is not None
                reader.logits_used(sequence, position, logits)
            if tokens is not None:
                self._decoding.use_draws(sequence, tokens)
            else:
                assert logits is not None
                self._decoding.use_logits(sequence, position, logits)

    def _finish_step(self, stepped: Seq[Request]) -> StepResult:
        """Streams new text, and ends what is complete or has failed."""
        chunks: list[tuple[str, StreamChunk]] = []
        finished: list[RequestOutput] = []
        for request in stepped:
            search = request.beam_search
            if request.error is not None:
                if search is not None:
                    self._decoding.finish_search(request, search, "error")
                for sequence in request.sequences:
                    if sequence.finish_reason is None:
                        sequence.finish_reason = "error"
            elif request.task is not Task.GENERATE:
                if request.sequences[0].num_due_tokens == 0:
                    finished.append(self._end(request, None))
                continue
            elif search is not None and search.done:
                self._decoding.finish_search(request, search, None)
            if not request.params.ranked:
                news = [s for s in request.sequences if s.has_news]
                chunks += [(request.request_id, stream_chunk(s, self._token_text)) for s in news]
            for sequence in request.sequences:
                if sequence.finish_reason is not None and sequence.status in (
                    SequenceStatus.WAITING,
                    SequenceStatus.RUNNING,
                ):
                    self._retire(sequence)
            if request.finished:
                finished.append(self._end(request, None))
                if request.params.ranked:
                    chunks += [(request.request_id, stream_chunk(s, self._token_text)) for s in request.sequences]
        return StepResult(chunks, finished)

    def _end(self, request: Request, reason: str | None) -> RequestOutput:
        """Takes a request out of the engine; sequences still running end for `reason`."""
        if request.beam_search is not None and not request.finished:
            self._decoding.finish_search(request, request.beam_search, reason)
        for sequence in request.sequences:
            if sequence.status in (SequenceStatus.WAITING, SequenceStatus.RUNNING):
                if sequence.finish_reason is None:
                    sequence.finish_reason = reason
                    sequence.text.finish()
                self._retire(sequence)
        if request.params.best_of is not None:
            self._decoding.choose_best(request)
        del self.requests[request.request_id]
        request.resume_from = None  # else a kept sequence would hold all that it was continued from
        return request_output(request, self._token_text)

    def _retire(self, sequence: Sequence) -> None:
        """Takes a sequence that has ended out of the schedule."""
        request = sequence.request
        if request.keep and sequence.index == 0 and sequence.finish_reason not in ("abort", "error"):
            self.scheduler.park(sequence)
            self._kept[request.request_id] = sequence
        else:
            self.scheduler.finish(sequence)


def _logits_positions(sequence: Sequence, start: int, end: int) -> range:
    """The positions in [start, end) whose logits are wanted: all that are still to be reported, or the last."""
    request = sequence.request
    if request.task is Task.LOGITS:
        return range(max(start, request.num_rows), end)
    samples = request.task is Task.GENERATE and end == sequence.num_tokens
    if request.num_reported is not None and request.task is not Task.EMBED:
        first, last_reported = max(start, request.num_reported), sequence.num_prompt_tokens - 1
        if first < last_reported:
            return range(first, end if samples else min(end, last_reported))
    return range(end - 1, end) if samples else range(0)
