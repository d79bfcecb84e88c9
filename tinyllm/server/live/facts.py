"""What a viewer is told of the model and its memory; it stays the same while the server runs."""

from __future__ import annotations

from dataclasses import dataclass

from tinyllm.llm import LLM

__all__ = ["ModelFacts"]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """One server's model, by the names of MemoryPlan and EngineConfig.

    Attributes:
        model: what clients call it.
        chat_template: whether it can chat; otherwise it continues texts.
    """

    model: str
    chat_template: bool
    weights_nbytes: int
    kv_cache_nbytes: int
    workspace_nbytes: int
    scratch_nbytes: int
    kv_nbytes_per_token: int
    max_sequence_len: int
    max_batch_tokens: int
    max_num_seqs: int
    device: str

    @classmethod
    def of(cls, llm: LLM, model: str) -> ModelFacts:
        memory, config = llm.memory, llm.engine_config
        return cls(
            model=model,
            chat_template=llm.tokenizer is not None and llm.tokenizer.chat_template is not None,
            weights_nbytes=memory.weights_nbytes,
            kv_cache_nbytes=memory.kv_cache_nbytes,
            workspace_nbytes=memory.workspace_nbytes,
            scratch_nbytes=memory.scratch_nbytes,
            kv_nbytes_per_token=memory.kv_nbytes_per_token,
            max_sequence_len=memory.max_sequence_len,
            max_batch_tokens=config.max_batch_tokens,
            max_num_seqs=config.max_num_seqs,
            device=llm.engine.runner.model.backend.name,
        )
