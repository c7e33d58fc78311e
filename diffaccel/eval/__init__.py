"""What a run costs, and how far its images are from those of another run."""

from .cost import Timing, count_flops, interleave
from .fidelity import Fidelity, fidelity

__all__ = ["Fidelity", "Timing", "count_flops", "fidelity", "interleave"]
