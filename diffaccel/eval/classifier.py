"""A classifier of tiny-fashion images: does a sample show what its prompt says, in class and color?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffaccel.errors import ModelError, OptionError, closest
from diffaccel.eval.estimate import Estimate
from diffaccel.zoo.fashion import CAPTIONS, CLASSES, COLORS, LABELS, TEMPLATES

__all__ = [
    "FashionClassifier",
    "LabelAccuracy",
    "Prediction",
    "accuracy_of",
    "color_targets",
    "label_accuracy",
    "labels_of_prompts",
    "load_classifier",
    "predict",
]

FOLDER = Path(__file__).parents[1] / "zoo" / "tiny-fashion-classifier"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
BATCH = 250
_LABEL_OF = {words: number // len(TEMPLATES) for number, words in enumerate(CAPTIONS)}


class Prediction(NamedTuple):
    """What the classifier says of N images.

    Arguments:
        features: The mean of the last activations over the image, with shape (N, 128).
        class_logits: One logit per name of ``zoo.fashion.CLASSES``, with shape (N, 10).
        color_logits: One logit per name of ``zoo.fashion.COLORS``, with shape (N, 8).
    """

    features: Tensor
    class_logits: Tensor
    color_logits: Tensor


class _Block(nn.Module):
    """Convolution, batch normalization and ReLU; where the shape stays, the input is added to its output."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.residual = width == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, width, H, W) to (N, out, H / stride, W / stride)."""
        y = torch.relu(self.norm(self.convolution(x)))
        return x + y if self.residual else y


class FashionClassifier(nn.Module):
    """Six convolutions, and a linear head each for the class and for the color.

    Arguments:
        widths: The channels at full, half and quarter resolution; the last is the length of the features.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        full, half, quarter = self.widths = tuple(widths)
        self.body = nn.Sequential(
            _Block(3, full),
            _Block(full, half, 2), _Block(half, half),
            _Block(half, quarter, 2), _Block(quarter, quarter), _Block(quarter, quarter),
        )  # fmt: skip
        self.class_head = nn.Linear(quarter, len(CLASSES))
        self.color_head = nn.Linear(quarter, len(COLORS))

    def forward(self, images: Tensor) -> Prediction:
        """Classifies images of shape (N, 3, 32, 32) in [0, 1]."""
        x = self.body(images.contiguous(memory_format=torch.channels_last))
        features = x.mean((2, 3))
        return Prediction(features, self.class_head(features), self.color_head(features))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``, in the present type of the weights."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": type(self).__name__,
            "widths": list(self.widths),
            "classes": list(CLASSES),
            "colors": list(COLORS),
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def load_classifier(folder: str | Path | None = None) -> FashionClassifier:
    """Loads the classifier in float32 and evaluation mode.

    Arguments:
        folder: What `FashionClassifier.save_pretrained` wrote; the shipped weights if None.

    Raises:
        ModelError: If a file is missing, damaged, or that of another model; it names the file.
    """
    folder = FOLDER if folder is None else Path(folder)
    network = FashionClassifier(_read_widths(folder / CONFIG))
    file = folder / WEIGHTS
    try:
        network.load_state_dict(load_file(file))  # copies, so that float16 becomes float32
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"cannot load {str(file)!r}: {reason}; expected weights of {CONFIG}") from error
    return network.eval()


def _read_widths(file: Path) -> list[int]:
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {str(file)!r}: {' '.join(str(error).split())}") from error
    expected = {"_class_name": "FashionClassifier", "classes": list(CLASSES), "colors": list(COLORS)}
    for name, value in expected.items():
        if not isinstance(config, dict) or config.get(name) != value:
            raise ModelError(f"{str(file)!r} is not of a FashionClassifier; expected {name}: {value}")
    widths = config.get("widths")
    good = isinstance(widths, list) and len(widths) == 3
    if not good or not all(type(width) is int and width > 0 for width in widths):
        raise ModelError(f"{str(file)!r} has widths {widths!r}; expected three numbers of channels")
    return widths


@torch.no_grad()
def predict(images: Tensor, classifier: FashionClassifier | None = None) -> Prediction:
    """Classifies any number of images in batches, and returns the float32 results on the CPU.

    Arguments:
        images: With shape (N, 3, 32, 32), in [0, 1].
        classifier: A classifier in evaluation mode; the shipped one if None.

    Raises:
        OptionError: If there are no images, or their shape or range is another.
    """
    if images.ndim != 4 or images.shape[1:] != (3, 32, 32) or not len(images):
        raise OptionError(f"images have shape {tuple(images.shape)}; expected (N, 3, 32, 32), N of 1 or more")
    if not images.is_floating_point() or not (images.min() >= -1e-3 and images.max() <= 1 + 1e-3):
        raise OptionError(f"images of {images.dtype} are not all in [0, 1]; use (x + 1) / 2 or x / 255")
    network = load_classifier() if classifier is None else classifier
    device = next(network.parameters()).device
    parts = [network(part.to(device, torch.float32)) for part in images.split(BATCH)]
    return Prediction(*(torch.cat(values).float().cpu() for values in zip(*parts, strict=True)))


@dataclass(frozen=True)
class LabelAccuracy:
    """The parts of the images whose predicted label is the expected one, with binomial standard errors.

    Arguments:
        class_accuracy: The class is right.
        color_accuracy: The color is right.
        joint: Both are right.
    """

    class_accuracy: Estimate
    color_accuracy: Estimate
    joint: Estimate


def label_accuracy(
    images: Tensor, labels: Sequence[int], classifier: FashionClassifier | None = None
) -> LabelAccuracy:
    """Compares what images show with their labels.

    An image whose label names no color must be white, as all such training images were: "a sneaker" in red
    counts as a wrong color. The classifier itself errs at times, see its model card.

    Arguments:
        images: With shape (N, 3, 32, 32), in [0, 1].
        labels: The N label numbers ``10 color + class``, as of `labels_of_prompts` or ``zoo.labels``.
        classifier: A classifier in evaluation mode; the shipped one if None.

    Raises:
        OptionError: If images or labels are malformed, or not equally many.
    """
    prediction = predict(images, classifier)
    return accuracy_of(prediction.class_logits.argmax(1), prediction.color_logits.argmax(1), labels)


def accuracy_of(classes: Tensor, colors: Tensor, labels: Sequence[int]) -> LabelAccuracy:
    """Compares predictions with labels.

    Arguments:
        classes: The predicted class numbers (N).
        colors: The predicted color outputs (N), see `color_targets`.
        labels: The N label numbers.

    Raises:
        OptionError: If labels are malformed, or not as many.
    """
    if len(labels) != len(classes):
        raise OptionError(f"{len(labels)} labels for {len(classes)} images; expected as many")
    wrong = next((label for label in labels if not 0 <= label < len(LABELS)), None)
    if wrong is not None:
        raise OptionError(f"unknown label {wrong}; expected 0 to {len(LABELS) - 1}")
    numbers = torch.as_tensor(labels, dtype=torch.int64)
    right_class = classes == numbers % len(CLASSES)
    right_color = colors == color_targets(numbers // len(CLASSES))
    return LabelAccuracy(_rate(right_class), _rate(right_color), _rate(right_class & right_color))


def color_targets(colors: Tensor) -> Tensor:
    """Returns the color outputs of color numbers: 0 (none named) and 1 (white) are the same picture."""
    return (colors - 1).clamp(min=0)


def _rate(right: Tensor) -> Estimate:
    n = len(right)
    rate = right.double().mean().item()
    return Estimate(rate, (rate * (1 - rate) / (n - 1)) ** 0.5 if n > 1 else None)


def labels_of_prompts(prompts: Sequence[str]) -> list[int]:
    """Returns the label numbers of captions in any wording of ``zoo.fashion.TEMPLATES``.

    Arguments:
        prompts: Captions such as "a photo of a red sneaker" or "sneaker".

    Raises:
        OptionError: Naming the first prompt that is no caption.
    """
    for prompt in prompts:
        if prompt not in _LABEL_OF:
            raise OptionError(f"no label for the prompt {prompt!r}; {_hint(prompt)}")
    return [_LABEL_OF[prompt] for prompt in prompts]


def _hint(prompt: str) -> str:
    suggestion = closest(prompt, _LABEL_OF).partition("? ")[0]
    guess = f"{suggestion}? " if suggestion.startswith("did you mean") else ""
    return f"{guess}expected a caption of tiny-fashion, such as {CAPTIONS[-1]!r}"
