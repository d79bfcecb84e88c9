"""Makes tests/fixtures/bundled: what the model in weights/bundled should compute, by an independent forward.

    python -m pip install torch transformers
    python scripts/make_bundled_fixture.py

Run it again whenever the weights or the tokenizer change. The oracle is transformers' LlamaForCausalLM in float32 over
the bfloat16 weights, and transformers' tokenizer. Each of the 20 prompts is continued greedily by 64 tokens, past any
end-of-text token, and the logits are then computed in one pass over prompt and continuation. The last prompt and its
continuation fill the context.

golden_fixture.py says what the files hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from golden_fixture import FIXTURES, NUM_GREEDY, write_golden

MODEL = Path(__file__).resolve().parent.parent / "weights" / "bundled"

PROMPTS = [
    "Once upon a time",
    "There was once a little girl who",
    "The old king had three sons, and the youngest",
    "“Who is there?” asked the fox.\n\n“It is only I,” said",
    "THE LION AND THE MOUSE\n\nA lion lay asleep in the forest",
    "One day the rabbit",
    "Long, long ago, when the animals could talk,",
    'said, "I will not',
    '"Come," said the wolf; "it is late, and',
    "A",
    "Chapter II.\n\n",
    "Il était une fois, dans un petit village,",
    "水は🙂 Привет!",
    "🙂🙃 Emoji, tabs\tand   spaces\n\n\nand CRLF\r\n",
    "In 1869, 3.14159 and 2,718,281 sheep; def f(x): return x**2",
    "<|endoftext|>The end of one tale.<|endoftext|>The beginning of another:",
    # longer ones
    "The miller's daughter had never been farther from home than the stone bridge, and she did not mean to go farther "
    "that morning. But the grey goose had broken through the hedge again, and where the goose went, she had to follow. "
    "They came past the bridge, and past the three poplars, and past the chapel with the crooked roof; and every time "
    "she stretched out her hand, the goose was just one step ahead of her. At last they stood before a little house "
    "that she had never seen. Smoke came from its chimney, and it smelled of apples. 'You are late,' said a voice from "
    'inside. "The kettle has been singing for an hour." The girl looked at the goose, and the goose looked at the '
    "door. Then she wiped her shoes upon the grass, took a long breath, and",
    "A crow who had stolen a piece of cheese sat in a high tree to eat it. A hedgehog, who was walking by, smelled the "
    'cheese and looked up. "Good morning, neighbour," he said. "I have always wished to see the world from up there. '
    'Is it true that one can see the sea?" "One can see a great deal," said the crow, without opening her beak very '
    'far. "What a pity," said the hedgehog, "that I cannot climb! If only somebody would tell me about it." Now the '
    "crow was very proud of all that she had seen, and she began to think",
    "Up the hill and down the lane,\nThrough the sunshine, through the rain,\nWent the tinker with his pack,\nNever "
    "once he looked him back.\n\nDown the lane and up the hill,\nPast the meadow, past the mill,\nWent the tinker's "
    "dog behind,\n",
]


def filling(tokenizer: Any, room: int) -> str:
    """As many words of the longer prompts, over and over, as make at most `room` tokens."""
    words = " ".join(PROMPTS[-3:] * 4).split(" ")
    fits, too_many = 0, len(words)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if len(tokenizer.encode(" ".join(words[:middle]))) <= room:
            fits = middle
        else:
            too_many = middle
    return " ".join(words[:fits])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="the model's folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FIXTURES / "bundled", help="where to (default: %(default)s)")
    args = parser.parse_args()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(args.model)
    model = transformers.LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
    room = model.config.max_position_embeddings - NUM_GREEDY
    texts = [*PROMPTS, filling(tokenizer, room)]
    write_golden(model.eval(), [(text, tokenizer.encode(text)) for text in texts], args.out)


if __name__ == "__main__":
    main()
