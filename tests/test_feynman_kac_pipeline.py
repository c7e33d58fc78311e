"""Feynman-Kac correctors in real pipelines: against loops written independently, and exact densities."""

import copy
import itertools
import json
import math

import diffusers
import pytest
import torch
from corrected import BOOT, DRESS, corrected, seeded
from diffusers.utils.torch_utils import randn_tensor
from tiny_pipelines import TINY, fresh, run, vp

from diffaccel import FeynmanKacPipeline, accelerate
from diffaccel.errors import OptionError, UnsupportedPipeline
from diffaccel.noise import path_of
from diffaccel.pipelines.feynman_kac_report import FeynmanKacReport
from diffaccel.toy import GaussianMixtureModel


def loop(predict, levels, shape, exponents, count, zeta=1.0, seed=0):
    """Particles without resampling, written from the formulas: the end samples and the log-weights.

    ``predict`` gives every expert's prediction of the noise, and its x0, from the sample and the step.
    """
    generator = seeded(seed)
    total = sum(exponents)
    noise = randn_tensor((len(exponents) * count, *shape), generator=generator)[:count]
    x = noise * predict.initial / math.sqrt(total)
    logs = torch.zeros(count, dtype=torch.float64)
    power = (1 + zeta**2) * total - 1
    for index, (level, target) in enumerate(itertools.pairwise(levels)):
        eps, x0 = predict(x, index)
        b = torch.tensor(exponents, dtype=torch.float64).reshape(-1, *[1] * x.ndim)
        mean, data = ((b * part.double()).sum(0) / total for part in (eps, x0))
        if index + 2 == len(levels):
            return data, logs
        if level[0] == 0:
            x = (target[0] * data + target[1] * mean).float()
            continue
        ratio = (target[1] / target[0]) / (level[1] / level[0])
        naive = (total * mean).square().flatten(1).sum(1) - (b * eps.double() ** 2).flatten(2).sum((0, 2))
        sharp = (1 - 1 / total) * (total * mean).square().flatten(1).sum(1)
        logs = logs - math.log(ratio) * sharp + (ratio**-2 - 1) / 2 * (naive - sharp)
        z = randn_tensor(tuple(x.shape), generator=generator)
        spread = zeta * math.sqrt((1 - ratio ** (2 * power)) / power) if zeta else 0.0
        x = (target[0] * data + target[1] * (ratio**power * mean + spread * z)).float()
    raise AssertionError


def prediction(pipe, steps, outputs, initial=1.0, **options):
    """Turns ``outputs(x, timestep)``, a list with a tensor for each expert, into `loop`'s ``predict``."""
    pipe.scheduler.set_timesteps(steps, **options)
    path, times = path_of(pipe.scheduler), pipe.scheduler.timesteps

    def predict(x, index):
        with torch.no_grad():
            found = outputs(x, times[index])
        eps = torch.stack([path[index].eps(output, x) for output in found])
        return eps, torch.stack([path[index].x0(output, x) for output in found])

    predict.initial = initial
    return predict, [level[:2] for level in path.levels]


def assert_same(result, expected):
    samples, logs = expected
    assert torch.allclose(result.latents.double(), samples, rtol=1e-4, atol=1e-4)
    assert torch.allclose(result.log_weights.flatten(), logs, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- against independent loops

PLAIN = {"num_particles": 3, "resampling": "none"}


def test_one_density_is_ancestral_sampling_without_weights():
    pipe = fresh("sd")
    text = pipe.encode_prompt([BOOT] * 3, "cpu", 1, False)[0]
    predict, levels = prediction(pipe, 5, lambda x, t: [pipe.unet(x, t, text).sample])
    assert_same(corrected("sd", **PLAIN), loop(predict, levels, (4, 16, 16), [1.0], 3))
    result = corrected("sd", num_particles=3)
    assert not result.log_weights.any() and not result.report.events
    assert torch.equal(result.ancestors, torch.arange(3)[None])


@pytest.mark.parametrize("zeta", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("name", ["sd", "sd_v_prediction"])
def test_guidance_of_stable_diffusion(name, zeta):
    pipe = fresh(name)
    text = pipe.encode_prompt([BOOT] * 3, "cpu", 1, False)[0]
    empty = pipe.encode_prompt([""] * 3, "cpu", 1, False)[0]
    predict, levels = prediction(pipe, 5, lambda x, t: [pipe.unet(x, t, c).sample for c in (empty, text)])
    expected = loop(predict, levels, (4, 16, 16), [-2.0, 3.0], 3, zeta)
    result = corrected(name, guidance_scale=3.0, zeta=zeta, **PLAIN)
    assert_same(result, expected)
    assert result.log_weights.std() > 1e-3


def test_guidance_of_dit_with_its_null_class():
    pipe = fresh("dit")

    def outputs(x, t):
        labels = (torch.tensor([label] * 3) for label in (1000, 2))
        return [pipe.transformer(x, t.expand(3), class_labels=label).sample[:, :4] for label in labels]

    predict, levels = prediction(pipe, 5, outputs)
    expected = loop(predict, levels, (4, 16, 16), [-1.5, 2.5], 3)
    for label in (2, "dress"):
        assert_same(corrected("dit", label, guidance_scale=2.5, **PLAIN), expected)


def test_guidance_of_stable_diffusion_3_from_pure_noise():
    pipe = fresh("sd3")
    options = {"device": "cpu", "max_sequence_length": TINY["sd3"].call["max_sequence_length"]}
    known = [
        pipe.encode_prompt([text] * 3, None, None, do_classifier_free_guidance=False, **options)
        for text in ("blur", BOOT)
    ]

    def outputs(x, t):
        return [
            pipe.transformer(
                x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t.expand(3)
            ).sample
            for text, _, pooled, _ in known
        ]

    predict, levels = prediction(pipe, 5, outputs)
    assert levels[0] == (0, 1)
    expected = loop(predict, levels, (4, 16, 16), [-2.0, 3.0], 3)
    assert_same(corrected("sd3", guidance_scale=3.0, negative_prompt="blur", **PLAIN), expected)


def test_guidance_of_stable_diffusion_xl_has_zeros_for_no_text():
    """As the pipeline's own: its two branches are captured from a call with guidance."""
    pipe, seen = fresh("sdxl"), []
    handle = pipe.unet.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    run(TINY["sdxl"], pipe, 2, prompt=[BOOT] * 3)
    handle.remove()
    own = seen[0]

    def outputs(x, t):
        scaled = x / (pipe.scheduler.sigmas[list(pipe.scheduler.timesteps).index(t)] ** 2 + 1) ** 0.5
        halves = (slice(0, 3), slice(3, 6))
        return [
            pipe.unet(scaled, t, own["encoder_hidden_states"][half],
                      added_cond_kwargs={k: v[half] for k, v in own["added_cond_kwargs"].items()}).sample
            for half in halves
        ]  # fmt: skip

    pipe.scheduler.set_timesteps(5)
    predict, levels = prediction(pipe, 5, outputs, float(pipe.scheduler.init_noise_sigma))
    result = corrected("sdxl", guidance_scale=3.0, **PLAIN)
    assert_same(result, loop(predict, levels, (4, 16, 16), [-2.0, 3.0], 3))
    assert result.report.evaluations == 5 * 2 * 3
    other = corrected("sdxl", guidance_scale=3.0, negative_prompt="", **PLAIN)
    assert not torch.allclose(other.latents, result.latents, atol=1e-3)


def test_products_and_temperature():
    pipe = fresh("sd")
    texts = [pipe.encode_prompt([text] * 3, "cpu", 1, False)[0] for text in (BOOT, DRESS)]
    predict, levels = prediction(pipe, 5, lambda x, t: [pipe.unet(x, t, text).sample for text in texts])
    expected = loop(predict, levels, (4, 16, 16), [2.0, -0.5], 3)
    result = corrected("sd", [BOOT, DRESS], [1.0, -0.25], temperature=0.5, **PLAIN)
    assert_same(result, expected)
    assert result.report.exponents == (2.0, -0.5)


def test_sana_prepends_its_instruction_to_prompts_only():
    """With the prompt as negative one, guidance is none: but for the instruction that only prompts have."""
    options = {"guidance_scale": 3.0, "negative_prompt": BOOT, "num_particles": 2, "resampling": "none"}
    assert not corrected("sana", **options).log_weights.any()
    with_instruction = corrected("sana", complex_human_instruction=["draw"], **options)
    assert with_instruction.log_weights.any()


# ---------------------------------------------------------------- rows, groups, randomness


def test_rows_are_expert_by_expert_and_share_their_samples():
    pipe, samples, labels = fresh("dit"), [], []
    handles = [  # the first hook is inside of the gate, where samples are replaced
        pipe.transformer.pos_embed.register_forward_pre_hook(lambda _, args: samples.append(args[0])),
        pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: labels.append(kwargs["class_labels"].tolist()), with_kwargs=True
        ),
    ]
    corrected("dit", [1, 3], num_particles=2, num_images_per_prompt=3, pipe=pipe)
    for handle in handles:
        handle.remove()
    assert labels == [[1] * 6 + [3] * 6] * 5
    assert all(torch.equal(sample[:6], sample[6:]) for sample in samples)
    first = randn_tensor((12, 4, 16, 16), generator=seeded())[:6] / math.sqrt(2)  # the product's prior
    assert torch.allclose(samples[0][:6], first)


def test_experts_that_are_the_same_make_one():
    one = corrected("sd", num_particles=4)
    for weights in ([0.5, 0.5], [0.25, 0.75], [-1.0, 2.0]):
        many = corrected("sd", [BOOT, BOOT], weights, num_particles=2, resampling="none", seed=3)
        assert many.log_weights.abs().max() < 1e-4  # rows of a batch may round differently
    assert one.latents.shape == (4, 4, 16, 16)


def test_one_generator_decides_all():
    options = {"guidance_scale": 4.0, "num_particles": 4, "num_images_per_prompt": 2}
    first, again = (corrected("sd", seed=1, **options) for _ in range(2))
    assert torch.equal(first.images, again.images) and torch.equal(first.ancestors, again.ancestors)
    assert torch.equal(first.log_weights, again.log_weights) and torch.equal(first.drawn, again.drawn)
    assert first.report.events and first.report.to_dict()["effective"] == again.report.to_dict()["effective"]
    assert not torch.equal(corrected("sd", seed=2, **options).images, first.images)


def test_outputs():
    """Drawn particles, or all: the pictures are those of their latents."""
    options = {"guidance_scale": 2.0, "num_particles": 3, "num_images_per_prompt": 2, "seed": 4}
    drawn, everything = (corrected("sd", output=output, **options) for output in ("draw", "all"))
    assert drawn.images.shape[0] == 2 and everything.images.shape[0] == 6
    assert torch.equal(everything.drawn, torch.arange(6))
    assert [int(row) // 3 for row in drawn.drawn] == [0, 1]
    for result in (drawn, everything):
        assert torch.equal(result.images, result.latents[result.drawn])
        assert result.log_weights.shape == result.ancestors.shape == (2, 3)
        assert int(result.ancestors.max()) < 3
    pictures = corrected("sd", output_type="pil", **options).images
    assert len(pictures) == 2 and pictures[0].size == (32, 32)


def test_draws_follow_the_weights():
    """Without resampling, a particle with all of the weight is drawn whatever the generator says."""
    for seed in range(4):
        result = corrected("sd", num_particles=4, resampling="none", seed=seed, reward_scale=1e4,
                           reward=lambda x0: x0.flatten(1).mean(1))  # fmt: skip
        assert int(result.drawn) == int(result.log_weights.argmax())
        assert int(result.drawn) == int(result.latents.flatten(1).mean(1).argmax())


def test_report_is_json():
    report = corrected("sd3", guidance_scale=3.0, num_particles=4, num_images_per_prompt=2).report
    assert isinstance(report, FeynmanKacReport)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["log_snr"][0] is None and len(content["log_snr"]) == len(content["effective"]) == 5
    assert content["evaluations"] == 5 * 2 * 2 * 4 and content["seconds"] > 0
    assert all(sum(weights) == pytest.approx(1) for weights in content["weights"])
    assert all(0 <= step < 5 and group in (0, 1) for step, group in content["events"])
    assert len(content["log_normalizer"]) == 2 and content["settings"]["zeta"] == 1.0
    assert "evaluations" in str(report)


FAMILIES = ("sd", "sdxl", "sd3", "dit", "pixart", "sana", "wan", "wan22", "flux", "qwenimage", "ltx",
            "hunyuan_video", "sd_controlnet")  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    result = corrected(name, 1 if name == "dit" else BOOT, steps=4, guidance_scale=3.0, num_particles=2,
                       num_images_per_prompt=2, resampling="none")  # fmt: skip
    assert len(result.images) == 2 and bool(torch.as_tensor(result.latents).isfinite().all())
    assert result.report.evaluations == 4 * 2 * 4
    assert result.log_weights.std() > 0


def test_unconditional_pipeline_with_a_temperature():
    plain, cold = (corrected("ddim", None, temperature=t, num_particles=4) for t in (1.0, 0.9))
    assert not plain.log_weights.any() and plain.images.shape == (1, 3, 16, 16)
    assert min(min(sizes) for sizes in cold.report.effective) < 4


@pytest.mark.parametrize(
    "scheduler", ["EulerDiscreteScheduler", "LMSDiscreteScheduler", "EulerAncestralDiscreteScheduler",
                  "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDPMScheduler", "PNDMScheduler"],
)  # fmt: skip
def test_schedulers_give_levels_only(scheduler):
    """Whatever the solver and its coordinates: the same levels give the same particles."""
    pipe = fresh("sd")
    cls = getattr(diffusers, scheduler)
    options = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    pipe.scheduler = vp(cls, timestep_spacing="leading", steps_offset=1, **options)
    if scheduler == "PNDMScheduler":  # has a level twice
        assert corrected("sd", pipe=pipe, num_particles=2).report.evaluations == 6 * 2
        return
    options = {"guidance_scale": 2.0, "num_particles": 3, "resampling": "none"}
    expected, found = corrected("sd", **options), corrected("sd", pipe=pipe, **options)
    assert bool(found.latents.isfinite().all())
    if scheduler not in ("EulerDiscreteScheduler", "LMSDiscreteScheduler"):
        return  # these draw noise that is not used, or have other levels
    assert torch.allclose(found.latents, expected.latents, rtol=2e-3, atol=2e-3)
    assert torch.allclose(found.log_weights, expected.log_weights, rtol=1e-2, atol=1e-2)


def test_half_precision():
    pipe = fresh("sd").to(torch.bfloat16)
    result = corrected("sd", pipe=pipe, guidance_scale=2.0, num_particles=2)
    assert result.images.dtype == torch.bfloat16 and result.latents.dtype == torch.float32
    assert bool(result.images.isfinite().all())


# ---------------------------------------------------------------- exact densities


def mixture_pipeline(prediction_type="epsilon", means=(-0.5, 0.6)):
    """A mixture on the line, as an image of one pixel."""
    model = GaussianMixtureModel.from_means(
        torch.tensor(means, dtype=torch.float64).reshape(-1, 1, 1, 1), std=0.2, weights=[0.7, 0.3],
        prediction_type=prediction_type,
    )  # fmt: skip
    scheduler = vp(diffusers.DDIMScheduler, timestep_spacing="trailing", prediction_type=prediction_type)
    pipe = diffusers.DDIMPipeline(unet=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_mixture_at_a_temperature():
    """q^{1 / 0.5}: mass 0.845 at -0.5, with standard deviations that shrink by sqrt(2)."""
    fkc = FeynmanKacPipeline.from_pipe(mixture_pipeline())
    options = {"temperature": 0.5, "num_particles": 1000, "num_images_per_prompt": 8, "data_std": 0.2}

    def sample(**more):
        """Weights and samples, (8, 1000), and the weighted variance around the left mode."""
        result = fkc(num_inference_steps=150, generator=seeded(), output_type="pt", **options, **more)
        weights, y = result.log_weights.softmax(-1), result.latents.reshape(8, 1000)
        weights = weights if more.get("resampling") != "none" else torch.ones_like(weights)
        left = weights * (y < 0.05)
        return weights, y, ((left * (y + 0.5) ** 2).sum(1) / left.sum(1)).mean().item(), result.report

    weights, y, inner, report = sample()
    grid = torch.linspace(-2, 2, 40_001, dtype=torch.float64)
    q = sum(w * (-((grid - m) ** 2) / (2 * 0.2**2)).exp() for w, m in ((0.7, -0.5), (0.3, 0.6)))
    mean = (q**2 * grid).sum().item() / (q**2).sum().item()
    assert mean == pytest.approx(0.155 * 0.6 - 0.845 * 0.5, abs=2e-3)
    means = (weights * y).sum(1)
    assert abs(means.mean().item() - mean) < 3 * means.std().item() / math.sqrt(8) + 0.02
    ratio = math.exp(-report.log_snr[-1])  # the end is x0, whose variance is less by so much
    shrunk = 0.2**2 / (0.2**2 + ratio**2)
    assert inner == pytest.approx(0.02 * shrunk, rel=0.06)
    assert sample(resampling="none")[2] < 0.85 * inner  # without weights: narrower by the SDE's own rule
    plain = fkc(
        num_inference_steps=150, generator=seeded(), output_type="pt", **{**options, "temperature": 1.0}
    )
    assert not plain.log_weights.any()


# ---------------------------------------------------------------- other models


def test_another_model_with_the_same_weights_is_the_same():
    options = {"num_particles": 2, "resampling": "none"}
    expected = corrected("sd", [BOOT, DRESS], [1.0, 0.5], **options)
    result = corrected("sd", [BOOT, DRESS], [1.0, 0.5], models=[None, fresh("sd")], **options)
    assert torch.allclose(result.latents, expected.latents, atol=1e-4)
    assert torch.allclose(result.log_weights, expected.log_weights, rtol=1e-3, atol=1e-3)
    assert result.report.evaluations == expected.report.evaluations
    own = fresh("sd")
    again = corrected("sd", [BOOT, DRESS], [1.0, 0.5], pipe=own, models=[own, own], **options)
    assert torch.equal(again.latents, expected.latents)


def other_model():
    other = fresh("sd")
    with torch.no_grad():
        for parameter in other.unet.conv_out.parameters():
            parameter.mul_(0.7)
    return other


def test_product_of_two_models():
    pipe, other = fresh("sd"), other_model()
    before = copy.deepcopy(other.scheduler.__dict__)
    text = pipe.encode_prompt([BOOT] * 3, "cpu", 1, False)[0]
    predict, levels = prediction(pipe, 5, lambda x, t: [p.unet(x, t, text).sample for p in (other, pipe)])
    expected = loop(predict, levels, (4, 16, 16), [0.5, 1.0], 3)
    result = corrected("sd", [BOOT, BOOT], [0.5, 1.0], models=[other, None], **PLAIN)
    assert_same(result, expected)
    assert other.scheduler.__dict__.keys() == before.keys()
    assert other.scheduler.num_inference_steps == before["num_inference_steps"] != 5
    assert "forward" not in other.unet.__dict__


def test_guidance_of_each_model_by_itself():
    pipe, other = fresh("sd"), other_model()
    text, empty = (pipe.encode_prompt([t] * 3, "cpu", 1, False)[0] for t in (BOOT, ""))

    def outputs(x, t):
        return [p.unet(x, t, c).sample for c in (empty, text) for p in (pipe, other)]

    predict, levels = prediction(pipe, 5, outputs)
    expected = loop(predict, levels, (4, 16, 16), [-1.0, -0.5, 2.0, 1.0], 3)
    options = {"guidance_scale": 2.0, "models": [None, other], **PLAIN}
    assert_same(corrected("sd", [BOOT, BOOT], [1.0, 0.5], **options), expected)


class WithVariance(GaussianMixtureModel):
    """Predicts a variance as well."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.sample = torch.cat([output.sample] * 2, 1)
        return output


def test_models_may_predict_something_else():
    """A network of velocities beside one of noise; both are the same mixture."""
    pipe, other = mixture_pipeline(), mixture_pipeline("v_prediction")
    options = {"num_particles": 20, "num_inference_steps": 20, "output_type": "pt", "resampling": "none"}
    fkc = FeynmanKacPipeline.from_pipe(pipe)
    result = fkc(None, [0.5, 0.5], models=[None, other], generator=seeded(), **options)
    assert result.log_weights.abs().max() < 1e-4
    with pytest.raises(UnsupportedPipeline, match="noise levels"):
        other.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
        fkc(None, [0.5, 0.5], models=[None, other], **options)
    with pytest.raises(OptionError, match="at least one"):
        fkc(None, [0.5, 0.5], models=[other, other], **options)
    with pytest.raises(UnsupportedPipeline, match="accelerated"):
        fkc(None, [0.5, 0.5], models=[None, accelerate(mixture_pipeline(), "reuse")], **options)
    with pytest.raises(UnsupportedPipeline, match="different shapes"):
        wider = mixture_pipeline()
        wider.unet.__class__ = WithVariance
        fkc(None, [0.5, 0.5], models=[None, wider], **options)


# ---------------------------------------------------------------- the pipeline itself


@pytest.mark.parametrize("name", ["sd", "flux", "dit"])
def test_pipeline_is_left_as_it_is(name):
    pipe = fresh(name)
    expected = run(TINY[name], pipe, 3)
    before, scheduler = dict(pipe.__dict__), copy.deepcopy(pipe.scheduler.__dict__)
    corrected(name, 1 if name == "dit" else BOOT, pipe=pipe, steps=4, num_particles=2)
    assert pipe.__dict__.keys() == before.keys()
    assert all(pipe.__dict__[key] is value for key, value in before.items())
    assert {key: str(value) for key, value in pipe.scheduler.__dict__.items()} == {
        key: str(value) for key, value in scheduler.items()
    }
    assert all(
        "forward" not in part.__dict__ for part in pipe.components.values() if hasattr(part, "forward")
    )
    assert torch.equal(run(TINY[name], pipe, 3), expected)


def test_an_error_leaves_the_pipeline_as_it_is():
    pipe = fresh("sd")

    def reward(x0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corrected("sd", pipe=pipe, num_particles=2, reward=reward)
    assert "forward" not in pipe.unet.__dict__ and "step" not in pipe.scheduler.__dict__
    assert bool(run(TINY["sd"], pipe, 2).isfinite().all())
