"""What an autoregressive step is: how a pipeline asks for the steps of its token head.

An autoregressive pipeline opts in to `disa.StepAnnealing` by one method of its scheduler::

    def head_steps(self, step: ARStep) -> int:
        return self.config.num_head_steps

which the pipeline asks, at every autoregressive step, for the number of denoising steps of its head.
"""

import itertools
from dataclasses import dataclass

from ..errors import OptionError

__all__ = ["ARStep", "token_counts"]


@dataclass(frozen=True)
class ARStep:
    """One autoregressive step, before its tokens are drawn.

    Arguments:
        index: The step k, from 0.
        drawn: How many tokens of an image each of the K steps draws.
        spread: The standard deviation that the head has predicted for the tokens of the last step (see
            `mar_chain.predicted_spread`), in the units of the tokens; None if it was not measured.
    """

    index: int
    drawn: tuple[int, ...]
    spread: float | None = None

    @property
    def count(self) -> int:
        """The number of autoregressive steps K."""
        return len(self.drawn)

    @property
    def known(self) -> int:
        """The tokens known before this step."""
        return sum(self.drawn[: self.index])

    @property
    def total(self) -> int:
        """The tokens N of an image."""
        return sum(self.drawn)


def token_counts(masked: list[int]) -> tuple[int, ...]:
    """Returns how many tokens each step draws, of the numbers of unknown tokens before, between and after.

    Raises:
        OptionError: If a step draws none, or some are left.
    """
    drawn = tuple(before - after for before, after in itertools.pairwise(masked))
    if not drawn or min(drawn) < 1 or masked[-1]:
        raise OptionError(f"autoregressive steps must draw a token each, and all of them; not {drawn}")
    return drawn
