"""LLM: text or token ids in, text and numpy arrays out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tinyllm.backends import backend_for
from tinyllm.config import EngineConfig
from tinyllm.embedding import mean_embeddings
from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.request_loop import RequestLoop
from tinyllm.engine.sequence import Task
from tinyllm.engine.snapshot import Snapshot
from tinyllm.engine.text import TextDecoder
from tinyllm.errors import InvalidRequestError, ModelFileError, SnapshotError
from tinyllm.guidance.compiler import GuidanceCompiler
from tinyllm.hub import resolve
from tinyllm.models.registry import load_model, model_config
from tinyllm.outputs import RequestOutput, ScoreOutput, StreamChunk
from tinyllm.plan import plan_memory
from tinyllm.recording.recorder import Recorder
from tinyllm.sampling_params import SamplingParams
from tinyllm.session import Session
from tinyllm.snapshot_file import check_snapshot, load_snapshot
from tinyllm.structured_output import StructuredOutput
from tinyllm.tokenizer import Tokenizer
from weights import Checkpoint, WeightsError, open_checkpoint

__all__ = ["LLM", "Messages", "Prompt"]

Prompt = str | Sequence[int] | NDArray[np.integer]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model, loaded and ready.

    Args:
        model: a registered name, a `.gguf` file, a Hugging Face folder, or a hub id "org/name".
        on_event: receives one-line notices, such as that kernels are being compiled; they are dropped by default.
        record: a file to record every step in; see tinyllm.recording.events.
        **engine_options: the fields of EngineConfig: max_batch_tokens, block_size, num_blocks, kv_dtype, device, ...

    Attributes:
        config: the model's shape (ModelConfig).
        engine_config: how it runs (EngineConfig).
        tokenizer: None if the model has none; it then serves token ids only.
        memory: what the weights, the KV cache and the workspace take, in bytes (MemoryPlan).
        recorder: what writes the recording (Recorder), or None.

    Raises:
        ModelNotFoundError, DownloadError: there is no such model, or it cannot be fetched.
        ModelFileError, ConfigError, TokenizerError: its files are damaged or not supported.
        DeviceError: the device is unknown or absent.
        RecordingError: the recording cannot be written.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        on_event: Callable[[str], None] | None = None,
        record: str | Path | None = None,
        **engine_options: Any,
    ) -> None:
        self.engine_config = EngineConfig.from_options(engine_options)
        self.recorder = None if record is None else Recorder(record, on_error=on_event)
        backend = backend_for(self.engine_config, on_event=on_event)
        checkpoint = open_model(model)
        try:
            self.config = model_config(checkpoint)
            with ThreadPoolExecutor(max_workers=1) as pool:  # while the weights are packed
                tokenizer_loading = pool.submit(load_tokenizer, checkpoint, self.config.vocab_size)
                self.memory = plan_memory(checkpoint, self.config, self.engine_config, backend)
                loaded = load_model(checkpoint, self.config, backend)
                self.tokenizer = tokenizer_loading.result()
        except WeightsError as error:
            raise ModelFileError(str(error)) from error
        finally:
            checkpoint.close()
        tokenizer = self.tokenizer
        known_ends = {*self.config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
        eos = sorted(token for token in known_ends if token < self.config.vocab_size)
        self._guidance = None if tokenizer is None else GuidanceCompiler(tokenizer, self.config.vocab_size, eos)
        self.engine = LLMEngine(
            loaded,
            self.engine_config,
            self.memory.kv_cache_spec,
            eos_token_ids=eos,
            make_decoder=None if tokenizer is None else _decoder_factory(tokenizer),
            token_text=None if tokenizer is None else tokenizer.token_text,
            make_matcher=None if self._guidance is None else self._guidance.matcher,
        )
        self._loop = RequestLoop(self.engine)
        if self.recorder is not None:
            self.recorder.attach(self.engine, model)

    # ---- generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_finish: Callable[[int, RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt, all of them together in one batch.

        Args:
            prompts: one prompt or a list of them; a prompt is a string, or the token ids themselves.
            sampling_params: one for all, or one for each.
            on_finish: called with a prompt's index and its output as it becomes ready, in whatever order they do.

        Returns:
            One RequestOutput a prompt, in the order of the prompts.

        Raises:
            InvalidRequestError: some prompt or parameter cannot be served; it is named, and nothing was started.
        """
        items = _as_prompts(prompts)
        params = _as_params(sampling_params, len(items))
        return self._run(items, params, Task.GENERATE, on_finish)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Continues one prompt, yielding text as it is made; with n > 1 the continuations' chunks interleave.

        Leaving the iterator early aborts the request. Raises InvalidRequestError, at once or when a processor fails.
        """
        params = sampling_params or SamplingParams()
        token_ids = self.engine.check_request(self.encode(prompt, windowed=params.window is not None), params)
        return self._chunks(prompt, token_ids, params)

    def chat(self, messages: Messages, sampling_params: SamplingParams | None = None) -> RequestOutput:
        """Answers a conversation: a list of {"role": ..., "content": ...}, put in words by the model's template."""
        return self.generate([self.encode_chat(messages)], sampling_params)[0]

    def stream_chat(self, messages: Messages, sampling_params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """The same, yielding text as it is made."""
        return self.stream(self.encode_chat(messages), sampling_params)

    def compile_structured_output(self, structured_output: StructuredOutput) -> None:
        """Compiles ahead what a request will ask for, so that its start waits for nothing.

        A request does it by itself, in the middle of everyone's steps. This may be called from any thread while
        another generates. A text is compiled in a process of its own first, which takes 0.1 s: one that would take
        seconds, gigabytes or a crash is refused. What was compiled last is kept.

        Raises:
            InvalidRequestError: it is malformed, asks for what is not supported, is too complex, or llguidance is not
                installed.
        """
        if self._guidance is None:
            raise InvalidRequestError("structured output needs a tokenizer, and this model has none")
        self._guidance.matcher(structured_output)

    # ---- sessions

    def session(
        self, prompt: Prompt = "", *, window: int | None = None, sinks: int = 4, cache_salt: str = ""
    ) -> Session:
        """A sequence that stays in the KV cache between calls, to be continued, forked, saved; it begins with `prompt`.

        Args:
            window, sinks, cache_salt: see SamplingParams; they are those of every request of the session.

        Raises:
            InvalidRequestError: the prompt or a setting cannot be served.
        """
        settings = SamplingParams(window=window, sinks=sinks, cache_salt=cache_salt)
        self.engine.check_request([0], settings, Task.PREFILL)
        session = Session(self, self._loop, settings)
        session.append(prompt)
        return session

    def restore(self, source: Snapshot | str | Path) -> Session:
        """A session from a snapshot or the file of one; it continues bit for bit where the first one stood.

        Raises:
            SnapshotError: it is damaged, or of another model, device, version or kv_dtype; nothing has changed.
        """
        if isinstance(source, Snapshot):
            snapshot, where = source, ""
            check_snapshot(snapshot)
        elif isinstance(source, (str, Path)):
            snapshot, where = load_snapshot(source), f"{source}: "
        else:
            raise InvalidRequestError(f"restore takes a snapshot or a path, not a {type(source).__name__}")
        try:
            with self._loop.turn() as engine:
                parked = engine.restore(snapshot)
        except (SnapshotError, InvalidRequestError) as error:
            raise SnapshotError(f"{where}{error}") from None
        return Session(self, self._loop, parked.request.params, parked)

    # ---- numbers

    def score(self, prompt: Prompt) -> ScoreOutput:
        """How likely a text of at least two tokens is: log-probabilities (T - 1,) in nats, and perplexity."""
        token_ids = self.encode(prompt)
        if len(token_ids) < 2:
            raise InvalidRequestError("a text to score needs at least two tokens")
        params = SamplingParams(prompt_logprobs=0)
        output = self._run([token_ids], [params], Task.SCORE)[0]
        assert output.prompt_logprobs is not None
        logprobs = np.array(
            [entry[token].logprob for token, entry in zip(token_ids, output.prompt_logprobs, strict=True) if entry],
            np.float64,
        )
        texts = None if self.tokenizer is None else [self.tokenizer.token_text(token) for token in token_ids]
        return ScoreOutput(token_ids, texts, logprobs.astype(np.float32), float(np.exp(-logprobs.mean())))

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """The logits (T, V) at each position of the prompt; row i is about the token after token i."""
        return self._rows([prompt], Task.LOGITS)[0]

    def embed(self, prompts: Prompt | Sequence[Prompt], *, normalize: bool = True) -> NDArray[np.float32]:
        """One vector a prompt (N, M): the mean of its final hidden states, of length 1 if `normalize`."""
        return mean_embeddings(self._rows(_as_prompts(prompts), Task.EMBED), normalize=normalize)

    # ---- text

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = True, windowed: bool = False) -> list[int]:
        """The token ids of a prompt; ids pass through unchecked. Raises InvalidRequestError.

        add_special_tokens: put bos (and eos) around a text where the model asks for them.
        windowed: the prompt is for a request with a window: it may be longer than the model's context.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError("this model has no tokenizer: pass token ids")
            max_tokens = None if windowed else self.memory.max_sequence_len
            return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens, max_tokens=max_tokens)
        if isinstance(prompt, np.ndarray):
            if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
                raise InvalidRequestError(f"token ids must be a 1-D integer array, not {prompt.dtype} {prompt.shape}")
            return prompt.tolist()
        if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
            return list(cast("Sequence[int]", prompt))
        raise InvalidRequestError(f"a prompt must be a string or a list of token ids, not {type(prompt).__name__}")

    def encode_chat(self, messages: Messages) -> list[int]:
        """The token ids of a conversation, up to where the model's answer begins. Raises InvalidRequestError."""
        if self.tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer, so it cannot chat")
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False, max_tokens=self.memory.max_sequence_len)

    # ---- the engine's loop

    def _add(self, prompt: Prompt, token_ids: list[int], params: SamplingParams, task: Task) -> str:
        """Starts a request for a prompt that was encoded already."""
        return self._loop.add(token_ids, params, task, prompt=prompt if isinstance(prompt, str) else None)

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        task: Task,
        on_finish: Callable[[int, RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Runs requests to their end; whatever interrupts them, none of them stays behind in the engine."""
        encoded: list[list[int]] = []
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            try:
                token_ids = self.encode(prompt, windowed=one.window is not None)
                encoded.append(self.engine.check_request(token_ids, one, task))
            except InvalidRequestError as error:
                raise InvalidRequestError(f"prompt {index}: {error}" if len(prompts) > 1 else str(error)) from None
        outputs: dict[str, RequestOutput] = {}
        ids: list[str] = []
        try:
            for prompt, token_ids, one in zip(prompts, encoded, params, strict=True):
                ids.append(self._add(prompt, token_ids, one, task))
            waiting = {request_id: index for index, request_id in enumerate(ids)}
            while waiting:
                self._loop.step()
                for request_id, index in list(waiting.items()):
                    output = next((o for o in self._loop.take(request_id) if isinstance(o, RequestOutput)), None)
                    if output is not None:
                        outputs[request_id] = output
                        del waiting[request_id]
                        if on_finish is not None:
                            on_finish(index, output)
        finally:
            for request_id in ids:
                self._loop.drop(request_id)
        return [outputs[request_id] for request_id in ids]

    def _chunks(self, prompt: Prompt, token_ids: list[int], params: SamplingParams) -> Iterator[StreamChunk]:
        request_id = self._add(prompt, token_ids, params, Task.GENERATE)
        try:
            yield from self._loop.follow(request_id)
        finally:
            self._loop.drop(request_id)

    def _rows(self, prompts: Sequence[Prompt], task: Task) -> list[NDArray[np.float32]]:
        outputs = self._run(prompts, [SamplingParams()] * len(prompts), task)
        return [output.rows for output in outputs if output.rows is not None]


def open_model(model: str | Path) -> Checkpoint:
    """Opens the files of a model named in any of the ways that LLM takes. Raises ModelFileError."""
    path = resolve(str(model))
    try:
        return open_checkpoint(path)
    except WeightsError as error:
        raise ModelFileError(str(error)) from error


def load_tokenizer(checkpoint: Checkpoint, vocab_size: int | None = None) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None if it has none; vocab_size is the model's. Raises TokenizerError."""
    if checkpoint.kind == "gguf":
        return Tokenizer.from_gguf(checkpoint.metadata)
    return Tokenizer.from_folder(checkpoint.path, vocab_size=vocab_size)


def _decoder_factory(tokenizer: Tokenizer) -> Callable[[bool], TextDecoder]:
    return lambda skip: tokenizer.stream_decoder(skip_special_tokens=skip, continuation=True)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or a list of them, as a list. A list whose first item is not a string or list is one prompt."""
    if isinstance(prompts, (str, np.ndarray)):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise InvalidRequestError(f"prompts must be a string or a list, not {type(prompts).__name__}")
    if len(prompts) and not isinstance(prompts[0], (str, Sequence, np.ndarray)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequestError(f"{len(params)} sampling parameters for {count} prompts")
    return list(params)
