"""What the handlers share: the model, the engine's thread, and threads for work that would hold up the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tinyllm.engine.sequence import Task
from tinyllm.llm import LLM, Prompt
from tinyllm.sampling_params import SamplingParams
from tinyllm.server.config import ServerConfig
from tinyllm.server.engine_thread import EngineThread
from tinyllm.server.errors import ApiError, invalid
from tinyllm.server.live import LiveFeed, ModelFacts
from tinyllm.server.metrics import Metrics
from tinyllm.server.submission import Job, Submission

__all__ = ["Service"]

T = TypeVar("T")


class Service:
    """One model, served.

    Attributes:
        feed: tells viewers what the engine does.
        created: when the server began, in seconds since the epoch.
        fingerprint: names model, device and version by what they compute: where it is equal, so are all bits.
    """

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        self.metrics = Metrics(config.model_name)
        self.engine = EngineThread(llm, max_waiting=config.max_waiting, observer=self.metrics)
        facts = ModelFacts.of(llm, config.model_name)
        self.feed = LiveFeed(llm.engine, facts, is_paused=lambda: self.engine.paused)
        self.created = int(time.time())
        self.fingerprint = llm.engine.fingerprint
        self.metrics.watch(
            llm.engine,
            waiting=lambda: self.engine.num_waiting,
            running=lambda: self.engine.num_running,
        )
        self._text = ThreadPoolExecutor(2, thread_name_prefix="text")
        self._grammars = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def start(self) -> None:
        self.engine.start()

    def stop(self) -> None:
        """Ends all threads."""
        self.engine.stop()
        self._text.shutdown(cancel_futures=True)
        self._grammars.shutdown(wait=False, cancel_futures=True)

    # ---- from a body to jobs

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 unless `name`, where given, is the model's."""
        if name is not None and name != self.config.model_name:
            raise ApiError(
                404,
                f"there is no model {name[:80]!r} here; this server has {self.config.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def prompts(self, value: Any, name: str) -> list[Prompt]:
        """The prompts of a body, which may be one or many. Raises ApiError."""
        if isinstance(value, str):
            return [value]
        if not value:
            raise invalid(f"{name} is empty", name)
        if isinstance(value[0], int):
            return [value]
        if len(value) > self.config.max_prompts:
            raise invalid(f"{name} has {len(value)} prompts; this server takes {self.config.max_prompts}", name)
        return list(value)

    async def in_background(self, action: Callable[..., T], *arguments: Any) -> T:
        """Runs work on text on a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._text, action, *arguments)

    async def jobs(
        self, prompts: Sequence[Prompt], params: SamplingParams, task: Task = Task.GENERATE, name: str = "prompt"
    ) -> list[Job]:
        """Jobs that the engine will take. Raises ApiError or InvalidRequestError."""
        await self._compile(params)
        return await self.in_background(lambda: [self._job(prompt, params, task, name) for prompt in prompts])

    def _job(self, prompt: Prompt, params: SamplingParams, task: Task, name: str) -> Job:
        windowed = params.window is not None
        token_ids = self.llm.encode(prompt, windowed=windowed)
        limit = self.config.max_prompt_tokens
        if limit is not None and len(token_ids) > limit:
            raise invalid(f"the prompt has {len(token_ids)} tokens; this server takes {limit}", name)
        token_ids = self.llm.engine.check_request(token_ids, params, task)
        return Job(token_ids, params, task, prompt if isinstance(prompt, str) else None)

    async def _compile(self, params: SamplingParams) -> None:
        """Compiles the grammar of a structured output, away from the engine's thread, in bounded time."""
        if params.structured_output is None:
            return
        compiling = asyncio.get_running_loop().run_in_executor(
            self._grammars, self.llm.compile_structured_output, params.structured_output
        )
        try:
            await asyncio.wait_for(asyncio.shield(compiling), self.config.compile_seconds)
        except asyncio.TimeoutError:
            compiling.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else asks for it
            raise invalid(
                f"the {params.structured_output.kind} took more than {self.config.compile_seconds:g} s to compile"
            ) from None

    def submit(self, jobs: list[Job]) -> Submission:
        """Puts jobs in the engine's queue. Raises ApiError where it is full."""
        return self.engine.submit(jobs)
