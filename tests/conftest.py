"""One thread a worker: tiny networks are slower on two, and two workers would block each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
