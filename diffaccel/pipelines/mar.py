"""Class-conditional images by masked autoregression over continuous tokens.

References:
    | Autoregressive Image Generation without Vector Quantization (Li et al., 2024)
    | https://arxiv.org/abs/2406.11838
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import OptionError, closest
from .mar_scheduler import GUIDANCE_SCHEDULES, Generators, MARScheduler
from .mar_transformer import MARTransformer2DModel

__all__ = ["MARPipeline"]

OUTPUTS = ("latent", "np", "pil", "pt")


class MARPipeline(DiffusionPipeline):
    """Makes images of a class: a trunk reads the known tokens, and a small diffusion draws some more.

    Arguments:
        transformer: The trunk, with the token head.
        scheduler: The order and the steps of tokens and head.
        vae: The autoencoder of the latents; without one the tokens are patches of pixels in [-1, 1].
        id2label: The names of the classes.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["tokens", "drawn", "head_calls"]

    def __init__(
        self, transformer: MARTransformer2DModel, scheduler: MARScheduler, vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)
        self.labels = {name: int(key) for key, name in (id2label or {}).items()}
        self.image_processor = VaeImageProcessor()

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Returns the labels of class names.

        Raises:
            OptionError: If a name is unknown.
        """
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in self.labels:
                raise OptionError(f"no class {name!r}; {closest(name, self.labels)}")
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int | None] | Tensor,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        num_head_steps: int | None = None,
        guidance_schedule: str = "linear",
        temperature: float = 1.0,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Makes one image a label.

        Arguments:
            class_labels: The labels; None in a list stands for no class.
            guidance_scale: The scale of classifier-free guidance, in the head; off at 1.
            num_inference_steps: The autoregressive steps; 64 if not given, or as many as there are tokens.
            num_head_steps: The head's steps in each of them; the scheduler's own number if not given.
            guidance_schedule: "linear", from 1 to the scale as tokens get known, or "constant".
            temperature: The factor of the noise that the head's steps add.
            generator: The source of order and noise; or one of each image, which is then the same whatever
                the others are.
            output_type: "pil", "np", "pt", or "latent" for what the autoencoder would decode.
            return_dict: Whether to return an output object, not a tuple.
            callback_on_step_end: Called as ``f(pipe, k, timestep, kwargs)`` after autoregressive step k;
                what it returns as "tokens" takes their place.
            callback_on_step_end_tensor_inputs: What its kwargs hold: "tokens" with shape (B, N, c), their
                positions "drawn" in this step, with shape (B, n), and the number of "head_calls".

        Raises:
            OptionError: If an argument has no meaning.
        """
        wanted = tuple(callback_on_step_end_tensor_inputs)
        labels = self._labels(class_labels)
        self._check(labels, guidance_schedule, temperature, generator, output_type, wanted)
        model, size, device = self.transformer, len(labels), self._execution_device
        shape = (size, model.num_tokens)
        steps = min(64, model.num_tokens) if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(steps, model.num_tokens, num_head_steps, device=device)
        order = randn_tensor(shape, generator, device, torch.float32).argsort(1)
        tokens = torch.zeros((*shape, model.channels), device=device)
        halves = 1 if guidance_scale == 1 else 2
        if halves == 2:
            labels = torch.cat([labels, torch.full_like(labels, model.null_label)])
        with self.progress_bar(total=steps) as bar:
            for k, timestep in enumerate(self.scheduler.timesteps):
                known = order[:, int(timestep) :].repeat(halves, 1)
                z = model(tokens.repeat(halves, 1, 1), known=known, class_labels=labels, return_dict=False)[0]
                tokens, drawn, calls = self.scheduler.step(
                    z, timestep, tokens, head=model.head, order=order, guidance_scale=guidance_scale,
                    guidance_schedule=guidance_schedule, temperature=temperature, generator=generator,
                    return_dict=False,
                )  # fmt: skip
                if callback_on_step_end is not None:
                    known_as = {"tokens": tokens, "drawn": drawn, "head_calls": calls}
                    given = callback_on_step_end(self, k, timestep, {name: known_as[name] for name in wanted})
                    tokens = (given or {}).get("tokens", tokens)
                bar.update()
        images = self._images(model.unpatchify(tokens), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, labels: int | Sequence[int | None] | Tensor) -> Tensor:
        null, numbers = self.transformer.null_label, []
        single = isinstance(labels, int) or (isinstance(labels, Tensor) and not labels.ndim)
        several: Any = [labels] if single else labels
        for label in several:
            try:
                numbers.append(null if label is None else operator.index(label))
            except TypeError:
                numbers.append(-1)
            if not 0 <= numbers[-1] <= null:
                raise OptionError(f"no label {label}; expected 0 to {null - 1}, or {null} for no class")
        return torch.tensor(numbers, dtype=torch.int64, device=self._execution_device)

    def _check(
        self, labels: Tensor, schedule: str, temperature: float, generator: Generators, output: str,
        wanted: tuple[str, ...],
    ) -> None:  # fmt: skip
        if schedule not in GUIDANCE_SCHEDULES:
            raise OptionError(f"no guidance_schedule {schedule!r}; {closest(schedule, GUIDANCE_SCHEDULES)}")
        if not temperature >= 0:
            raise OptionError(f"temperature must be 0 or more, not {temperature}")
        if output not in OUTPUTS:
            raise OptionError(f"no output_type {output!r}; {closest(str(output), OUTPUTS)}")
        known = self._callback_tensor_inputs
        for name in wanted:
            if name not in known:
                raise OptionError(f"no callback input {name!r}; {closest(name, known)}")
        if not len(labels) or (isinstance(generator, list) and len(generator) != len(labels)):
            number = len(generator) if isinstance(generator, list) else 1
            raise OptionError(f"{len(labels)} labels and {number} generators; expected one or as many")

    def _images(self, sample: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return sample
        if self.vae is None and sample.shape[1] not in (1, 3):
            raise OptionError(f"{sample.shape[1]} channels and no vae to decode; use output_type='latent'")
        if self.vae is not None:
            latents = (sample / self.vae.config.scaling_factor).to(self.vae.dtype)
            sample = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(sample.float(), output_type)


if not hasattr(diffusers, "MARPipeline"):
    # DiffusionPipeline.from_pretrained looks for the class that a folder names in diffusers itself
    diffusers.MARPipeline = MARPipeline
