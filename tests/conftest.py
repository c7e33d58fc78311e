"""One thread a worker: tiny networks are slower on two, and two workers would block each other."""

import os
import tracemalloc

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)


@pytest.fixture
def traced_peak():
    """Returns a function that runs a task, and returns the most bytes that it had allocated at once."""

    def peak(task):
        tracemalloc.start()
        task()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    return peak
