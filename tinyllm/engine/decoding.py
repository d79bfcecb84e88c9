"""What becomes of a row of logits: a sampled token, forks, beams; and when a sequence ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends.base import F32Array
from tinyllm.engine.beam_search import BeamSearch, Candidates, candidates, log_softmax
from tinyllm.engine.device_sampling import Draw, can_sample_on_device, check_token, draws_of
from tinyllm.engine.matcher import MakeMatcher, Matcher
from tinyllm.engine.scheduler import Scheduler
from tinyllm.engine.sequence import Request, Sequence, SequenceStatus, Task
from tinyllm.engine.text import TextDecoder, TextStream
from tinyllm.errors import InvalidRequestError
from tinyllm.sampling import SampledToken, TokenHistory, adjust, sample, token_logprobs
from tinyllm.sampling_params import SamplingParams

__all__ = ["Decoding"]


class Decoding:
    """Gives sequences their tokens, and forks them where one state goes on in several ways.

    Args:
        eos_token_ids: ids that end a sequence unless ignore_eos.
        make_decoder: makes an incremental decoder for a sequence, given skip_special_tokens; None without a tokenizer.
        make_matcher: makes what keeps a sequence to a structured output; None without a tokenizer.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        eos_token_ids: frozenset[int],
        make_decoder: Callable[[bool], TextDecoder] | None,
        make_matcher: MakeMatcher | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.eos_token_ids = eos_token_ids
        self.make_decoder = make_decoder
        self.make_matcher = make_matcher

    def first_sequence(self, request: Request) -> Sequence:
        """The sequence that a request begins with."""
        token_ids = request.prompt_token_ids
        sequence = self._sequence(request, token_ids.copy(), TokenHistory.of(token_ids))
        wanted = request.params.structured_output
        if wanted is not None and request.task is Task.GENERATE:
            assert self.make_matcher is not None
            sequence.matcher = self.make_matcher(wanted)
        return sequence

    def use_logits(self, sequence: Sequence, position: int, logits: F32Array) -> None:
        """logits (V,) say what follows the sequence's token at `position`."""
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
        elif position + 1 == sequence.num_tokens and sequence.finish_reason is None:  # else interrupted at its end
            try:
                if request.beam_search is None:
                    self._sample(sequence, logits)
                else:
                    self._search(sequence, request.beam_search, logits)
            except InvalidRequestError as error:
                request.error = str(error)
            if request.first_token_time is None:
                request.first_token_time = time.monotonic()

    def draws(self, sequence: Sequence, position: int, logits_row: int) -> list[Draw] | None:
        """The draws that a device may make from the logits at `position`, or None where the host must see them."""
        request = sequence.request
        samples = request.task is Task.GENERATE and position + 1 == sequence.num_tokens
        if not samples or request.beam_search is not None or sequence.finish_reason is not None:
            return None
        if not can_sample_on_device(request.params, banned_ids=self._banned_ids(sequence)):
            return None
        return draws_of(sequence, logits_row)

    def use_draws(self, sequence: Sequence, tokens: Seq[int]) -> None:
        """tokens: what a device drew, one for each of `draws`."""
        request = sequence.request
        try:
            for sibling, token in zip(self._siblings(sequence), tokens, strict=True):
                self._append_token(sibling, SampledToken(check_token(token), None))
        except InvalidRequestError as error:
            request.error = str(error)
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()

    # ---- sampling

    def _sample(self, sequence: Sequence, logits: F32Array) -> None:
        """Gives the sequence and its forks their next token."""
        params = sequence.request.params
        for sibling in self._siblings(sequence):
            sampled = sample(
                logits,
                params,
                token_ids=sibling.token_ids,
                history=sibling.history,
                fork_path=sibling.fork_path,
                banned_ids=self._banned_ids(sibling),
                allowed_ids=self._allowed_ids(sibling),
            )
            if params.ranked:
                sibling.score = (sibling.score or 0.0) + token_logprobs(logits, sampled.token_id, 0)[0].logprob
            self._append_token(sibling, sampled)

    def _siblings(self, sequence: Sequence) -> list[Sequence]:
        """The sequence, and at the first token of a request its other sequences, which fork off here."""
        request = sequence.request
        if request.forked:
            return [sequence]
        request.forked = True
        return [sequence, *(self._fork(sequence) for _ in range(1, request.params.num_sequences))]

    def _append_token(self, sequence: Sequence, sampled: SampledToken) -> None:
        params, token = sequence.request.params, sampled.token_id
        sequence.token_ids.append(token)
        sequence.history.append(token)
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        num_output_tokens = sequence.num_output_tokens
        is_eos = token in self.eos_token_ids and not params.ignore_eos
        if is_eos or token in params.stop_token_ids:
            sequence.finish_reason = "stop"
            sequence.stop_reason = None if is_eos else token
        elif sequence.text.push(token, may_stop=num_output_tokens >= params.min_tokens):
            sequence.finish_reason, sequence.stop_reason = "stop", sequence.text.stopped_by
        elif sequence.matcher is not None and self._followed(sequence, sequence.matcher).finished:
            if num_output_tokens < params.min_tokens:
                raise InvalidRequestError(
                    f"the structured output is complete after {num_output_tokens} tokens, and min_tokens is "
                    f"{params.min_tokens}"
                )
            sequence.finish_reason = "stop"
        elif num_output_tokens >= params.max_tokens or sequence.num_tokens >= sequence.request.max_len:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            sequence.text.finish()
            sequence.matcher = None

    def _allowed_ids(self, sequence: Sequence) -> NDArray[np.intp] | None:
        """What a structured output leaves; end tokens among it where the text may end. None without one."""
        if sequence.matcher is None:
            return None
        params = sequence.request.params
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)}
        return self._followed(sequence, sequence.matcher).allowed_ids(sorted(ends))

    @staticmethod
    def _followed(sequence: Sequence, matcher: Matcher) -> Matcher:
        """The matcher, at the sequence's last token."""
        for token in sequence.token_ids[sequence.num_prompt_tokens + matcher.num_tokens :]:
            matcher.advance(token)
        return matcher

    def _banned_ids(self, sequence: Sequence) -> list[int]:
        """End tokens that would come before min_tokens."""
        params = sequence.request.params
        if params.min_tokens == 0 or sequence.num_output_tokens >= params.min_tokens:
            return []
        return sorted({*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)})

    def choose_best(self, request: Request) -> None:
        """Leaves a finished best_of request the n sequences with the highest log-probability per token."""

        def score(sequence: Sequence) -> float:
            return (sequence.score or 0.0) / max(1, sequence.num_output_tokens)

        best = sorted(request.sequences, key=lambda s: (-score(s), s.index))[: request.params.n]
        for rank, sequence in enumerate(best):
            sequence.score, sequence.index = score(sequence), rank
        request.sequences = best

    # ---- beam search

    def _search(self, sequence: Sequence, search: BeamSearch, logits: F32Array) -> None:
        """Notes what may follow this beam; once all beams have theirs, moves the search one token on."""
        request = sequence.request
        logprobs = adjust(
            log_softmax(logits), request.params, sequence.token_ids, sequence.history, self._banned_ids(sequence)
        )
        sequence.candidates = self._candidates(sequence, search, logprobs)
        live = request.sequences
        rows = [beam.candidates for beam in live if beam.candidates is not None]
        if len(rows) < len(live):
            return
        request.forked = True
        steps = search.advance(rows)
        for beam in live:
            beam.candidates = None
        heirs: dict[int, Sequence] = {}  # the first beam to continue a parent takes its place
        beams: list[Sequence] = []
        for step in steps:
            parent = live[step.parent]
            beams.append(self._fork(parent) if step.parent in heirs else heirs.setdefault(step.parent, parent))
        for beam, step in zip(beams, steps, strict=True):
            beam.token_ids.append(step.token_id)
            beam.history.append(step.token_id)
        for index, beam in enumerate(live):
            if index not in heirs:
                self.scheduler.finish(beam)
        request.sequences = beams

    def _candidates(self, beam: Sequence, search: BeamSearch, logprobs: F32Array) -> Candidates:
        """What may follow a beam; under a structured output, also which of it completes the text."""
        allowed = self._allowed_ids(beam)
        if allowed is None:
            return candidates(logprobs, search.num_candidates)
        assert beam.matcher is not None
        left = np.full_like(logprobs, -np.inf)
        left[allowed] = logprobs[allowed]
        found = candidates(left, search.num_candidates)
        completing = set()
        for token in found.token_ids.tolist():
            if not search.is_end_token(token):
                after = beam.matcher.copy()
                after.advance(token)
                if after.finished:
                    completing.add(token)
        if completing and beam.num_output_tokens + 1 < beam.request.params.min_tokens:
            kept = ~np.isin(found.token_ids, list(completing))
            return Candidates(found.token_ids[kept], found.logprobs[kept])
        return found._replace(completing=frozenset(completing))

    def finish_search(self, request: Request, search: BeamSearch, reason: str | None) -> None:
        """Replaces the beams by the n best hypotheses; those still growing end for `reason`."""
        for beam in request.sequences:
            self.scheduler.finish(beam)
        hypotheses = search.best(request.params.n)
        if not hypotheses:  # nothing was generated yet
            request.sequences[0].finish_reason = reason
            return
        request.sequences = []
        for hypothesis in hypotheses:
            tokens = request.prompt_token_ids + hypothesis.token_ids
            sequence = self._sequence(request, tokens, TokenHistory.of(()), len(request.sequences))
            ended = hypothesis.finish_reason == "stop" and search.is_end_token(hypothesis.token_ids[-1])
            for token in hypothesis.token_ids[: -1 if ended else None]:
                sequence.text.push(token)
            sequence.text.finish()
            sequence.score = hypothesis.score
            sequence.finish_reason, sequence.stop_reason = hypothesis.finish_reason or reason, hypothesis.stop_reason
            sequence.status = SequenceStatus.FINISHED
            request.sequences.append(sequence)

    # ---- sequences

    def _sequence(self, request: Request, token_ids: list[int], history: TokenHistory, index: int = 0) -> Sequence:
        return Sequence(request, index, token_ids, self._text_stream(request.params), history)

    def _fork(self, parent: Sequence) -> Sequence:
        """A sequence in the parent's state, on the parent's blocks."""
        request = parent.request
        request.num_forks += 1
        child = self._sequence(request, parent.token_ids.copy(), parent.history.copy(), request.num_forks)
        if parent.matcher is not None:
            child.matcher = parent.matcher.copy()
        self.scheduler.add_fork(parent, child)
        if request.beam_search is None:
            request.sequences.append(child)
        return child

    def _text_stream(self, params: SamplingParams) -> TextStream:
        decoder = None if self.make_decoder is None else self.make_decoder(params.skip_special_tokens)
        return TextStream(decoder, tuple(params.stop), include_stop=params.include_stop_str_in_output)
