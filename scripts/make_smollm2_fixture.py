"""Makes tests/fixtures/smollm2: what SmolLM2-135M-Instruct (Q4_1) should compute, by an independent forward.

    python -m pip install torch transformers gguf llama-cpp-python
    python scripts/make_smollm2_fixture.py SmolLM2-135M-Instruct.Q4_1.gguf

The oracle is transformers' LlamaForCausalLM in float32 over the weights that the `gguf` package dequantises; prompts
are tokenised by llama.cpp, without a BOS token. Each of the 20 prompts is continued greedily by 64 tokens, past any
end-of-sequence token, and the logits are then computed in one pass over prompt and continuation.

golden_fixture.py says what the files hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import torch
import transformers
from golden_fixture import FIXTURES, write_golden

PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n",
    "1, 2, 3, 5, 8, 13,",
    "Il était une fois, dans un petit village au bord de la mer,",
    "水は何度で沸騰しますか。",
    "Привет! Меня зовут",
    "In 1969, 3.14159 and 2,718,281 people",
    "SELECT name, COUNT(*) FROM users WHERE",
    "🙂🙃 Emoji, tabs\tand   spaces\n\n\nand CRLF\r\n",
    "A",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about an old bridge.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n17 + 25 = 42.<|im_end|>\n"
    "<|im_start|>user\nAnd twice that?<|im_end|>\n<|im_start|>assistant\n",
    # longer ones
    "The lighthouse keeper had not spoken to anyone since the autumn storms began. Every evening she climbed the "
    "hundred and twelve steps, trimmed the wick, wiped the salt from the lenses, and wrote one line in the log: wind, "
    "sea, ships. On the ninth of November the line was different. A rowing boat had drifted against the rocks with "
    "nobody in it, only a wicker basket, a lantern that was still warm, and a letter with her own name on the "
    "envelope. She sat down on the wet stones and turned it over three times before she dared to break the seal. The "
    "handwriting was her brother's, and her brother had been lost at sea for eleven years. 'Do not light the lamp "
    "tonight,' it began, 'whatever you see on the water, and whoever calls to you.' She looked up. Far out, between "
    "two bands of rain, something answered with a single green flash, and then another, closer than before. She "
    "folded the letter, put it in her pocket,",
    "import heapq\n\n\nclass Graph:\n    def __init__(self):\n        self.edges = {}\n\n    def add_edge(self, a, b, "
    "weight):\n        self.edges.setdefault(a, []).append((b, weight))\n        self.edges.setdefault(b, [])\n\n    "
    'def shortest_path(self, start, goal):\n        """Dijkstra\'s algorithm: the length of the shortest path, or '
    'None."""\n        queue = [(0, start)]\n        done = set()\n        while queue:\n            distance, node = '
    "heapq.heappop(queue)\n            if node == goal:\n                return distance\n            if node in done:"
    "\n                continue\n            done.add(node)\n            for neighbour, weight in self.edges[node]:\n  "
    "              if neighbour not in done:\n                    heapq.heappush(queue, (distance + weight, "
    "neighbour))\n        return None\n\n\ndef test_shortest_path():\n    graph = Graph()\n",
    "Quarterly results (in thousands):\n\n| region | Q1 | Q2 | Q3 | Q4 |\n|---|---|---|---|---|\n| North | 1204 | 1310 "
    "| 1288 | 1475 |\n| South | 884 | 902 | 951 | 1003 |\n| East | 2310 | 2295 | 2401 | 2518 |\n| West | 640 | 655 | "
    "661 | 702 |\n\nTotals: Q1 = 1204 + 884 + 2310 + 640 = 5038; Q2 = 1310 + 902 + 2295 + 655 = 5162; Q3 = 1288 + 951 "
    "+ 2401 + 661 = 5301; Q4 =",
    "Die Donau entspringt im Schwarzwald und mündet nach fast dreitausend Kilometern in das Schwarze Meer. El río "
    "pasa por diez países, más que ningún otro del mundo. Il fiume attraversa quattro capitali: Vienna, Bratislava, "
    "Budapest e Belgrado. Rzeka była przez wieki granicą cesarstwa rzymskiego. Ο ποταμός έχει πολλά ονόματα. Река "  # noqa: RUF001
    "судоходна на большей части своего течения. 川は多くの都市を通ります。 강은 바다로 흐른다. "
    "In English, the river is",
    "<|im_start|>system\nYou are a careful editor. Rewrite what the user sends you so that it is shorter and clearer, "
    "and keep every fact.<|im_end|>\n<|im_start|>user\nDue to the fact that the committee was not able to come to an "
    "agreement with regard to the matter of the budget at the meeting that took place on Tuesday, it was decided by "
    "the chairperson that the discussion of the aforementioned matter would be postponed until such time as all of "
    "the members of the committee had had an adequate opportunity to review the documents that had been distributed "
    "to them in advance of the meeting, which is to say at the earliest by the end of the following week.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Photosynthesis takes place in two stages. In the first, pigments in the thylakoid membranes absorb light, water "
    "is split into oxygen, protons and electrons, and the energy is stored in ATP and NADPH. In the second, the "
    "Calvin cycle, an enzyme called RuBisCO fixes carbon dioxide to a five-carbon sugar, and the products of the "
    "first stage pay for turning the result into glyceraldehyde 3-phosphate, from which glucose, starch and cellulose "
    "are built. Plants of hot and dry places have found two ways around RuBisCO's weakness, its taste for oxygen: C4 "
    "plants such as maize separate the two stages in space, and CAM plants such as cacti separate them in time, "
    "opening their pores at night. The main differences between C3, C4 and CAM plants are therefore:\n\n1.",
]


def build_oracle(path: Path) -> Any:
    """LlamaForCausalLM, float32, with the file's weights dequantised."""
    reader = gguf.GGUFReader(path)
    fields = {name: f.contents() for name, f in reader.fields.items() if name.startswith("llama.")}
    config = transformers.LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        values = stored.pop(names.get_name(name, try_suffixes=(".weight",)))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:  # the file pairs neighbouring rows, transformers halves of a head
            values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        with torch.no_grad():
            parameter.copy_(torch.tensor(values))
    assert not stored, stored.keys()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    path = parser.parse_args().gguf
    tokenizer = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    prompts = [(text, tokenizer.tokenize(text.encode(), add_bos=False, special=True)) for text in PROMPTS]
    write_golden(build_oracle(path), prompts, FIXTURES / "smollm2")


if __name__ == "__main__":
    main()
