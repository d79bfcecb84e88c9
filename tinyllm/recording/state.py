"""What an engine holds between two steps, as plain data and as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tinyllm.engine.llm_engine import LLMEngine
from tinyllm.engine.sequence import Sequence
from tinyllm.recording.events import Step

__all__ = ["engine_state", "state_lines"]


def engine_state(engine: LLMEngine, next_step: Step | None = None) -> dict[str, Any]:
    """Queue, running sequences, blocks, and the schedule that was recorded for the next step; all of it JSON has.

    Block tables name blocks; -1 stands where one was given back. ref_counts has one entry a block of the table.
    """
    manager = engine.block_manager
    blocks = range(manager.num_blocks)
    return {
        "steps": engine.num_steps,
        "waiting": [_sequence(engine, sequence) for sequence in engine.scheduler.waiting],
        "running": [_sequence(engine, sequence) for sequence in engine.scheduler.running],
        "blocks": {
            "total": manager.num_blocks,
            "block_size": manager.block_size,
            "free": manager.num_free_blocks,
            "held": manager.num_blocks - manager.num_free_blocks,
            "shared": sum(1 for block in blocks if manager.ref_counts[block] > 1),
            "cached": manager.num_cached_blocks,
            "cached_free": sum(1 for block in blocks if manager.is_cached(block) and not manager.ref_counts[block]),
        },
        "next": None if next_step is None else {"step": next_step.number, "ran": next_step.ran},
    }


def _sequence(engine: LLMEngine, sequence: Sequence) -> dict[str, Any]:
    counts = engine.block_manager.ref_counts
    return {
        "request": sequence.request.request_id,
        "index": sequence.index,
        "priority": sequence.request.params.priority,
        "num_prompt_tokens": sequence.num_prompt_tokens,
        "num_computed_tokens": sequence.num_computed_tokens,
        "output_token_ids": sequence.output_token_ids,
        "block_table": list(sequence.block_table),
        "ref_counts": [counts[block] if block >= 0 else 0 for block in sequence.block_table],
    }


def state_lines(state: dict[str, Any]) -> Iterator[str]:
    """The state of engine_state for people."""
    coming = state["next"]
    yield f"after {state['steps']} steps" + (", the last" if coming is None else f", before step {coming['step']}")
    for name, title in (("waiting", "queue"), ("running", "running")):
        yield f"{title}: {len(state[name])}" + (":" if state[name] else "")
        for sequence in state[name]:
            yield from _sequence_lines(sequence)
    blocks = state["blocks"]
    yield (
        f"blocks of {blocks['block_size']} tokens: {blocks['free']} free of {blocks['total']} "
        f"({blocks['cached_free']} of those cached), {blocks['held']} held ({blocks['shared']} of those shared)"
    )
    if coming is not None:
        yield f"step {coming['step']} will run:"
        for request_id, index, start, count in coming["ran"]:
            where = f"token {start}" if count == 1 else f"tokens {start} to {start + count - 1}"
            yield f"  request {request_id}, sequence {index}: {where}"


def _sequence_lines(sequence: dict[str, Any]) -> Iterator[str]:
    prompt, output = sequence["num_prompt_tokens"], sequence["output_token_ids"]
    yield (
        f"  request {sequence['request']}, sequence {sequence['index']}: {prompt} prompt tokens, "
        f"{len(output)} generated, {sequence['num_computed_tokens']} of {prompt + len(output)} computed"
    )
    if output:
        yield f"    generated: {' '.join(map(str, output))}"
    if sequence["block_table"]:
        names = [
            "-" if block < 0 else f"{block}(x{count})" if count > 1 else str(block)
            for block, count in zip(sequence["block_table"], sequence["ref_counts"], strict=True)
        ]
        yield f"    blocks: {' '.join(names)}"
