"""One harness for all methods: scores of images with errors, fidelity to the plain run, and cost.

Images become features under a named protocol (`PROTOCOLS`), features become statistics, statistics become
scores; see docs/evaluation.md.
"""

from .cost import (
    Calls,
    Memory,
    Timing,
    bootstrap_ci,
    clock_outside,
    count_calls,
    count_flops,
    interleave,
    order_of,
    peak_memory,
    timed,
)
from .estimate import Estimate
from .evaluation import Evaluation, Method
from .fidelity import Fidelity, Pairs, fidelity
from .frechet import Frechet, Reference, fid_infinity, frechet_distance
from .images import Images, open_images
from .inception_score import inception_score
from .kernels import cmmd, kid, kid_difference, kid_subsets
from .metrics import METRICS, score
from .moments import Gaussian, Moments
from .neighbors import prdc
from .protocols import PROTOCOLS, Extractor, Protocol, protocol
from .sampler import Sampler
from .scoring import measure
from .statistics import Statistics, collect, load_statistics, save_statistics

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Calls",
    "Estimate",
    "Evaluation",
    "Extractor",
    "Fidelity",
    "Frechet",
    "Gaussian",
    "Images",
    "Memory",
    "Method",
    "Moments",
    "Pairs",
    "Protocol",
    "Reference",
    "Sampler",
    "Statistics",
    "Timing",
    "bootstrap_ci",
    "clock_outside",
    "cmmd",
    "collect",
    "count_calls",
    "count_flops",
    "fid_infinity",
    "fidelity",
    "frechet_distance",
    "inception_score",
    "interleave",
    "kid",
    "kid_difference",
    "kid_subsets",
    "load_statistics",
    "measure",
    "open_images",
    "order_of",
    "peak_memory",
    "prdc",
    "protocol",
    "save_statistics",
    "score",
    "timed",
]
