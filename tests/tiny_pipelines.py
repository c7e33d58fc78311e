"""Tiny instances of real diffusers pipelines with random weights, made without a network.

``TINY[name].build()`` gives a fresh pipeline, ``run(TINY[name], pipe, steps)`` its output as one tensor.
The last layer of every denoiser is fitted (see ``tiny.lesson``), so that samples neither explode nor vanish.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from tiny.lesson import teach
from tiny.text import MAX_LENGTH, clap, clip, gemma2, llama, qwen2_5_vl, t5
from torch import Tensor, nn

Guided = Literal["stacked", "sequential", "none", "embedded"]
PROMPTS = ["a red boot", "a photo of a green dress"]


@dataclass(frozen=True)
class TinyCase:
    """One pipeline: how to build it, how to call it, and what its sampling loop does.

    Arguments:
        name: Key in ``TINY``.
        factory: Module-level function that makes the pipeline.
        call: Arguments of ``pipe(...)``, without the number of steps and the generator.
        guided: How guidance is computed: one call on a doubled batch, several calls, an input, or not at all.
        denoisers: Components that run in each step, in the order of the calls; the last one is the denoiser
            (for Wan 2.2 both are: one or the other runs).
        calls_per_step: Calls of the denoiser in each step.
        strength: Fraction of the steps that are run (image to image).
        cond_first: The order in a stacked batch, and of the calls in sequential guidance.
    """

    name: str
    factory: Callable[[], DiffusionPipeline]
    call: dict[str, Any] = field(repr=False)
    guided: Guided
    denoisers: tuple[str, ...]
    calls_per_step: int = 1
    strength: float = 1.0
    cond_first: bool = False

    def build(self) -> DiffusionPipeline:
        """A new pipeline, always with the same weights; the global generator is left as it was."""
        with seeded(0):
            pipe = self.factory()
            for component in pipe.components.values():
                if isinstance(component, nn.Module):
                    component.eval().requires_grad_(False)
            pipe.set_progress_bar_config(disable=True)
            teach(pipe, self.denoisers, lambda: run(self, pipe, steps=16))
        return pipe

    def updates(self, steps: int) -> int:
        """Number of solver updates in a call with ``num_inference_steps=steps``."""
        return min(int(steps * self.strength), steps)


TINY: dict[str, TinyCase] = {}


@functools.cache
def _built(name):
    return TINY[name].build()


def fresh(name):
    """A new pipeline of a family, always with the same weights."""
    return copy.deepcopy(_built(name))


def run(case: TinyCase, pipe: DiffusionPipeline, steps: int, seed: int = 0, **overrides: Any) -> Tensor:
    """The main output of one call (latents, images, frames or waveforms) as one tensor."""
    call = {"generator": torch.Generator().manual_seed(seed), **case.call, **overrides}
    output = pipe(num_inference_steps=steps, **call)
    return torch.as_tensor(output[0])


def load(folder: str | PathLike, cls: type[DiffusionPipeline] = DiffusionPipeline) -> DiffusionPipeline:
    """A saved pipeline, with its weights copied out of the files.

    Weights that are mapped from a file need not be aligned as those that torch allocates, and then matrix
    products may round differently: a plain ``from_pretrained`` of the Wan pipeline is 1e-6 off.
    """
    pipe = cls.from_pretrained(folder, local_files_only=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            for parameter in component.parameters():
                parameter.data = parameter.data.clone()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from the global generator inside the block are fixed, and not seen outside of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny(
    guided: Guided,
    denoisers: tuple[str, ...] = ("transformer",),
    *,
    calls_per_step: int = 1,
    cond_first: bool = False,
    **call: Any,
) -> Callable[[Callable[[], DiffusionPipeline]], Callable[[], DiffusionPipeline]]:
    """Registers the decorated function as a case of its own name."""

    def register(factory: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
        name, strength = factory.__name__, call.get("strength", 1.0)
        TINY[name] = TinyCase(name, factory, call, guided, denoisers, calls_per_step, strength, cond_first)
        return factory

    return register


def uniform(*shape: int, seed: int = 1) -> Tensor:
    """A fixed tensor with entries in [0, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 1) -> Tensor:
    """A fixed tensor with standard normal entries."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- networks


def autoencoder(**options: Any) -> diffusers.AutoencoderKL:
    """Images (3, 32, 32) to latents (4, 16, 16)."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=32, **options,
    )  # fmt: skip


UNET = {
    "sample_size": 16, "block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "cross_attention_dim": 32, "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}  # fmt: skip


def unet(**options: Any) -> diffusers.UNet2DConditionModel:
    """A text-conditional UNet."""
    up = ("CrossAttnUpBlock2D", "UpBlock2D")
    return diffusers.UNet2DConditionModel(**{**UNET, "up_block_types": up, **options})


def vp(cls: type, **options: Any) -> Any:
    """A variance-preserving scheduler with the schedule of Stable Diffusion."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return cls(num_train_timesteps=1000, **{**schedule, **options})


def ddim_scheduler(**options: Any) -> diffusers.DDIMScheduler:
    """DDIM as Stable Diffusion configures it."""
    return vp(diffusers.DDIMScheduler, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **options)


SAFETY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
STACKED = {"prompt": PROMPTS, "guidance_scale": 5.0, "output_type": "latent"}
SMALL = {"height": 32, "width": 32}


@tiny("stacked", ("unet",), **STACKED, **SMALL)
def sd() -> DiffusionPipeline:
    parts = {"vae": autoencoder(), "unet": unet(), "scheduler": ddim_scheduler(), **clip(), **SAFETY}
    return diffusers.StableDiffusionPipeline(**parts)


@tiny("stacked", ("unet",), **STACKED, **SMALL)
def sd_v_prediction() -> DiffusionPipeline:
    scheduler = ddim_scheduler(prediction_type="v_prediction")
    parts = {"vae": autoencoder(), "unet": unet(), "scheduler": scheduler, **clip(), **SAFETY}
    return diffusers.StableDiffusionPipeline(**parts)


@tiny("stacked", ("unet",), **STACKED, image=uniform(2, 3, 32, 32), strength=0.75)
def sd_img2img() -> DiffusionPipeline:
    scheduler = vp(diffusers.DPMSolverMultistepScheduler, steps_offset=1)
    parts = {"vae": autoencoder(), "unet": unet(), "scheduler": scheduler, **clip(), **SAFETY}
    return diffusers.StableDiffusionImg2ImgPipeline(**parts)


INPAINT = {"image": uniform(2, 3, 32, 32), "mask_image": (uniform(2, 1, 32, 32, seed=2) > 0.5).float()}


@tiny("stacked", ("unet",), **STACKED, **SMALL, **INPAINT)
def sd_inpaint() -> DiffusionPipeline:
    network = unet(in_channels=9)  # latents, mask and masked image are concatenated
    parts = {"vae": autoencoder(), "unet": network, "scheduler": ddim_scheduler(), **clip(), **SAFETY}
    return diffusers.StableDiffusionInpaintPipeline(**parts)


@tiny("stacked", ("unet",), **STACKED, **SMALL, **INPAINT)
def sd_inpaint_blend() -> DiffusionPipeline:
    """An ordinary UNet: the known part of the latents is put back after each step."""
    parts = {"vae": autoencoder(), "unet": unet(), "scheduler": ddim_scheduler(), **clip(), **SAFETY}
    return diffusers.StableDiffusionInpaintPipeline(**parts)


@tiny("stacked", ("controlnet", "unet"), **STACKED, **SMALL, image=uniform(1, 3, 32, 32))
def sd_controlnet() -> DiffusionPipeline:
    control = diffusers.ControlNetModel(
        **{k: v for k, v in UNET.items() if k != "sample_size"}, conditioning_embedding_out_channels=(8, 8)
    )
    zero = [control.controlnet_mid_block, *control.controlnet_down_blocks]
    for parameter in itertools.chain.from_iterable(conv.parameters() for conv in zero):
        nn.init.normal_(parameter, std=0.1)  # a controlnet that does something
    scheduler = vp(diffusers.UniPCMultistepScheduler, steps_offset=1)
    parts = {"vae": autoencoder(), "unet": unet(), "scheduler": scheduler, **clip(), **SAFETY}
    return diffusers.StableDiffusionControlNetPipeline(controlnet=control, **parts)


@tiny("stacked", ("unet",), **STACKED, **SMALL)
def sdxl() -> DiffusionPipeline:
    network = unet(
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8, transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )  # fmt: skip
    parts = {"vae": autoencoder(), "unet": network, **clip(), **clip("_2", projection=True)}
    scheduler = vp(diffusers.EulerDiscreteScheduler, steps_offset=1, timestep_spacing="leading")
    return diffusers.StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)


@tiny("none", ("unet",), batch_size=2, output_type="pt")
def ddim() -> DiffusionPipeline:
    network = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.DDIMPipeline(unet=network, scheduler=diffusers.DDIMScheduler())


# ---------------------------------------------------------------- transformers

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


@tiny("stacked", class_labels=[1, 3], guidance_scale=4.0, output_type="pt", cond_first=True)
def dit() -> DiffusionPipeline:
    network = diffusers.DiTTransformer2DModel(**HEADS, num_layers=2, out_channels=8, sample_size=16)
    labels = {0: "shirt", 1: "trouser, trousers", 2: "dress", 3: "boot"}
    scheduler = diffusers.DDIMScheduler(clip_sample=False)  # a linear schedule, as that of DiT
    return diffusers.DiTPipeline(network, autoencoder(), scheduler, id2label=labels)


@tiny("stacked", **STACKED, **SMALL, max_sequence_length=MAX_LENGTH)
def sd3() -> DiffusionPipeline:
    network = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=16, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=32,
        caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip
    text = {**clip("", True), **clip("_2", True), **t5("_3")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06)
    return diffusers.StableDiffusion3Pipeline(network, scheduler, vae, **text)


def make_flux(guidance_embeds: bool) -> DiffusionPipeline:
    network = diffusers.FluxTransformer2DModel(
        **HEADS, in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=32,
        pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    vae = autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
    parts = {"transformer": network, "vae": vae, "scheduler": scheduler}
    return diffusers.FluxPipeline(**parts, **clip(), **t5("_2"))


FLUX = {"prompt": PROMPTS, "output_type": "latent", "max_sequence_length": MAX_LENGTH, **SMALL}
NEGATIVE = {"negative_prompt": ["blur"] * 2, "true_cfg_scale": 4.0}


@tiny("embedded", **FLUX, guidance_scale=3.5)
def flux() -> DiffusionPipeline:
    return make_flux(guidance_embeds=True)


@tiny("sequential", calls_per_step=2, cond_first=True, **FLUX, **NEGATIVE)
def flux_true_cfg() -> DiffusionPipeline:
    return make_flux(guidance_embeds=False)


@tiny("stacked", **STACKED, **SMALL, max_sequence_length=MAX_LENGTH, use_resolution_binning=False,
      clean_caption=False)  # fmt: skip
def pixart() -> DiffusionPipeline:
    network = diffusers.PixArtTransformer2DModel(
        **HEADS, num_layers=2, sample_size=16, cross_attention_dim=32, caption_channels=32,
        use_additional_conditions=False,
    )  # fmt: skip
    scheduler = vp(diffusers.DPMSolverMultistepScheduler)
    return diffusers.PixArtSigmaPipeline(**t5(), vae=autoencoder(), transformer=network, scheduler=scheduler)


@tiny("stacked", **STACKED, **SMALL, max_sequence_length=MAX_LENGTH, use_resolution_binning=False,
      clean_caption=False, complex_human_instruction=None)  # fmt: skip
def sana() -> DiffusionPipeline:
    network = diffusers.SanaTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32, sample_size=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), scaling_factor=0.4,
        decoder_norm_types="rms_norm", upsample_block_type="interpolate", downsample_block_type="conv",
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(**gemma2(), vae=vae, transformer=network, scheduler=scheduler)


def wan_transformer() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    )  # fmt: skip


def wan_autoencoder(cls: type) -> Any:
    """Videos (3, 1 + 4 n, 8 h, 8 w) to latents (4, 1 + n, h, w)."""
    statistics = {"latents_mean": [0.1, 0.0, -0.1, 0.2], "latents_std": [1.5, 1.2, 1.0, 2.0]}
    return cls(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics)


VIDEO = {"prompt": PROMPTS[0], "negative_prompt": "blur", "guidance_scale": 5.0, "output_type": "latent"}
WAN = {**VIDEO, "height": 32, "width": 48, "num_frames": 5, "max_sequence_length": MAX_LENGTH}


@tiny("sequential", calls_per_step=2, cond_first=True, **WAN)
def wan() -> DiffusionPipeline:
    parts = {"vae": wan_autoencoder(diffusers.AutoencoderKLWan), "transformer": wan_transformer()}
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(**t5("", "UMT5"), **parts, scheduler=scheduler)


@tiny("sequential", ("transformer", "transformer_2"), calls_per_step=2, cond_first=True, **WAN,
      guidance_scale_2=3.0)  # fmt: skip
def wan22() -> DiffusionPipeline:
    """Two networks: one above 0.875 of the training time (2 of 4 steps), another below."""
    parts = {"vae": wan_autoencoder(diffusers.AutoencoderKLWan), "transformer": wan_transformer()}
    parts |= {"transformer_2": wan_transformer(), "boundary_ratio": 0.875}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    return diffusers.WanPipeline(**t5("", "UMT5"), **parts, scheduler=scheduler)


@tiny("sequential", calls_per_step=2, cond_first=True, prompt=PROMPTS, output_type="latent", height=64,
      width=64, **NEGATIVE)  # fmt: skip
def qwenimage() -> DiffusionPipeline:
    network = diffusers.QwenImageTransformer2DModel(
        **HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    parts = {"vae": wan_autoencoder(diffusers.AutoencoderKLQwenImage), "transformer": network}
    return diffusers.QwenImagePipeline(**parts, **qwen2_5_vl(), scheduler=scheduler)


@tiny("stacked", **VIDEO, height=64, width=64, num_frames=9, max_sequence_length=MAX_LENGTH)
def ltx() -> DiffusionPipeline:
    network = diffusers.LTXVideoTransformer3DModel(
        **HEADS, in_channels=8, out_channels=8, cross_attention_dim=32, num_layers=2, caption_channels=32
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
        shift_terminal=0.1,
    )  # fmt: skip
    return diffusers.LTXPipeline(scheduler, vae, transformer=network, **t5())


HUNYUAN = {
    "prompt": PROMPTS[0], "prompt_template": {"template": "a photo of {}", "crop_start": 3},
    "guidance_scale": 6.0, "output_type": "latent", "max_sequence_length": MAX_LENGTH,
}  # fmt: skip


@tiny("embedded", **HUNYUAN, height=32, width=32, num_frames=5)
def hunyuan_video() -> DiffusionPipeline:
    network = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts = {"transformer": network, "vae": vae, "scheduler": scheduler, **llama()}
    return diffusers.HunyuanVideoPipeline(**parts, **clip("_2", length=77))


AUDIO = {"prompt_embeds": normal(1, 32), "negative_prompt_embeds": normal(1, 32, seed=2)}


@tiny("stacked", ("unet",), **AUDIO, guidance_scale=2.0, audio_length_in_s=0.02, output_type="latent")
def musicldm() -> DiffusionPipeline:
    """Sound; the prompt is a class embedding, and passed as such."""
    network = unet(class_embed_type="simple_projection", projection_class_embeddings_input_dim=32,
                   class_embeddings_concat=True)  # fmt: skip
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )  # fmt: skip
    vae = autoencoder(in_channels=1, out_channels=1)  # spectrograms
    parts = {"vae": vae, "unet": network, "vocoder": transformers.SpeechT5HifiGan(config)}
    return diffusers.MusicLDMPipeline(**parts, **clap(), scheduler=ddim_scheduler())
