"""Memory: 20,000 images of 1280 features each stream through one state of 1280 x 1280 numbers."""

import subprocess
import sys

import pytest

PROGRAM = """
import re, torch
from dataclasses import replace
from pathlib import Path
from diffaccel.eval.images import open_images
from diffaccel.eval.metrics import score
from diffaccel.eval.protocols import Extractor, protocol
from diffaccel.eval.statistics import collect

torch.set_num_threads(1)
torch.manual_seed(0)
nn = torch.nn
network = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 1280), nn.ReLU())
offline = replace(protocol("offline"), size=0, resizer="none")
extractor, start = Extractor(offline, network=network), []

def images(count):
    for _ in range(count // 100):
        yield torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8)

def memory(name):  # not ru_maxrss, which starts at that of the parent
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def advance(count):
    start or start.append(memory("VmRSS"))

reference = collect(open_images(images(3000)), extractor, advance=advance)
generated = collect(open_images(images(20000)), extractor, {"features"}, limit=20000)
assert generated.count == 20000 and generated.features.shape == (20000, 1280)
fid = score(generated, reference, ["fid"], offline)["fid"]
assert fid.value > 0 and fid.se > 0 and fid.bias > 0
print((memory("VmHWM") - start[0]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_of_twenty_thousand_images():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    growth = float(found.stdout)
    print(f"peak grows by {growth:.0f} MiB")
    assert growth <= 300
