"""How many tokens a request took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tinyllm.outputs import RequestOutput

__all__ = ["usage_of"]


def usage_of(outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    """OpenAI's `usage` of all jobs of a request; a prompt counts once, whatever its n."""
    prompt = generated = cached = 0
    for output in outputs:
        prompt += len(output.prompt_token_ids)
        cached += output.num_cached_tokens
        generated += sum(len(one.token_ids) for one in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
