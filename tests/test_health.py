"""Health of images: collapse, noise, saturation and values that are not finite are told from a teacher's."""

import pytest
import torch
from torch import Tensor

from diffaccel.distill.health import examine
from diffaccel.errors import OptionError


def images(count: int = 16, seed: int = 0) -> Tensor:
    """Smooth random pictures."""
    noise = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (16, 16), mode="bilinear") * 0.8 + 0.1


def test_the_numbers_are_those_of_their_definitions() -> None:
    """Diversity is the root-mean-square difference of two images of one condition."""
    pixels, names = images(6), ["a", "b", "a", "b", "a", "c"]
    found = examine(pixels, names)
    pairs = {"a": [(0, 2), (0, 4), (2, 4)], "b": [(1, 3)]}
    squares = [torch.stack([(pixels[i] - pixels[j]).double().square().mean() for i, j in pairs[key]]).mean()
               for key in pairs]  # fmt: skip
    assert found.diversity == pytest.approx(torch.stack(squares).mean().sqrt().item(), rel=1e-6)
    assert found.mean == pytest.approx(pixels.mean().item(), rel=1e-5)
    assert found.std == pytest.approx(pixels.std().item(), rel=1e-5)
    assert (found.saturation, found.not_finite) == (0, 0)
    with pytest.raises(OptionError, match="of 1 images"):
        examine(pixels[:1])


@pytest.mark.parametrize(("changed", "word"), [
    (lambda x: x[:1].expand_as(x), "diversity"), (lambda x: 0.5 + 0.1 * (x - 0.5), "std"),
    (lambda x: (x > 0.5).float(), "saturation"), (lambda x: torch.where(x > 0.8, torch.nan, x), "not finite"),
    (lambda x: (x - 0.5) * 4, "noise"),
])  # fmt: skip
def test_signs_of_a_collapse(changed, word: str) -> None:
    """Each way to fall apart has its sign; other images of the teacher have none."""
    teacher = examine(images())
    assert examine(images(seed=1)).signs(teacher) == []
    assert any(word in sign for sign in examine(changed(images(seed=1))).signs(teacher))
