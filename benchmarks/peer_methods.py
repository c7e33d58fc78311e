"""The peers of ``peers.py``: training-free accelerators of others, each driven as its authors mean it.

A peer is attached for one call and taken off again.  ``helped=False`` drives it by its public interface
alone, as a user would; ``helped=True`` adds what it lacks on the model: a cache context, the current
timestep, patterns of modules, calibrated ratios, halves of the guided batch in the order that it expects.
Nothing of what it computes is changed.
"""

import ast
import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import hooks as caches
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from diffaccel.pipelines.run import denoisers_of

__all__ = ["PEERS", "NothingToDo", "Peer", "Subject"]

Options = Mapping[str, Any]
ALWAYS = (-1, 1001)
"""A range of timesteps that holds all of them."""

NOT_FIRST = (-1, 950)
"""One that leaves out the first of a call, where FasterCache has nothing in the place of attention yet."""

INNER = {
    "transformer": [r".*transformer_blocks\.\d+\.(attn\d?|ff)"],
    "unet": [r".*transformer_blocks\.\d+\.(attn\d?|ff)", r".*resnets\.\d+"],
}
"""What TaylorSeer's paper forecasts: attention and feed-forward; in a U-Net the residual layers, too."""

LAST = {"transformer": [r"proj_out(_2)?"], "unet": [r"conv_out"]}
"""The layer that makes the output, which TaylorSeer's lite mode forecasts."""


class NothingToDo(RuntimeError):
    """A peer that found no module to change, and did not say so as an error."""


@dataclass
class Subject:
    """A pipeline that peers are tried on.

    Arguments:
        pipe: The pipeline.
        sample: Runs a plain call of a few images on noise of their own, for so many steps.
    """

    pipe: Any
    sample: Callable[[int], Any]
    ratios: dict[int, list[float]] = field(default_factory=dict)
    """MagCache's calibrated ratios, by the number of steps."""

    @property
    def model(self) -> Any:
        """The denoiser."""
        return next(iter(denoisers_of(self.pipe).values()))

    @property
    def kind(self) -> str:
        """Whether the denoiser is a "unet" or a "transformer"."""
        return next(iter(denoisers_of(self.pipe)))

    def timestep(self, helped: bool, undo: ExitStack) -> Callable[[], float]:
        """Returns what tells the current timestep: the pipeline, or helped, a look at the network's input."""
        if not helped:
            return lambda: self.pipe.current_timestep
        seen = [0.0]
        scale = 1000 if "guidance_embeds" in self.model.config else 1  # Flux's network is told t / 1000

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = kwargs.get("timestep", args[1] if len(args) > 1 else 0.0)
            seen[0] = scale * float(torch.as_tensor(value).flatten()[0])

        undo.callback(self.model.register_forward_pre_hook(look, with_kwargs=True).remove)
        return lambda: seen[0]

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Takes what a peer leaves on the denoiser off again when the block ends."""
        blocks = [(part, dict(part.__dict__)) for part in self.model.modules()]
        modules = dict(self.model._modules)
        try:
            yield
        finally:
            self.model._modules.clear()
            self.model._modules.update(modules)  # in their order: other peers take the first for the first
            for part, own in blocks:
                for name in set(part.__dict__) - set(own):
                    delattr(part, name)


@contextmanager
def _hooked(subject: Subject, apply: Callable[[Any, Any], None], config: Any, helped: bool) -> Iterator[None]:
    """Applies a cache of diffusers, and takes its hooks off again."""
    model = subject.model
    with ExitStack() as undo:
        undo.callback(_unhook, model)
        apply(model, config)
        HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
        if not any(part._diffusers_hook.hooks for part in _registered(model)):
            raise NothingToDo("no module is hooked")
        if helped and not isinstance(model, CacheMixin):  # its pipeline sets no context then

            def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
                _set_cache_context(module, CacheContext("default"))

            undo.callback(model.register_forward_pre_hook(enter).remove)
        yield


def _registered(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if hasattr(part, "_diffusers_hook")]


def _unhook(model: nn.Module) -> None:
    for part in _registered(model):
        registry: HookRegistry = part._diffusers_hook
        for name in list(registry.hooks):
            registry.remove_hook(name, recurse=False)
        del part._diffusers_hook
        if getattr(part.__dict__.get("forward"), "__func__", None) is type(part).forward:
            del part.forward


@contextmanager
def first_block(subject: Subject, steps: int, helped: bool, threshold: float) -> Iterator[None]:
    """First Block Cache of diffusers."""
    config = caches.FirstBlockCacheConfig(threshold=threshold)
    with _hooked(subject, caches.apply_first_block_cache, config, helped):
        yield


@contextmanager
def mag_cache(subject: Subject, steps: int, helped: bool, **options: Any) -> Iterator[None]:
    """MagCache of diffusers, with Flux's ratios, or helped with those of the model."""
    ratios = _ratios(subject, steps) if helped else FLUX_MAG_RATIOS
    config = caches.MagCacheConfig(num_inference_steps=steps, mag_ratios=ratios, **options)
    with _hooked(subject, caches.apply_mag_cache, config, helped):
        yield


def _ratios(subject: Subject, steps: int) -> list[float]:
    """Returns the ratios that MagCache prints when it calibrates."""
    if steps not in subject.ratios:
        config = caches.MagCacheConfig(num_inference_steps=steps, calibrate=True)
        printed = io.StringIO()
        with (
            _hooked(subject, caches.apply_mag_cache, config, helped=True),
            contextlib.redirect_stdout(printed),
        ):
            subject.sample(steps)
        lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and "," in line]
        subject.ratios[steps] = ast.literal_eval(lines[-1])
    return subject.ratios[steps]


@contextmanager
def taylor_seer(subject: Subject, steps: int, helped: bool, lite: bool = False,
                **options: Any) -> Iterator[None]:  # fmt: skip
    """TaylorSeer of diffusers; helped, with patterns that match modules of the model, and exact factors."""
    patterns: dict[str, Any] = {"use_lite_mode": lite}
    if helped:
        inner = INNER[subject.kind]
        patterns = {"taylor_factors_dtype": torch.float32, "cache_identifiers": inner}
        if lite:
            patterns |= {"cache_identifiers": LAST[subject.kind], "skip_predict_identifiers": inner}
    config = caches.TaylorSeerCacheConfig(**patterns, **options)
    with _hooked(subject, caches.apply_taylorseer_cache, config, helped):
        yield


@contextmanager
def pyramid(subject: Subject, steps: int, helped: bool, spatial: int, cross: int,
            wide: bool = False) -> Iterator[None]:  # fmt: skip
    """Pyramid Attention Broadcast of diffusers."""
    ranges = {f"{kind}_attention_timestep_skip_range": ALWAYS for kind in ("spatial", "cross")}
    with ExitStack() as undo:
        config = caches.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=spatial, cross_attention_block_skip_range=cross,
            current_timestep_callback=subject.timestep(helped, undo), **(ranges if wide else {}),
        )  # fmt: skip
        undo.enter_context(_hooked(subject, caches.apply_pyramid_attention_broadcast, config, helped))
        yield


@contextmanager
def faster_cache(subject: Subject, steps: int, helped: bool, attention: int = 2, unguided: int = 5,
                 wide: bool = False) -> Iterator[None]:  # fmt: skip
    """FasterCache of diffusers: attention, and the unconditional half where guidance has one."""
    ranges = {name: NOT_FIRST for name in ("spatial_attention_timestep_skip_range",
                                        "unconditional_batch_timestep_skip_range")}  # fmt: skip
    with ExitStack() as undo:
        config = caches.FasterCacheConfig(
            spatial_attention_block_skip_range=attention, unconditional_batch_skip_range=unguided,
            current_timestep_callback=subject.timestep(helped, undo), tensor_format="BCHW",
            is_guidance_distilled="guidance_embeds" in subject.model.config, **(ranges if wide else {}),
        )  # fmt: skip
        if helped:
            known = config._unconditional_conditional_input_kwargs_identifiers
            config._unconditional_conditional_input_kwargs_identifiers = [
                *known, "class_labels", "pooled_projections", "added_cond_kwargs"
            ]  # fmt: skip
        undo.enter_context(_hooked(subject, caches.apply_faster_cache, config, helped))
        if helped:
            undo.enter_context(_halves(subject))
        yield


class _Stacked(dict[str, Any]):
    """Arguments in a dictionary that are split as a tensor is."""

    def chunk(self, count: int, dim: int) -> list["_Stacked"]:
        """Returns the parts."""
        parts = {name: value.chunk(count, dim) for name, value in self.items()}
        return [_Stacked({name: part[n] for name, part in parts.items()}) for n in range(count)]


@contextmanager
def _halves(subject: Subject) -> Iterator[None]:
    """Hands the denoiser a guided batch as FasterCache splits it: all of full length, unconditional first."""
    model, first = subject.model, type(subject.pipe).__name__ == "DiTPipeline"
    inner = model.forward

    def swapped(value: Any) -> Any:
        if isinstance(value, dict):
            return _Stacked(value)
        return torch.cat(value.chunk(2)[::-1]) if first and torch.is_tensor(value) else value

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        rows = len(args[0] if args else kwargs["hidden_states"])
        args = tuple(value.expand(rows) if torch.is_tensor(value) and not value.ndim else value
                     for value in args)  # fmt: skip
        kwargs = {name: swapped(value) for name, value in kwargs.items() if value is not None}
        output = inner(*map(swapped, args), **kwargs)
        if first:
            output.sample = swapped(output.sample)
        return output

    model.forward = forward
    try:
        yield
    finally:
        model.forward = inner


@contextmanager
def cache_dit(subject: Subject, steps: int, helped: bool, order: int = 0, **options: Any) -> Iterator[None]:
    """DBCache of cache-dit, with its TaylorSeer calibrator of an order; 0 for none."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # or a paragraph for each call
    import cache_dit as library

    settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": max(2, steps // 12)}
    both = not (helped and type(subject.model).__name__.startswith("SD3"))  # its last block returns no text
    taylor = library.TaylorSeerCalibratorConfig(taylorseer_order=order, enable_encoder_calibrator=both)
    config = library.DBCacheConfig(**{**settings, **options})
    with subject.as_it_was():
        library.enable_cache(subject.pipe, cache_config=config, calibrator_config=taylor if order else None)
        try:
            yield
        finally:
            library.disable_cache(subject.pipe)


@contextmanager
def deep_cache(subject: Subject, steps: int, helped: bool, interval: int, branch: int = 0) -> Iterator[None]:
    """DeepCache, uniform."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=subject.pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@contextmanager
def tome(subject: Subject, steps: int, helped: bool, ratio: float, max_downsample: int = 1) -> Iterator[None]:
    """Token merging; helped, also at the resolutions at which the model has attention."""
    import tomesd

    tomesd.apply_patch(subject.pipe, ratio=ratio, max_downsample=max_downsample if helped else 1)
    try:
        yield
    finally:
        tomesd.remove_patch(subject.pipe)


@dataclass(frozen=True)
class Peer:
    """A peer with the settings that make its curve.

    Arguments:
        name: Its name in the tables.
        attach: From a `Subject`, the number of steps, whether it is helped, and options to a context.
        settings: Options by kind of denoiser, or "any", from careful to fast.
        passive: Options with which it saves nothing.
        scaled: An option that is given for 50 steps, and is larger for fewer, which are farther apart.
    """

    name: str
    attach: Callable[..., AbstractContextManager[None]]
    settings: Mapping[str, Sequence[Options]]
    passive: Options
    scaled: str = ""

    def curve(self, kind: str, steps: int) -> list[dict[str, Any]]:
        """Returns the settings for a kind of denoiser and a number of steps; none if it has none for it."""
        found = self.settings.get(kind, self.settings.get("any", ()))
        return [{name: round(value * 50 / steps, 4) if name == self.scaled else value
                 for name, value in options.items()} for options in found]  # fmt: skip

    def typical(self, kind: str, steps: int) -> dict[str, Any]:
        """Returns the setting that is tried on any model: the fastest, of another kind if need be."""
        return (self.curve(kind, steps) or self.curve(next(iter(self.settings)), steps))[-1]


DIFF = "residual_diff_threshold"
PEERS = (
    Peer("DBCache (cache-dit)", cache_dit, {"transformer": [{DIFF: 0.04}, {DIFF: 0.08}, {DIFF: 0.14}]},
         {DIFF: 0.0}, DIFF),
    Peer("DBCache + TaylorSeer (cache-dit)", cache_dit, {"transformer": [
        {DIFF: 0.04, "order": 1}, {DIFF: 0.08, "order": 1}, {DIFF: 0.14, "order": 1}]},
        {DIFF: 0.0, "order": 1}, DIFF),
    Peer("FirstBlockCache", first_block, {"transformer": [
        {"threshold": 0.03}, {"threshold": 0.06}, {"threshold": 0.1}]}, {"threshold": 0.0}, "threshold"),
    Peer("MagCache", mag_cache, {"transformer": [
        {"threshold": 0.02}, {"threshold": 0.06}, {"threshold": 0.2, "max_skip_steps": 5}]},
        {"threshold": -1.0}),
    Peer("TaylorSeer", taylor_seer, {"any": [
        {"cache_interval": 2}, {"cache_interval": 4}, {"cache_interval": 6, "max_order": 2}]},
        {"cache_interval": 1}),
    Peer("TaylorSeer lite", taylor_seer, {"any": [
        {"lite": True, "cache_interval": 3}, {"lite": True, "cache_interval": 5}]},
        {"lite": True, "cache_interval": 1}),
    Peer("PAB", pyramid, {"transformer": [
        {"spatial": 2, "cross": 3}, {"spatial": 4, "cross": 6, "wide": True}],
        "unet": [{"spatial": 3, "cross": 6, "wide": True}]}, {"spatial": 1, "cross": 1}),
    Peer("FasterCache", faster_cache, {"any": [{}, {"attention": 3, "unguided": 5, "wide": True}]},
         {"attention": 1, "unguided": 1}),
    Peer("DeepCache", deep_cache, {"unet": [
        {"interval": 3, "branch": 3}, {"interval": 2}, {"interval": 3}, {"interval": 5}]}, {"interval": 1}),
    Peer("ToMe (tomesd)", tome, {"unet": [
        {"ratio": 0.5, "max_downsample": 2}, {"ratio": 0.75, "max_downsample": 4}]}, {"ratio": 0.0}),
)  # fmt: skip
"""All peers; DeepCache and ToMe are for U-Nets, the caches of blocks for transformers."""
