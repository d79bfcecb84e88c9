"""What keeps a sequence to a structured output: which tokens may come next, and when the text is complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tinyllm.structured_output import StructuredOutput

__all__ = ["MakeMatcher", "Matcher"]


class Matcher(Protocol):
    """The state of one text, from the end of the prompt on. A function of its tokens alone.

    Attributes:
        num_tokens: how many tokens it has taken.
        finished: whether the text is complete, and nothing may follow but its end.
    """

    num_tokens: int
    finished: bool

    def allowed_ids(self, end_ids: Sequence[int] = ()) -> NDArray[np.intp]:
        """The ids that may come next, ascending; `end_ids` are among them where the text may end here.

        Raises:
            InvalidRequestError: it takes too long to find out. The matcher stays as it is then: of no use.
        """
        ...

    def advance(self, token_id: int) -> None:
        """Takes one of the allowed ids that is not an end. Raises InvalidRequestError as above."""
        ...

    def copy(self) -> Matcher:
        """Another in the same state, for a fork."""
        ...


MakeMatcher = Callable[[StructuredOutput], Matcher]
