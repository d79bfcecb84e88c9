"""How long a step takes, by estimate: so that prompts can be prefilled in chunks that do not hold up who decodes.

The unit is the work of one token in the linear layers. A step costs

    fixed + for each sequence of n new tokens behind a context of c:
            n                          the linear layers
            + per_read * (c + n)       reading its keys and values from memory, once for all of the n
            + per_key * n * (c + n/2)  multiplying with them

where `fixed` is what even one token takes: all weights are read once a step. The numbers are those of a kind of device,
not of a machine's state: a schedule can be repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["StallLimit", "StepCost"]


@dataclass(frozen=True)
class StepCost:
    """The three numbers of a device."""

    fixed: float
    per_read: float
    per_key: float

    def of_tokens(self, num_tokens: int, context: int) -> float:
        """Of num_tokens new tokens of a sequence that has `context` before them."""
        reading = self.per_read * (context + num_tokens)
        return num_tokens + reading + self.per_key * num_tokens * (context + num_tokens / 2)

    def most_tokens(self, cost: float, context: int) -> int:
        """How many new tokens of such a sequence cost at most so much."""
        rest = cost - self.per_read * context
        if rest <= 0:
            return 0
        linear, half = 1 + self.per_read + self.per_key * context, self.per_key / 2
        return int(2 * rest / (linear + math.sqrt(linear * linear + 4 * half * rest)))  # half n**2 + linear n = rest


@dataclass(frozen=True)
class StallLimit:
    """A step that decodes may take `ratio` times as long as its decoding alone; the rest of it is for prompts."""

    ratio: float
    cost: StepCost

    def allowance(self, decoding_cost: float) -> float:
        """What prompts may cost in a step whose decoding tokens cost so much."""
        return (self.ratio - 1) * (self.cost.fixed + decoding_cost)
