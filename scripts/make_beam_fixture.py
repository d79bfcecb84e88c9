"""Makes tests/fixtures/beams/transformers.json: what transformers' beam search generates from the tests' tiny model.

    python -m pip install torch transformers
    python scripts/make_beam_fixture.py

The model is that of tests/beam_model.py, in float32. A case whose tokens change when the weights change in their last
bits says nothing about a beam search, and is left out. One beam is greedy search in transformers; its score is
computed here by the same formula. The counts printed at the end say what the cases cover.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.beam_model import BEAM_CONFIG, FIXTURE, beam_arrays, last_logits
from tests.tiny import random_prompt

BEAMS = (1, 2, 3, 4, 5, 8, 16)
LENGTH_PENALTIES = (-1.0, 0.0, 0.6, 1.0, 2.0)
EARLY_STOPPING: tuple[bool | str, ...] = (False, True, "never")
# (prompt length, its seed, end tokens, max_tokens, min_tokens, repetition_penalty)
SCENARIOS = (
    (5, 0, (26,), 16, 0, 1.0),
    (12, 1, (43, 50), 20, 0, 1.0),
    (1, 2, (50,), 24, 0, 1.0),
    (9, 3, (26, 43, 50), 20, 4, 1.0),
    (20, 4, (19,), 7, 0, 1.0),
    (17, 5, (), 9, 0, 1.0),
    (3, 6, (11, 26, 38, 43, 46, 50), 12, 0, 1.0),
    (8, 7, (43,), 24, 8, 1.0),
    (14, 8, (26, 50), 18, 0, 1.3),
    (6, 9, (59,), 1, 0, 1.0),
    (7, 10, (43,), 40, 0, 1.0),
)


def llama(arrays: dict[str, np.ndarray]) -> Any:
    settings = {key: value for key, value in BEAM_CONFIG.items() if key not in ("architectures", "model_type")}
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    config = transformers.LlamaConfig(**settings, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = transformers.LlamaForCausalLM(config).to(torch.float32).eval()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in arrays.items()})
    return model


def run(model: Any, case: dict[str, Any]) -> tuple[list[list[int]], list[float]]:
    """The generated ids and the score of each hypothesis that transformers returns."""
    prompt = torch.tensor([case["prompt"]])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_beams=case["beams"],
        num_return_sequences=case["beams"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        max_new_tokens=case["max_tokens"],
        min_new_tokens=case["min_tokens"] or None,
        repetition_penalty=case["repetition_penalty"],
        eos_token_id=case["eos"] or None,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    rows = []
    for row in output.sequences[:, prompt.shape[1] :].tolist():
        ends = [i for i, token in enumerate(row) if token in case["eos"]]
        rows.append(row[: ends[0] + 1] if ends else row)  # behind an end token there is padding
    if case["beams"] > 1:
        return rows, output.sequences_scores.tolist()
    logprobs = torch.log_softmax(torch.cat(output.logits), dim=-1)
    total = sum(float(logprobs[i, token]) for i, token in enumerate(rows[0]))
    return rows, [total / len(rows[0]) ** case["length_penalty"]]


def grid() -> list[dict[str, Any]]:
    cases = []
    for i, (beams, length_penalty) in enumerate((b, p) for b in BEAMS for p in LENGTH_PENALTIES):
        for turn in (i, i + 4):
            length, seed, eos, max_tokens, min_tokens, repetition_penalty = SCENARIOS[turn % len(SCENARIOS)]
            if repetition_penalty != 1 and beams == 1:
                continue  # transformers' greedy search penalises logits, its beam search log-probabilities
            for early_stopping in EARLY_STOPPING:
                case = {
                    "prompt": random_prompt(length, seed),
                    "eos": list(eos),
                    "beams": beams,
                    "length_penalty": length_penalty,
                    "early_stopping": early_stopping,
                    "max_tokens": max_tokens,
                    "min_tokens": min_tokens,
                    "repetition_penalty": repetition_penalty,
                }
                cases.append(case)
    return cases


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    rng = np.random.default_rng(2)
    arrays = beam_arrays()
    model = llama(arrays)
    noisy = llama({n: a * (1 + 1e-6 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in arrays.items()})
    prompt = np.array([random_prompt(30)])
    difference = np.abs(model(torch.from_numpy(prompt)).logits[:, -1].numpy() - last_logits(arrays, prompt)).max()
    assert difference < 1e-4, "tests/beam_model.py computes another model"

    cases, left_out, seen = [], 0, Counter[str]()
    outcomes: dict[str, dict[str, str]] = {}
    for case in grid():
        token_ids, scores = run(model, case)
        if run(noisy, case)[0] != token_ids:
            left_out += 1
            continue
        cases.append(case | {"token_ids": token_ids, "scores": [round(score, 6) for score in scores]})
        ended = [row[-1] in case["eos"] for row in token_ids]
        seen["all by an end token"] += all(ended)
        seen["none by an end token"] += not any(ended)
        seen["some of both"] += any(ended) and not all(ended)
        seen["different lengths"] += len(set(map(len, token_ids))) > 1
        twin = json.dumps({key: value for key, value in case.items() if key != "early_stopping"})
        outcomes.setdefault(twin, {})[str(case["early_stopping"])] = json.dumps(token_ids)
    seen["early_stopping matters"] = sum(len(set(forms.values())) > 1 for forms in outcomes.values())
    seen["all three forms differ"] = sum(len(set(forms.values())) > 2 for forms in outcomes.values())
    FIXTURE.parent.mkdir(parents=True, exist_ok=True)
    note = f"transformers {transformers.__version__}, torch {torch.__version__}; scripts/make_beam_fixture.py"
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    FIXTURE.write_text(f'{{"made_by": {json.dumps(note)}, "cases": [\n{lines}\n]}}\n')
    print(f"{len(cases)} cases, {left_out} left out, {FIXTURE.stat().st_size:,} bytes")
    for what, count in seen.items():
        print(f"{count:5} {what}")


if __name__ == "__main__":
    main()
