"""DiffuseHigh: images larger than a model was trained for, by a ladder of sizes with structure guidance.

::

    high = DiffuseHighPipeline.from_pipe(pipe)
    image = high("a baby bunny on a stack of pancakes", target_sizes=[1536, 2048]).images[0]

The pipeline makes an image at its own size.  For each size of the ladder the image is enlarged and sharpened,

    g = (1 + a) U(image) - a blur(U(image)),      z = encode(g),      x = alpha z + sigma eps

with the level (alpha, sigma) of the last ``noising_steps`` of the schedule, and denoised from there on, while
in the first ``dwt_steps`` the coarse wavelet band of the predicted image is that of g.

References:
    DiffuseHigh: Training-free Progressive High-Resolution Image Synthesis through Structure Guidance (2024),
    arXiv 2406.18459.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import OptionError, UnsupportedPipeline
from ..noise import path_of
from ..options import check_options, option
from .attach import accelerate
from .branches import is_embedded, samples_of
from .capturing import first_evaluation, sibling
from .diffusehigh_checks import arguments_of, check_pipeline, parameters_of_call, sizes_of
from .late_start import begin_from, late_start, prepared
from .latent_images import LatentImages
from .report import Report
from .run import denoisers_of
from .structure_guidance import Guide, Record, StructureGuidance, Watch, sharpened, upsampled
from .wavelets import MODES

__all__ = ["DiffuseHighOutput", "DiffuseHighPipeline"]

SCALES = (5.0, 10.0)
"""The guidance scales of the paper's code, at the model's own size and above."""

_OF_BASE = ("latents", "sigmas", "timesteps")
"""The arguments of a call that say where and how the first image begins."""


@dataclass(frozen=True)
class DiffuseHighOutput:
    """What a call returns.

    Arguments:
        images: The images of the last size, in the form that was asked for.
        stages: The images of every stage, the first one's at the model's size: (B, 3, H, W) in [0, 1].
        reports: The reports of the pipeline's calls, in their order.
    """

    images: Any
    stages: tuple[Tensor, ...]
    reports: tuple[Report, ...]


@dataclass(frozen=True)
class _Rules:
    """The options of a call, checked."""

    num_inference_steps: int = option(50, low=1)
    noising_steps: int = option(15, low=0)
    dwt_steps: int = option(5, low=0)
    dwt_level: int = option(1, low=1, high=8)
    dwt_mode: str = option("symmetric", choices=MODES)
    sharpening_alpha: float = option(1.0, low=0.0)
    output_type: str = option("pil", choices=("pil", "np", "pt"))
    sharpening_sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        """Checks the options."""
        check_options(self, "DiffuseHigh")
        if self.noising_steps > self.num_inference_steps:
            raise OptionError(
                f"noising_steps={self.noising_steps} of num_inference_steps={self.num_inference_steps} steps"
            )
        bounds = self.sharpening_sigma
        if not (isinstance(bounds, (list, tuple)) and len(bounds) == 2 and 0 < bounds[0] <= bounds[1] < 100):
            raise OptionError(
                f"sharpening_sigma is {bounds!r}; expected two rising numbers of pixels above 0"
            )


class DiffuseHighPipeline:
    """Makes large images with a text-to-image pipeline; make it with `from_pipe`.

    Any pipeline will do that makes images from prompts (or class labels) through a VAE, with any scheduler
    whose noise levels are known, and a network that takes other sizes.  Accelerators of the pipeline serve
    all stages: ``high.to(accel="sada")``, but for those that bring a schedule of their own, and plans.

    Where this differs from the published code: any solver gets the prediction with the guide's band, not
    Euler's only; every image has a blur of its own, drawn from the generator; tiles of the VAE are left to
    ``pipe.vae.enable_tiling()``.  The schedule of the model's own size serves all stages.

    Arguments:
        pipe: The pipeline, whose calls are made by siblings with the same components.

    Raises:
        UnsupportedPipeline: If it makes something else, or in another way.
    """

    def __init__(self, pipe: Any) -> None:
        check_pipeline(pipe)
        self.pipe = pipe

    @classmethod
    def from_pipe(cls, pipe: Any) -> Self:
        """Returns the pipeline for large images of a pipeline, which it holds."""
        return cls(pipe)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves, converts or accelerates the pipeline, as its own ``to``."""
        self.pipe.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        target_sizes: int | Sequence[int | tuple[int, int]] | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        noising_steps: int = 15,
        guidance_scale: float | None = None,
        diffusehigh_guidance_scale: float | None = None,
        dwt_steps: int = 5,
        dwt_level: int = 1,
        dwt_mode: str = "symmetric",
        sharpening_alpha: float = 1.0,
        sharpening_sigma: tuple[float, float] = (0.1, 2.0),
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> DiffuseHighOutput:
        """Makes images of the last of the target sizes.

        Arguments:
            prompt: One prompt or several.
            target_sizes: The sizes of the ladder, each one number for a square or (height, width); by default
                twice, three and four times the first size.
            image: Images to enlarge, in the place of generated ones: a picture or a list of them, or an array
                (B, H, W, 3) or tensor (B, 3, H, W) in [0, 1].  They are brought to the first size.
            height: The height of the first size, in pixels; the model's by default.
            width: The width of the first size, in pixels; the model's by default.
            num_inference_steps: The steps of the schedule.
            noising_steps: The last of them, which each further size makes; 0 for none.
            guidance_scale: The guidance scale at the first size; 5 by default where guidance is computed from
                two predictions, otherwise the pipeline's own.
            diffusehigh_guidance_scale: The guidance scale above; 10 by default, or the pipeline's own.
            dwt_steps: The first steps of a size in which the coarse band is the guide's.
            dwt_level: The levels of the wavelet transform.
            dwt_mode: How images go on beyond their borders: "symmetric" or "periodization".
            sharpening_alpha: The strength of sharpening, 0 for none.
            sharpening_sigma: The bounds of the standard deviation of its blur, in pixels.
            generator: The source of all randomness, or one for each image.
            output_type: "pil", "np" (B, H, W, 3), or "pt" (B, 3, H, W).
            call: Further arguments of the pipeline's call.

        Raises:
            OptionError: If an argument is unknown, out of range, or contradicts another.
            UnsupportedPipeline: If the pipeline cannot be driven, with the reason.
        """
        rules = _Rules(num_inference_steps, noising_steps, dwt_steps, dwt_level, dwt_mode, sharpening_alpha,
                       output_type, sharpening_sigma)  # fmt: skip
        check_pipeline(self.pipe)
        ways = LatentImages(self.pipe)
        size, ladder = sizes_of(self.pipe, ways, (height, width), target_sizes)
        arguments = arguments_of(self.pipe, prompt, call, size)
        scales = _scales(self.pipe, guidance_scale, diffusehigh_guidance_scale)
        climb = _Climb(self.pipe, ways, rules, arguments, scales, size, generator)
        return climb.run(_pictures(image, size), ladder)


class _Climb:
    """One call: the way up the ladder."""

    def __init__(
        self,
        pipe: Any,
        ways: LatentImages,
        rules: _Rules,
        arguments: dict[str, Any],
        scales: tuple[dict[str, float], dict[str, float]],
        size: tuple[int, int],
        generator: Any,
    ) -> None:
        self.pipe, self.ways, self.rules, self.size, self.generator = pipe, ways, rules, size, generator
        self.arguments = {**arguments, **scales[0], "num_inference_steps": rules.num_inference_steps}
        self.later = {name: value for name, value in arguments.items() if name not in _OF_BASE}
        self.later |= {**scales[1], "num_inference_steps": rules.noising_steps}
        self.known = parameters_of_call(pipe)
        self.device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
        self.dtype: torch.dtype = next(iter(denoisers_of(pipe).values())).dtype  # type: ignore[assignment]
        self.reports: list[Report] = []
        self.checked = False

    def run(self, images: Tensor | None, ladder: Sequence[tuple[int, int]]) -> DiffuseHighOutput:
        """Returns what comes of images, or of those that the pipeline makes.

        Arguments:
            images: Images (n, 3, H, W) in [0, 1], or None.
            ladder: The sizes above theirs.
        """
        if images is None:
            images, schedule = self._base()
        else:
            images, schedule = self._given(images)
        late = late_start(schedule, self.rules.noising_steps) if self.rules.noising_steps else None
        stages = [images]
        for size in ladder:
            stages.append(self._stage(stages[-1], size, late))
        return DiffuseHighOutput(
            _shown(stages[-1], self.rules.output_type), tuple(stages), tuple(self.reports)
        )

    def _base(self) -> tuple[Tensor, Any]:
        """Returns images of the model's size, and the schedule by which they were made."""
        record = Record()
        images = self._call(Watch(record), record, self.arguments, self.size)
        return images, record.schedule

    def _given(self, images: Tensor) -> tuple[Tensor, Any]:
        """Returns given images, one for each sample, and the schedule for their size."""
        count = samples_of(self.pipe, self.arguments) or len(images)
        if len(images) not in (1, count):
            raise OptionError(f"{len(images)} images for {count} samples")
        images = images.expand(count, -1, -1, -1).to(self.device)
        plain = accelerate(sibling(self.pipe), None)
        arguments = {**self.arguments, **self._sized(self.size)}
        return images, prepared(first_evaluation(plain, arguments).call.run.scheduler)

    def _stage(self, images: Tensor, size: tuple[int, int], late: Any) -> Tensor:
        """Returns the images of the next size."""
        rules, large = self.rules, upsampled(images, size)
        if rules.sharpening_alpha:
            low, high = rules.sharpening_sigma
            sigmas = low + (high - low) * self._uniforms(len(images))
            large = sharpened(large, rules.sharpening_alpha, sigmas)
        latents = self.ways.encode(large)
        if late is None:
            return self.ways.decode(latents)
        guide = Guide(large, self.ways, rules.dwt_steps, rules.dwt_level, rules.dwt_mode)
        level = path_of(late)[0]
        noise = randn_tensor(latents.shape, self.generator, self.device, self.dtype)
        begin = self.ways.pack(level.alpha * latents + level.sigma * noise).to(self.dtype)
        arguments = dict(self.later)
        if "latents" in self.known:
            arguments["latents"] = begin
        else:
            begin_from(late, begin)
        record = Record()
        return self._call(StructureGuidance(record, late, begin, guide), record, arguments, size)

    def _call(
        self, driver: Watch, record: Record, arguments: dict[str, Any], size: tuple[int, int]
    ) -> Tensor:
        """Returns the images (B, 3, H, W) of a call of the pipeline, with its accelerators and ours."""
        stack = self.pipe.accel.stack if hasattr(type(self.pipe), "_diffaccel_base") else ()
        pipe = accelerate(sibling(self.pipe), [*stack, driver])
        images = pipe(**arguments, **self._sized(size), generator=self.generator, output_type="pt")[0].float()
        self.reports.append(pipe.accel.report)
        if not self.checked:
            final = record.latents
            if final is None or not self.ways.explains(final[: len(images)], images):
                raise UnsupportedPipeline(
                    f"how {type(self.pipe).__name__} makes images of its latents is not known: they are not "
                    "those of its VAE"
                )
            self.checked = True
        return images

    def _sized(self, size: tuple[int, int]) -> dict[str, int]:
        sides = {"height": size[0], "width": size[1]}
        return {name: side for name, side in sides.items() if name in self.known}

    def _uniforms(self, count: int) -> Tensor:
        """Returns a random number in [0, 1) for each image, (count)."""
        sources = self.generator if isinstance(self.generator, list) else [self.generator] * count
        drawn = (torch.rand((), generator=g, device=g.device if g is not None else None) for g in sources)
        return torch.stack([number.cpu() for number in drawn])


def _scales(pipe: Any, base: float | None, high: float | None) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the guidance scales, at the model's size and above, as arguments of the pipeline's call."""
    known = parameters_of_call(pipe)
    if "guidance_scale" not in known and (base is not None or high is not None):
        raise OptionError(f"{type(pipe).__name__} takes no guidance_scale")
    usual = "guidance_scale" in known and "true_cfg_scale" not in known and not is_embedded(pipe)
    defaults = SCALES if usual else (None, None)
    chosen = (
        default if given is None else given for given, default in zip((base, high), defaults, strict=True)
    )
    first, second = ({} if scale is None else {"guidance_scale": scale} for scale in chosen)
    return first, second


def _pictures(image: Any, size: tuple[int, int]) -> Tensor | None:
    """Returns images (n, 3, H, W) in [0, 1], float32, of a size; None stays."""
    if image is None:
        return None
    processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_rgb=True)
    images = processor.preprocess(image).float()
    if images.ndim != 4 or images.shape[1] != 3 or not bool(((images >= 0) & (images <= 1)).all()):
        raise OptionError(f"images are {tuple(images.shape)}; expected pictures, or (B, 3, H, W) in [0, 1]")
    if images.shape[-2:] == size:
        return images
    return torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)


def _shown(images: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return images
    arrays = VaeImageProcessor.pt_to_numpy(images)
    return arrays if output_type == "np" else VaeImageProcessor.numpy_to_pil(arrays)
