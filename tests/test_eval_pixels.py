"""Quantizers and resizers, against those of the published evaluations."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.errors import OptionError
from diffaccel.eval.pixels import QUANTIZERS, RESIZERS, quantize, resize


@pytest.fixture
def levels():
    """All numbers near which a quantizer may jump, and beyond."""
    exact = torch.arange(-4, 516) / 510
    near = [torch.nextafter(exact, torch.full_like(exact, to)) for to in (-9.0, 9.0)]
    return torch.cat([exact, *near, torch.rand(5000, generator=torch.Generator().manual_seed(0))])


def picture(size, seed=0):
    """Noise over a gradient and a checkerboard, as bytes (1, 3, H, W)."""
    height, width = size if isinstance(size, tuple) else (size, size)
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 255, (3, height, width)) + np.linspace(-80, 80, width)
    x[:, : height // 2] += 120 * (np.indices((height // 2, width)).sum(0) % 2)
    return torch.from_numpy(x.clip(0, 255).astype(np.uint8))[None]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("round", [0, 0, 128, 255, 255]), ("trunc", [0, 0, 127, 254, 255]), ("half_up", [0, 0, 128, 255, 255])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_table(mode, expected, dtype):
    assert quantize(torch.tensor([-0.01, 0, 0.5, 0.9999, 1.004], dtype=dtype), mode).tolist() == expected


def test_round_is_that_of_diffusers(levels):
    theirs = (levels.clamp(0, 1).numpy() * 255).round().astype("uint8")
    assert (quantize(levels, "round").numpy() == theirs).all()


def test_trunc_is_that_of_torchmetrics_where_that_does_not_wrap(levels):
    inside = levels[(levels >= 0) & (levels <= 1)]
    assert (quantize(inside, "trunc") == (inside * 255).byte()).all()


def test_half_up_is_that_of_edm(levels):
    values = (levels.double() * 2 - 1).clamp(-1, 1)
    theirs = (127.5 * values + 128).floor().clamp(0, 255).byte()
    ours = quantize(levels, "half_up")
    tie = ((levels.double() * 255 + 0.5) % 1 - 0.5).abs() > 0.5 - 1e-4  # float32 may fall on either side
    assert (ours == theirs)[~tie].all() and (ours == theirs).float().mean() > 0.9
    whole = torch.arange(256) / 255
    for mode in ("round", "half_up"):
        assert quantize(whole, mode).tolist() == list(range(256))


@pytest.mark.parametrize("mode", QUANTIZERS)
def test_half_precision_is_not_lost_before_the_cast(mode):
    x = torch.rand(3, 4, dtype=torch.bfloat16)
    assert (quantize(x, mode) == quantize(x.float(), mode)).all()


@pytest.mark.parametrize("size", [32, 64, 256, 299, 512, (100, 400)])
def test_clean_is_that_of_cleanfid(size):
    from cleanfid.resize import build_resizer

    pixels = picture(size)
    theirs = build_resizer("clean")(pixels[0].permute(1, 2, 0).numpy())
    error = np.abs(resize(pixels, 299, "clean")[0].permute(1, 2, 0).numpy() - theirs).max()
    print(size, error)
    assert error <= 5e-3


@pytest.mark.parametrize("size", [32, 64, 299, 512, (100, 400)])
def test_tf1_bilinear_is_that_of_torch_fidelity(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    pixels = picture(size)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), (299, 299), align_corners=False)
    error = (resize(pixels, 299, "tf1_bilinear") - theirs).abs().max().item()
    print(size, error)
    assert error <= 1e-3


@pytest.mark.parametrize("size", [32, 224, 500, (100, 400)])
def test_pil_bicubic_is_that_of_dgm_eval(size):
    from torchvision.transforms import Compose, InterpolationMode, Resize, ToTensor

    pixels = picture(size)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    theirs = Compose([Resize((224, 224), InterpolationMode.BICUBIC), ToTensor()])(image)
    assert torch.equal(resize(pixels, 224, "pil_bicubic")[0], (theirs * 255).round())


@pytest.mark.parametrize("size", [32, 500])
def test_bilinear_is_that_of_pytorch_fid_and_torchmetrics(size):
    pixels = picture(size)
    for antialias, mode in ((False, "bilinear"), (True, "bilinear_antialias")):
        theirs = torch.nn.functional.interpolate(
            pixels.float(), (299, 299), mode="bilinear", align_corners=False, antialias=antialias
        )
        assert torch.equal(resize(pixels, 299, mode), theirs)


@pytest.mark.parametrize("mode", RESIZERS)
def test_batches_and_sizes(mode):
    pixels = torch.cat([picture(40, seed) for seed in range(3)])
    whole = resize(pixels, 50, mode)
    assert whole.dtype == torch.float32 and whole.shape == (3, 3, *([40, 40] if mode == "none" else [50, 50]))
    assert (whole[1:2] - resize(pixels[1:2], 50, mode)).abs().max() <= 1e-3
    assert torch.equal(resize(pixels, 40, mode), pixels.float())


def test_unknown_names():
    with pytest.raises(OptionError, match="did you mean 'round'"):
        quantize(torch.zeros(1), "rond")
    with pytest.raises(OptionError, match="did you mean 'clean'"):
        resize(picture(8), 8, "claen")
