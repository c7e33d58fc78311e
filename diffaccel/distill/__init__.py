"""Distillation: turns a pipeline into a few-step student, which leaves as an ordinary pipeline folder."""

from .config import Config
from .denoiser import Denoiser, Prediction
from .dmd2 import DMD2
from .export import export, export_lora
from .grid import Grid
from .host import Host
from .method import Expert, Method, Setup, methods
from .msd import MSD
from .pairs import PairStore, make_pairs
from .phased_dmd import PhasedDMD
from .rectified_flow import RectifiedFlow
from .runs import Run, resume, start
from .slimflow import SlimFlow
from .trainer import Trainer

__all__ = [
    "DMD2", "MSD", "Config", "Denoiser", "Expert", "Grid", "Host", "Method", "PairStore", "PhasedDMD",
    "Prediction",
    "RectifiedFlow", "Run", "Setup", "SlimFlow", "Trainer", "export", "export_lora", "make_pairs", "methods",
    "resume", "start",
]  # fmt: skip
