"""Which requests can be served, and what each of them will be allowed: decided before anything starts."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

import numpy as np

from tinyllm.config import EngineConfig, ModelConfig
from tinyllm.engine.beam_search import BeamSearch
from tinyllm.engine.kv_cache import max_sequence_len
from tinyllm.engine.matcher import MakeMatcher
from tinyllm.engine.prefix_hash import root_hash
from tinyllm.engine.scheduler import max_windowed_chunk
from tinyllm.engine.sequence import Request, Sequence, Task
from tinyllm.errors import InvalidRequestError
from tinyllm.sampling_params import SamplingParams, as_int

__all__ = ["Admission"]

MAX_POSITION = (1 << 31) - 1  # positions and slots are 32-bit numbers


class Admission:
    """Checks requests against a model and a cache of num_blocks blocks, and makes them."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        *,
        num_blocks: int,
        eos_token_ids: frozenset[int],
        has_tokenizer: bool,
        make_matcher: MakeMatcher | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.num_blocks = num_blocks
        self.cache_tokens = num_blocks * config.block_size
        self.max_model_len = max_sequence_len(model, config)
        self._eos_token_ids = eos_token_ids
        self._has_tokenizer = has_tokenizer
        self._make_matcher = make_matcher
        self._num_requests = 0

    def check(self, prompt_token_ids: Seq[int], params: SamplingParams, task: Task) -> list[int]:
        """The prompt as plain ints, if the request can be served. Raises InvalidRequestError otherwise."""
        last = self.model.vocab_size - 1
        token_ids = list(prompt_token_ids)
        if not token_ids:
            raise InvalidRequestError("the prompt is empty")
        if set(map(type, token_ids)) != {int} or min(token_ids) < 0 or max(token_ids) > last:
            token_ids = [as_int(token, "a prompt token id", 0, last) for token in token_ids]
        self._check_window(params)
        room = 1 if task is Task.GENERATE else 0
        for limit, what in self._limits(params):
            if len(token_ids) + room > limit:
                raise InvalidRequestError(
                    f"the prompt has {len(token_ids)} tokens{' and needs room for one more' if room else ''}; "
                    f"{what} holds {limit}"
                )
        params.check_vocabulary(self.model.vocab_size)
        if params.num_sequences > self.config.max_num_seqs:
            name = "beams" if params.beams else "best_of" if params.best_of else "n"
            raise InvalidRequestError(
                f"{name} is {params.num_sequences}, but at most {self.config.max_num_seqs} sequences may run"
            )
        if params.stop and not self._has_tokenizer:
            raise InvalidRequestError("stop strings need a tokenizer, and this model has none")
        self._beam_search(len(token_ids), params)
        if params.structured_output is not None and task is Task.GENERATE:
            if self._make_matcher is None:
                raise InvalidRequestError("structured output needs a tokenizer, and this model has none")
            self._make_matcher(params.structured_output)  # compiles it
        return token_ids

    def request(
        self,
        request_id: str,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        *,
        prompt: str | None,
        task: Task,
        resume_from: Sequence | None,
        keep: bool,
    ) -> Request:
        """A request that passed the checks, without its sequences. Raises InvalidRequestError."""
        token_ids = self.check(prompt_token_ids, params, task)
        window = self._window(params)
        self._num_requests += 1
        request = Request(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=token_ids,
            params=params,
            task=task,
            arrival=self._num_requests,
            arrival_time=time.monotonic(),
            max_len=self._max_len(params),
            window=window,
            sinks=0 if params.window is None else params.sinks,
            prefix_root=prefix_root(params),
            resume_from=resume_from,
            keep=keep,
            beam_search=self._beam_search(len(token_ids), params) if task is Task.GENERATE else None,
        )
        if task in (Task.LOGITS, Task.EMBED):
            width = self.model.vocab_size if task is Task.LOGITS else self.model.hidden_size
            try:
                request.rows = np.empty((len(token_ids), width), np.float32)
            except MemoryError:
                raise InvalidRequestError(
                    f"no memory for {len(token_ids)} x {width} results; use a shorter prompt"
                ) from None
        return request

    def _limits(self, params: SamplingParams) -> list[tuple[int, str]]:
        """How long a sequence may get, and what says so."""
        if params.window is not None:
            return [(MAX_POSITION, "a 32-bit position")]
        return [(self.max_model_len, "the model's context"), (self.cache_tokens, "the whole KV cache")]

    def _max_len(self, params: SamplingParams) -> int:
        return min(limit for limit, _ in self._limits(params))

    def _window(self, params: SamplingParams) -> int | None:
        """How far back the layer looks that looks farthest, in tokens; None if without limit."""
        windows = []
        for layer in range(self.model.num_layers):
            own = self.model.window_of_layer(layer)
            if params.window is not None:
                windows.append(params.window if own is None else min(own, params.window))
            elif own is None:
                return None
            else:
                windows.append(own)
        return max(windows)

    def _check_window(self, params: SamplingParams) -> None:
        if params.window is None:
            return
        if self.model.rope is None:
            raise InvalidRequestError("a window needs rotary positions; this model's are learned, and end")
        span = params.sinks + params.window
        if span > self.max_model_len:
            raise InvalidRequestError(
                f"sinks and window span {span} tokens; the model's context holds {self.max_model_len}"
            )
        if max_windowed_chunk(params.window, params.sinks, self.num_blocks, self.config.block_size) < 1:
            raise InvalidRequestError(
                f"sinks and window span {span} tokens; with the room they need around them, that is more than "
                f"the whole KV cache of {self.cache_tokens}"
            )

    def _beam_search(self, prompt_len: int, params: SamplingParams) -> BeamSearch | None:
        if params.beams is None:
            return None
        return BeamSearch(
            params.beams,
            max_new_tokens=min(params.max_tokens, self._max_len(params) - prompt_len),
            eos_token_ids=() if params.ignore_eos else self._eos_token_ids,
            stop_token_ids=params.stop_token_ids,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
        )


def prefix_root(params: SamplingParams) -> bytes:
    """Where the block hashes of a request begin: keys and values depend on the window, and salts keep tenants apart."""
    return root_hash(params.cache_salt, params.window, None if params.window is None else params.sinks)
