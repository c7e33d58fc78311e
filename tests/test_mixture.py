"""The exact mixture, against autograd, quadrature, the schedulers' paths and the orders of known solvers."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffaccel.errors import OptionError
from diffaccel.noise import path_of
from diffaccel.toy import GaussianMixtureModel, toy_t

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS = [(1.0, 0.05), (0.9, math.sqrt(0.19)), (0.3, 0.7), (0.0, 1.0)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2, 1000, -1])], ids=["all", "classes"])
@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_score_is_the_gradient_of_the_log_density(alpha, sigma, labels):
    model = toy_t(num_classes=3, weights=[1, 2, 3, 1, 2, 3])
    sample = normal(5, 1, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_density(sample, alpha, sigma, labels).sum(), sample)
    score = model.score(sample, alpha, sigma, labels)
    assert torch.allclose(score, gradient, atol=1e-11, rtol=1e-9)
    eps, x0 = model.eps(sample, alpha, sigma, labels), model.x0(sample, alpha, sigma, labels)
    assert torch.allclose(eps, -sigma * score)
    assert torch.allclose(alpha * x0 + sigma * eps, sample, atol=1e-12)


def test_density_and_posterior_mean_by_quadrature():
    means = torch.tensor([-1.5, 0.2, 2.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    model = GaussianMixtureModel.from_means(means, std=0.3, weights=[0.2, 0.5, 0.3])
    alpha, sigma = 0.6, 0.8
    x0 = torch.linspace(-5, 6, 40_001, dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    prior = (weights * torch.exp(-((x0[:, None] - means.flatten()) ** 2) / 2 / 0.09)).sum(1)
    prior /= torch.trapezoid(prior, x0)
    for x in (-2.0, 0.0, 0.7, 3.0):
        joint = prior * torch.exp(-((x - alpha * x0) ** 2) / 2 / sigma**2) / math.sqrt(2 * math.pi * sigma**2)
        density = torch.trapezoid(joint, x0)
        mean = torch.trapezoid(joint * x0, x0) / density
        sample = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
        assert float(model.log_density(sample, alpha, sigma)) == pytest.approx(math.log(density), abs=1e-6)
        assert float(model.x0(sample, alpha, sigma)) == pytest.approx(float(mean), abs=1e-6)


def test_draws_have_the_exact_moments_and_responsibilities():
    model = toy_t(sample_size=(1, 2), num_components=3, weights=[1, 2, 5])
    count = 200_000
    for alpha, sigma in [(1.0, 0.0), (0.5, 0.8)]:
        draws = model.draw(count, alpha, sigma, torch.Generator().manual_seed(0))
        mean, covariance = model.moments(alpha, sigma)
        assert draws.shape == (count, 1, 1, 2)
        deviation = draws.flatten(1).mean(0) - mean
        assert (deviation / (covariance.diagonal() / count).sqrt()).abs().max() < 4
        assert torch.allclose(torch.cov(draws.flatten(1).T), covariance, rtol=0.02, atol=0.01)
        shares = model.responsibilities(draws, alpha, sigma)
        assert torch.allclose(shares.sum(1), torch.ones(count, dtype=torch.float64))
        assert torch.allclose(shares.mean(0), torch.tensor([1, 2, 5.0]).double() / 8, atol=0.005)


def test_labels_restrict_the_mixture_to_their_components():
    model = toy_t(num_classes=2)  # class 0 has the components 0, 2, 4
    sample = normal(2, 1, 4, 4)
    shares = model.responsibilities(sample, 0.5, 0.9, torch.tensor([0, 1]))
    assert shares[0, 1::2].sum() == 0
    assert shares[1, 0::2].sum() == 0
    part = GaussianMixtureModel.from_means(model.means[0::2])
    assert torch.allclose(model.eps(sample, 0.5, 0.9, torch.tensor([0, 0])), part.eps(sample, 0.5, 0.9))
    label = torch.tensor([0, 0])
    assert torch.allclose(model.log_density(sample, 0.5, 0.9, label), part.log_density(sample, 0.5, 0.9))
    free = model(sample, 500, class_labels=torch.tensor([1000, -1])).sample
    assert torch.equal(free, model(sample, 500, return_dict=False)[0])
    drawn = model.draw(50, sigma=1e-3, class_labels=torch.ones(50, dtype=torch.long))
    assert model.responsibilities(drawn, 1.0, 1e-3)[:, 0::2].max() < 1e-3


def test_forward_takes_any_timestep_and_condition():
    model, sample = toy_t(), normal(3, 1, 4, 4)
    whole = model(sample, 301, "ignored", encoder_hidden_states=None, added_cond_kwargs={}).sample
    assert torch.equal(whole, model(sample, torch.tensor([301, 301, 301])).sample)
    mixed = model(sample, torch.tensor([301.0, 3.25, 999])).sample
    assert torch.allclose(mixed[0], whole[0])
    between = [float(model.level(step)[1] / model.level(step)[0]) for step in (3, 3.25, 4)]
    assert math.log(between[1]) == pytest.approx(0.75 * math.log(between[0]) + 0.25 * math.log(between[2]))
    assert model.level(-5) == model.level(0)
    assert model.level(1005) == model.level(999)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    sample = normal(3, 1, 4, 4).to(dtype)
    output = toy_t().to(dtype)(sample, 500).sample
    assert output.dtype == dtype
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert torch.allclose(output.double(), toy_t()(sample.double(), 500).sample, atol=tolerance)


def test_options_are_checked():
    for wrong in ({"prediction_type": "noise"}, {"path": "ve"}, {"weights": [1.0]}, {"std": -1.0}):
        with pytest.raises(OptionError):
            GaussianMixtureModel(**wrong)


PREDICTIONS = [
    (DDIMScheduler, SD, "vp", ("epsilon", "sample", "v_prediction")),
    (EulerDiscreteScheduler, SD, "vp", ("epsilon", "sample", "v_prediction")),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, "flow", ("flow_prediction",)),
]


@pytest.mark.parametrize(
    ("maker", "config", "kind", "predictions"), PREDICTIONS, ids=["ddim", "euler", "flow"]
)
def test_predictions_agree_through_the_path(maker, config, kind, predictions):
    for prediction in predictions:
        own = {} if kind == "flow" else {"prediction_type": prediction, "timestep_spacing": "leading"}
        scheduler = maker(**config, **own)
        scheduler.set_timesteps(10)
        path, model = path_of(scheduler), toy_t(prediction_type=prediction, path=kind)
        for index, timestep in enumerate(scheduler.timesteps):
            level, scale = path[index], path.input_scale(index)
            sample = model.draw(8, level.alpha, level.sigma, torch.Generator().manual_seed(index))
            output = model(sample * scale, timestep).sample
            x0 = model.x0(sample, level.alpha, level.sigma)
            assert torch.allclose(level.x0(output, sample), x0, atol=2e-5), (prediction, index)
            assert torch.allclose(
                level.eps(output, sample), model.eps(sample, level.alpha, level.sigma), atol=2e-5
            )


def test_a_pipeline_samples_and_reloads(tmp_path):
    model = GaussianMixtureModel(
        in_channels=3, sample_size=(4, 6), mean_std=0.4, std=0.05, weights=[1, 1, 1, 1, 1, 5]
    )
    model.means += 0.1  # not what the seed gives
    pipe = DDIMPipeline(model, DDIMScheduler(**SD, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    call = {"batch_size": 16, "num_inference_steps": 50, "output_type": "np"}
    images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (16, 4, 6, 3)
    samples = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    distances = torch.cdist(samples.flatten(1), model.means.flatten(1).clamp(-1, 1)).amin(1)
    assert distances.max() < 0.1 * math.sqrt(72)

    pipe.save_pretrained(tmp_path)
    assert '"diffaccel.toy",\n    "GaussianMixtureModel"' in (tmp_path / "model_index.json").read_text()
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.unet) is GaussianMixtureModel
    assert torch.equal(again.unet.means, model.means)
    assert torch.equal(again.unet.log_weights, model.log_weights)
    assert np.array_equal(again(**call, generator=torch.Generator().manual_seed(0)).images, images)
    assert (
        GaussianMixtureModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float64).dtype
        == torch.float64
    )


@pytest.mark.parametrize(
    "maker", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler]
)
def test_samples_of_stock_schedulers_have_the_moments_of_the_data(maker):
    extra = {"clip_sample": False} if maker in (DDIMScheduler, HeunDiscreteScheduler) else {}
    scheduler, model = maker(**SD, timestep_spacing="trailing", **extra), toy_t()
    scheduler.set_timesteps(50)
    sample = normal(4000, 1, 4, 4) * float(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps:
        output = model(scheduler.scale_model_input(sample, timestep), timestep).sample
        sample = scheduler.step(output, timestep, sample).prev_sample.double()
    mean, covariance = model.moments()
    assert (sample.flatten(1).mean(0) - mean).abs().max() < 0.12
    assert (torch.cov(sample.flatten(1).T) - covariance).abs().max() < 0.15


# orders of solvers; the median over the samples, since those on the border of two components are erratic


def exact(model, sample, start, end, steps=300):
    """Runge-Kutta of order 4 for dx/dphi = cos(phi) eps - sin(phi) x0; its error here is below 1e-8."""

    def velocity(x, phi):
        alpha, sigma = math.cos(phi), math.sin(phi)
        return alpha * model.eps(x, alpha, sigma) - sigma * model.x0(x, alpha, sigma)

    h = (end - start) / steps
    for phi in np.linspace(start, end, steps + 1)[:-1]:
        k1 = velocity(sample, phi)
        k2 = velocity(sample + h / 2 * k1, phi + h / 2)
        k3 = velocity(sample + h / 2 * k2, phi + h / 2)
        k4 = velocity(sample + h * k3, phi + h)
        sample = sample + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return sample


def slopes(ends, truth):
    distances = [float((end - truth).flatten(1).norm(dim=1).median()) for end in ends]
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(distances)]


def test_check_4_ddim_is_of_first_order():
    """x' = alpha' x0 + sigma' eps on grids uniform in lambda from -3 to 3."""
    model, ends = toy_t(), []
    for count in (20, 40, 80, 160):
        sample = normal(64, 1, 4, 4)
        phis = np.arctan(np.exp(-np.linspace(-3, 3, count + 1)))
        for now, following in itertools.pairwise(phis):
            alpha, sigma = math.cos(now), math.sin(now)
            x0, eps = model.x0(sample, alpha, sigma), model.eps(sample, alpha, sigma)
            sample = math.cos(following) * x0 + math.sin(following) * eps
        ends.append(sample)
    found = slopes(ends, exact(model, normal(64, 1, 4, 4), phis[0], phis[-1]))
    assert found[1:] == pytest.approx([1, 1], abs=0.1)


@pytest.mark.parametrize("order", [1, 2])
def test_order_of_dpm_solver(order):
    """DPM-Solver++ as diffusers has it, between two integer timesteps that all the grids share."""
    model, ends = toy_t(), []
    for count in (240, 480):
        scheduler = DPMSolverMultistepScheduler(**SD, solver_order=order)
        scheduler.set_timesteps(timesteps=list(range(990, 29, -960 // count)))
        path, sample = path_of(scheduler), normal(64, 1, 4, 4)
        for timestep in scheduler.timesteps[:-1]:  # the last update leaves the grid
            sample = scheduler.step(model(sample, timestep).sample, timestep, sample).prev_sample.double()
        ends.append(sample)
    start, end = (math.atan2(level.sigma, level.alpha) for level in (path[0], path[count]))
    assert slopes(ends, exact(model, normal(64, 1, 4, 4), start, end)) == pytest.approx([order], abs=0.15)
