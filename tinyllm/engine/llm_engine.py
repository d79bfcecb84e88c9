"""The step loop: requests in, one batch of tokens a step, outputs out. Single-threaded; abort and add between steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass

import numpy as np

from tinyllm.backends.base import F32Array, KVCacheSpec
from tinyllm.config import EngineConfig
from tinyllm.engine.batch import build_batch
from tinyllm.engine.block_manager import BlockManager
from tinyllm.engine.kv_cache import max_logits_rows, max_sequence_len
from tinyllm.engine.model_runner import ModelRunner
from tinyllm.engine.output import request_output, stream_chunk
from tinyllm.engine.scheduler import ScheduledSequence, Scheduler
from tinyllm.engine.sequence import Request, Sequence, SequenceStatus, Task
from tinyllm.engine.text import TextDecoder, TextStream
from tinyllm.errors import InvalidRequestError
from tinyllm.models.model import Model
from tinyllm.outputs import RequestOutput, StreamChunk
from tinyllm.sampling import SamplingParams, TokenHistory, sample, token_logprobs
from tinyllm.sampling_params import as_int

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
    ) -> None:
        self.config = config
        self.model_config = model.config
        self.block_manager = BlockManager(spec.num_blocks, spec.block_size)
        self.scheduler = Scheduler(
            self.block_manager, max_batch_tokens=config.max_batch_tokens, max_num_seqs=config.max_num_seqs
        )
        self.runner = ModelRunner(
            model, spec, max_batch_tokens=config.max_batch_tokens, max_logits_rows=max_logits_rows(config)
        )
        self.max_model_len = max_sequence_len(model.config, config)
        self.cache_tokens = spec.num_blocks * spec.block_size
        self.requests: dict[str, Request] = {}
        self.num_steps = 0
        self._eos_token_ids = frozenset(eos_token_ids)
        self._make_decoder = make_decoder
        self._token_text = token_text
        self._num_requests = 0

    # ---- requests

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        task: Task = Task.GENERATE,
    ) -> None:
        """Validates a request and puts it in the queue.

        Raises:
            InvalidRequestError: naming what is wrong; the engine and its other requests are as before.
        """
        token_ids = self.check_request(prompt_token_ids, params, task)
        if request_id in self.requests:
            raise InvalidRequestError(f"a request named {request_id!r} is already running")
        self._num_requests += 1
        request = Request(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=token_ids,
            params=params,
            task=task,
            arrival=self._num_requests,
            arrival_time=time.monotonic(),
            max_len=min(self.max_model_len, self.cache_tokens),
        )
        if task in (Task.LOGITS, Task.EMBED):
            width = self.model_config.vocab_size if task is Task.LOGITS else self.model_config.hidden_size
            try:
                request.rows = np.empty((len(token_ids), width), np.float32)
            except MemoryError:
                raise InvalidRequestError(
                    f"no memory for {len(token_ids)} x {width} results; use a shorter prompt"
                ) from None
        sequence = Sequence(request, 0, token_ids.copy(), self._text_stream(params), TokenHistory.of(token_ids))
        request.sequences.append(sequence)
        self.requests[request_id] = request
        self.scheduler.add(sequence)

    def check_request(
        self, prompt_token_ids: Seq[int], params: SamplingParams, task: Task = Task.GENERATE
    ) -> list[int]:
        """The prompt as plain ints, if the request can be served. Raises InvalidRequestError otherwise."""
        last = self.model_config.vocab_size - 1
        token_ids = list(prompt_token_ids)
        if not token_ids:
            raise InvalidRequestError("the prompt is empty")
        if set(map(type, token_ids)) != {int} or min(token_ids) < 0 or max(token_ids) > last:
            token_ids = [as_int(token, "a prompt token id", 0, last) for token in token_ids]
        room = 1 if task is Task.GENERATE else 0
        for limit, what in ((self.max_model_len, "the model's context"), (self.cache_tokens, "the whole KV cache")):
            if len(token_ids) + room > limit:
                raise InvalidRequestError(
                    f"the prompt has {len(token_ids)} tokens{' and needs room for one more' if room else ''}; "
                    f"{what} holds {limit}"
                )
        params.check_vocabulary(self.model_config.vocab_size)
        if params.n > self.config.max_num_seqs:
            raise InvalidRequestError(f"n is {params.n}, but at most {self.config.max_num_seqs} sequences may run")
        if params.stop and self._make_decoder is None:
            raise InvalidRequestError("stop strings need a tokenizer, and this model has none")
        return token_ids

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request now and frees its blocks; None if there is no such request."""
        request = self.requests.get(request_id)
        return None if request is None else self._end(request, "abort")

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    # ---- the step

    def step(self) -> StepResult:
        """Runs one batch: some tokens of every sequence that the budget reaches."""
        output = self.scheduler.schedule()
        if not output.scheduled:
            assert not self.requests, "requests are waiting, but nothing can run"
            return StepResult([], [])
        batch = build_batch(output.scheduled, self.block_manager.block_size)
        hidden = self.runner.forward(batch, output.copies)
        self._collect_rows(output.scheduled, hidden)
        result = self._finish_step([item.sequence for item in output.scheduled])
        self.num_steps += 1
        if self.config.debug_checks:
            self.block_manager.check(s for request in self.requests.values() for s in request.sequences)
        return result

    def _collect_rows(self, scheduled: Seq[ScheduledSequence], hidden: F32Array) -> None:
        """Takes what each sequence needs from the step's hidden states (T, M), and advances the sequences."""
        wanted: list[tuple[Sequence, int]] = []  # (sequence, position) of each row that goes through the LM head
        rows: list[int] = []
        end = 0
        for item in scheduled:
            sequence, request = item.sequence, item.sequence.request
            start, first_row = sequence.num_computed_tokens, end
            end += item.num_tokens
            for position in self._logits_positions(sequence, start, start + item.num_tokens):
                wanted.append((sequence, position))
                rows.append(first_row + position - start)
            if request.task is Task.EMBED and request.rows is not None:
                new = max(start, request.num_rows)
                request.rows[new : start + item.num_tokens] = hidden[first_row + new - start : end]
                request.num_rows = max(request.num_rows, start + item.num_tokens)
            sequence.num_computed_tokens += item.num_tokens
        for (sequence, position), logits in zip(wanted, self.runner.logits(hidden, rows), strict=True):
            self._use_logits(sequence, position, logits)

    def _logits_positions(self, sequence: Sequence, start: int, end: int) -> range:
        """The positions in [start, end) whose logits are wanted: all that are still to be reported, or the last."""
        request = sequence.request
        if request.task is Task.LOGITS:
            return range(max(start, request.num_rows), end)
        if request.task is Task.EMBED:
            return range(0)
        samples = request.task is Task.GENERATE and end == sequence.num_tokens
        if request.task is Task.SCORE or request.params.prompt_logprobs is not None:
            reported = len(request.prompt_logprobs)
            first = max(start, reported)
            last_reported = sequence.num_prompt_tokens - 1
            if first < last_reported:
                return range(first, end if samples else min(end, last_reported))
        return range(end - 1, end) if samples else range(0)

    def _use_logits(self, sequence: Sequence, position: int, logits: F32Array) -> None:
        """logits (V,) say what follows the token at `position`."""
        request = sequence.request
        if request.task is Task.LOGITS:
            assert request.rows is not None
            assert request.num_rows == position
            request.rows[position] = logits
            request.num_rows += 1
        elif position + 1 < sequence.num_prompt_tokens:
            if position == len(request.prompt_logprobs):
                num_top = request.params.prompt_logprobs or 0
                token = request.prompt_token_ids[position + 1]
                request.prompt_logprobs.append(token_logprobs(logits, token, num_top))
        elif position + 1 == sequence.num_tokens:
            self._sample(sequence, logits)

    def _sample(self, sequence: Sequence, logits: F32Array) -> None:
        """Gives the sequence its next token; the first one of a request forks its other sequences off."""
        request = sequence.request
        siblings = [sequence]
        if not request.forked:
            request.forked = True
            for index in range(1, request.params.n):
                child = Sequence(
                    request,
                    index,
                    sequence.token_ids.copy(),
                    self._text_stream(request.params),
                    sequence.history.copy(),
                )
                self.scheduler.add_fork(sequence, child)
                request.sequences.append(child)
                siblings.append(child)
        try:
            for sibling in siblings:
                self._append_token(sibling, logits)
        except InvalidRequestError as error:
            request.error = str(error)
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()

    def _append_token(self, sequence: Sequence, logits: F32Array) -> None:
        params = sequence.request.params
        too_early = sequence.num_output_tokens < params.min_tokens
        eos = frozenset() if params.ignore_eos else self._eos_token_ids
        sampled = sample(
            logits,
            params,
            token_ids=sequence.token_ids,
            history=sequence.history,
            fork_path=sequence.fork_path,
            banned_ids=sorted(eos.union(params.stop_token_ids)) if too_early else (),
        )
        token = sampled.token_id
        sequence.token_ids.append(token)
        sequence.history.append(token)
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        if token in eos or token in params.stop_token_ids:
            sequence.finish_reason = "stop"
            sequence.stop_reason = None if token in eos else token
        elif sequence.text.push(token, may_stop=sequence.num_output_tokens >= params.min_tokens):
            sequence.finish_reason, sequence.stop_reason = "stop", sequence.text.stopped_by
        elif sequence.num_output_tokens >= params.max_tokens or sequence.num_tokens >= sequence.request.max_len:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            sequence.text.finish()

    def _finish_step(self, stepped: Seq[Sequence]) -> StepResult:
        """Streams new text, and ends what is complete or has failed."""
        chunks: list[tuple[str, StreamChunk]] = []
        finished: list[RequestOutput] = []
        for request in dict.fromkeys(sequence.request for sequence in stepped):
            if request.error is not None:
                for sequence in request.sequences:
                    if sequence.finish_reason is None:
                        sequence.finish_reason = "error"
            elif request.task is not Task.GENERATE:
                if request.sequences[0].num_due_tokens == 0:
                    finished.append(self._end(request, None))
                continue
            for sequence in request.sequences:
                if sequence.status is SequenceStatus.FINISHED:
                    continue
                if sequence.num_streamed_tokens < sequence.num_output_tokens or sequence.finish_reason == "error":
                    chunks.append((request.request_id, stream_chunk(sequence)))
                if sequence.finish_reason is not None:
                    self.scheduler.finish(sequence)
            if request.finished:
                finished.append(self._end(request, None))
        return StepResult(chunks, finished)

    def _end(self, request: Request, reason: str | None) -> RequestOutput:
        """Takes a request out of the engine; sequences still running end for `reason`."""
        for sequence in request.sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                if sequence.finish_reason is None:
                    sequence.finish_reason = reason
                    sequence.text.finish()
                self.scheduler.finish(sequence)
        del self.requests[request.request_id]
        return request_output(request, self._token_text)

    def _text_stream(self, params: SamplingParams) -> TextStream:
        decoder = None if self._make_decoder is None else self._make_decoder(params.skip_special_tokens)
        return TextStream(decoder, tuple(params.stop), include_stop=params.include_stop_str_in_output)
