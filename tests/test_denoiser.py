"""Networks of all kinds as denoisers of one path: against the schedulers' levels, and closed forms."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from tiny_pipelines import TINY
from torch import Tensor, nn

from diffaccel.distill.denoiser import Denoiser, Prediction
from diffaccel.distill.host import Host, Inputs
from diffaccel.distill.units import EDMUnits, FlowUnits, TableUnits, Units
from diffaccel.errors import OptionError, UnsupportedPipeline
from diffaccel.pipelines.capturing import first_evaluation
from diffaccel.pipelines.unguided import unguided

SHAPING = ("height", "width", "num_frames", "max_sequence_length", "use_resolution_binning")
HOSTS = ("sd", "sd_v_prediction", "sdxl", "ddim", "dit", "sd3", "flux", "flux_true_cfg", "pixart", "sana",
         "wan", "qwenimage", "ltx", "hunyuan_video")  # fmt: skip
ROUNDED = {
    "wan": 0.1,
    "sana": 0.1,
    "dit": 1e-5,
}  # schedulers that round the network's time, and by how much it counts


def host_of(name: str) -> Host:
    """The host of a tiny pipeline, for samples of the size that its tests have."""
    case = TINY[name]
    return Host(case.build(), {key: value for key, value in case.call.items() if key in SHAPING})


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_any_pipeline_is_a_denoiser(name: str) -> None:
    """At a level of its scheduler, x0 and eps are those of the pipeline's own evaluation of its network."""
    host = host_of(name)
    conditions: list[Any] = {"prompt": ["a cat", "a red dog"], "class_labels": [0, 2]}.get(
        host.kind, [None] * 2
    )
    found = first_evaluation(host.pipe, unguided(host.pipe, conditions, host.options), step=2)
    call, level = found.call, found.path[found.call.index]
    packed = call.module(*call.args, **call.kwargs)[0]
    output = packed.chunk(2, dim=1)[0] if packed.shape != call.sample.shape else packed
    sample = call.sample / found.path.input_scale(call.index)
    host.encode(conditions[::-1])  # rows are found by condition, whatever came before
    alpha, sigma = (torch.full((2,), value, dtype=torch.float64) for value in (level.alpha, level.sigma))
    made = Denoiser.of(host).at(sample, alpha, sigma, host.encode(conditions))
    for own, expected in ((made.x0, level.x0(output, sample)), (made.eps, level.eps(output, sample))):
        torch.testing.assert_close(
            own, expected, rtol=0, atol=ROUNDED.get(name, 1e-5) * expected.abs().max().item()
        )


class Gaussian(nn.Module):
    """The exact network for data N(0, s^2) in given units: what a perfect training would make."""

    def __init__(self, units: Units, std: float) -> None:
        super().__init__()
        self.units, self.std = units, std
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.level: Any = None

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        """Returns p E[x0] + q E[eps] at the level that was asked for."""
        level = self.level
        x = sample / level.scale
        variance = level.alpha**2 * self.std**2 + level.sigma**2
        return (level.p * level.alpha * self.std**2 / variance * x + level.q * level.sigma / variance * x,)


TABLE = DDIMScheduler().alphas_cumprod
ALL_UNITS = {
    "flow": FlowUnits(0.0, 1000.0), "flow, reversed": FlowUnits(1.0, -1.0, -1),
    **{f"table, {kind}": TableUnits(TABLE, kind) for kind in ("epsilon", "sample", "v_prediction")},
    **{f"EDM, {kind}": EDMUnits(0.5, kind) for kind in ("epsilon", "v_prediction")},
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_UNITS)
def test_the_velocity_of_a_gaussian_is_exact_in_all_units(name: str) -> None:
    """Card check 8: x_t (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2), to 1e-6 for t in [1e-3, 0.999]."""
    std, units = 0.7, ALL_UNITS[name]
    network = Gaussian(units, std)
    t = torch.linspace(1e-3, 0.999, 41, dtype=torch.float64)
    network.level = units.level(1 - t, t)
    low, high = (0.0, 1.0) if "table" not in name else _known(units)
    inside = (t >= low) & (t <= high)
    x_t = torch.linspace(-2, 2, 41, dtype=torch.float64)
    made = Denoiser(network, units)(x_t, t, Inputs((), {}, 41, (None, None))).velocity
    exact = x_t * (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
    torch.testing.assert_close(made[inside], exact[inside], atol=1e-6, rtol=1e-6)
    assert inside.sum() > 30


def _known(units: Any) -> tuple[float, float]:
    """The times on the straight path between the ends of a table."""
    ends = units.log_ratios[[0, -1]].exp()
    return tuple((ends / (1 + ends)).tolist())  # type: ignore[return-value]


def test_pure_noise_is_the_last_level_of_a_table() -> None:
    """At t = 1 a network of a table gets z at its last timestep, as DDIM gives it, and eps is what fits."""
    units = TableUnits(TABLE, "epsilon")
    level = units.level(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert level.timestep.item() == 999 and level.beyond.item()
    assert math.isclose(level.alpha.item(), TABLE[-1].sqrt().item(), rel_tol=1e-5)

    class Half(nn.Linear):
        def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
            return (sample / 2,)

    z = torch.randn(1, 5)
    made: Prediction = Denoiser(Half(1, 1), units)(z, torch.ones(1), Inputs((), {}, 1, (None, None)))
    torch.testing.assert_close(made.eps, z)
    expected = (z - level.sigma.float() * z / 2) / level.alpha.float()
    torch.testing.assert_close(made.x0, expected)
    torch.testing.assert_close(z + (0 - 1) * made.velocity, made.x0)  # one Euler step lands on x0


def test_units_are_found_from_a_pipeline() -> None:
    """Flows in thousandths or in one, tables, and learned variances."""
    for name, slope in (("sd3", 1000.0), ("flux", 1.0), ("wan", 1000.0)):
        units = host_of(name).units
        assert isinstance(units, FlowUnits) and (units.offset, units.slope) == (0.0, slope)
    assert isinstance(host_of("dit").units, TableUnits)
    scheduler = EDMEulerScheduler(sigma_data=0.5)
    assert scheduler.config.sigma_data == 0.5


def test_conditions_are_encoded_once_and_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are looked up; labels may be names; another kind is an error."""
    host = host_of("sd")
    first = host.encode(["a", "b", "a"])
    states = first.kwargs["encoder_hidden_states"]
    assert torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])
    monkeypatch.setattr(host, "_captured", None)  # no prompt is encoded again
    torch.testing.assert_close(host.encode(["b"]).kwargs["encoder_hidden_states"][0], states[1])
    with pytest.raises(OptionError, match="takes prompts, not 3"):
        host.encode([3])
    labels = host_of("dit")
    assert labels.encode(["dress", 2]).kwargs["class_labels"].tolist() == [2, 2]
    assert labels.encode_unconditional(2).kwargs["class_labels"].tolist() == [1000, 1000]
    with pytest.raises(OptionError, match="no label 'hat'"):
        labels.encode(["hat"])


@pytest.mark.parametrize(("name", "words"), [
    ("sd_img2img", "starts from a picture"),
])  # fmt: skip
def test_what_is_no_denoiser_of_noise(name: str, words: str) -> None:
    """Image to image is refused with the reason."""
    with pytest.raises(UnsupportedPipeline, match=words):
        host_of(name)
