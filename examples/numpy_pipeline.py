"""A numpy pipeline with a language model in it: search by embedding, rank by likelihood, answer under a numpy rule.

Run it as it is: python examples/numpy_pipeline.py [MODEL]
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from tinyllm import LLM, SamplingParams

NOTES = [
    "The bakery on Mill Street opens at six in the morning and sells out of rye bread by nine.",
    "Whales sleep with one half of the brain at a time, so that they keep coming up to breathe.",
    "The night train to the coast leaves at 23:10 from platform four; seats must be reserved.",
    "Octopuses have three hearts, and two of them stop while the animal swims.",
    "The museum of clocks is closed on Mondays; on other days the last tour begins at five.",
]
QUESTIONS = [
    "When does the train to the sea leave?",
    "Which animals have several hearts?",
    "Where can I buy bread early in the day?",
    "On which day is the museum closed?",
]
CANDIDATES = [" At 23:10.", " At six in the morning.", " Its seats are made of rye bread."]


def similarities(llm: LLM, questions: list[str], notes: list[str]) -> NDArray[np.float32]:
    """Cosine similarities (Q, N) of the questions' and the notes' embeddings.

    A model that was trained to continue text gives all texts of a kind a large common direction; what tells them
    apart is the rest, so each group's mean is taken away first. It is a modest search engine all the same.
    """

    def directions(texts: list[str]) -> NDArray[np.float32]:
        vectors = llm.embed(texts)  # (len(texts), M)
        vectors -= vectors.mean(axis=0)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return directions(questions) @ directions(notes).T


def log_likelihood(llm: LLM, context: str, continuation: str) -> float:
    """Mean log-probability of the continuation's tokens after the context, in nats."""
    score = llm.score(context + continuation)
    first = len(llm.encode(context))
    return float(score.logprobs[first - 1 :].mean())  # logprobs[i] is about token i + 1


def no_repeated_trigrams(token_ids: list[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """A logits processor: forbids whatever would complete a triple of tokens that occurred before. (V,) -> (V,)"""
    ids = np.array(token_ids)
    if len(ids) < 3:
        return logits
    after_same_pair = (ids[:-2] == ids[-2]) & (ids[1:-1] == ids[-1])
    allowed = logits.copy()
    allowed[ids[2:][after_same_pair]] = -np.inf
    return allowed


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    llm = LLM(model, on_event=lambda message: print(message, file=sys.stderr))

    similarity = similarities(llm, QUESTIONS, NOTES)  # (Q, N)
    for question, row in zip(QUESTIONS, similarity, strict=True):
        print(f"{question}\n  {row.max():+.2f}  {NOTES[row.argmax()]}")

    question, note = QUESTIONS[0], NOTES[similarity[0].argmax()]
    context = f"{note}\nQuestion: {question}\nAnswer:"
    print(f"\n{question} Candidate answers by mean log-probability:")
    scores = np.array([log_likelihood(llm, context, candidate) for candidate in CANDIDATES])
    for i in np.argsort(-scores):
        print(f"  {scores[i]:+.3f} {CANDIDATES[i]}")

    params = SamplingParams(temperature=0, max_tokens=48, logits_processors=[no_repeated_trigrams])
    request = f"Say in one sentence what this note is about: {note}"
    answer = llm.chat([{"role": "user", "content": request}], params)
    print(f"\nsummary, with no triple of tokens twice:\n  {answer.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
