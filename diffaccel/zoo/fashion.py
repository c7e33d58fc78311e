"""The vocabulary of the tiny-fashion models: classes, colors, captions and labels.

An image shows one of ten classes and has one of nine color numbers: 0 for the original grey image, whose
caption names no color, and 1 to 8 for an image multiplied by the red, green and blue factors of ``COLORS``.
The label of the class-conditional model is ``id = 10 color + class``.
"""

import random

__all__ = [
    "CAPTIONS",
    "CLASSES",
    "COLORS",
    "ID2LABEL",
    "LABELS",
    "NULL_LABEL",
    "TEMPLATES",
    "caption",
    "label",
    "labels",
    "phrase",
    "prompts",
]

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
COLORS: dict[str, tuple[float, float, float]] = {  # color number 1, 2, ...
    "white": (1.0, 1.0, 1.0),  # the same picture as color 0, but named
    "red": (0.9, 0.12, 0.12),
    "orange": (1.0, 0.55, 0.1),
    "yellow": (0.95, 0.9, 0.15),
    "green": (0.15, 0.7, 0.25),
    "blue": (0.15, 0.35, 0.95),
    "purple": (0.55, 0.2, 0.8),
    "pink": (1.0, 0.5, 0.75),
}
TEMPLATES = ("{}", "a {}", "a photo of a {}")
NULL_LABEL = 1000  # the unconditional label, which DiTPipeline hard-codes


def phrase(kind: int, color: int = 0) -> str:
    """Returns the words for class number ``kind`` in color number ``color``, such as "red ankle boot"."""
    return f"{list(COLORS)[color - 1]} {CLASSES[kind]}" if color else CLASSES[kind]


def label(kind: int, color: int = 0) -> int:
    """Returns the label number of class number ``kind`` in color number ``color``."""
    return len(CLASSES) * color + kind


def caption(kind: int, color: int = 0, template: int = 2) -> str:
    """Returns the caption of class ``kind`` in ``color`` with the wording ``TEMPLATES[template]``."""
    return TEMPLATES[template].format(phrase(kind, color))


LABELS = [phrase(kind, color) for color in range(1 + len(COLORS)) for kind in range(len(CLASSES))]
ID2LABEL = {str(number): words for number, words in enumerate(LABELS)}  # as in model_index.json
CAPTIONS = [template.format(words) for words in LABELS for template in TEMPLATES]  # 3 label + template


def labels(n: int, seed: int = 0) -> list[int]:
    """Returns ``n`` labels: all classes equally often, and as in training half of them without a color.

    Arguments:
        n: The number of labels.
        seed: The seed of the drawing; the first labels do not depend on ``n``.
    """
    rng = random.Random(seed)
    kinds: list[int] = []
    while len(kinds) < n:
        kinds += rng.sample(range(len(CLASSES)), len(CLASSES))
    rng = random.Random(f"colors {seed}")
    return [label(kind, rng.choice((0, rng.randint(1, len(COLORS))))) for kind in kinds[:n]]


def prompts(n: int, seed: int = 0) -> list[str]:
    """Returns the captions "a photo of a ..." of ``labels(n, seed)``, in the same order.

    Arguments:
        n: The number of prompts.
        seed: The seed of the drawing; the first prompts do not depend on ``n``.
    """
    return [TEMPLATES[-1].format(LABELS[number]) for number in labels(n, seed)]
