"""What a run costs, and how far its images are from those of another run."""

from .cost import Timing, clock_outside, count_flops, interleave, order_of, timed
from .fidelity import Fidelity, fidelity

__all__ = [
    "Fidelity",
    "Timing",
    "clock_outside",
    "count_flops",
    "fidelity",
    "interleave",
    "order_of",
    "timed",
]
