"""The vocabulary of the tiny-fashion models: classes, colours, captions and labels.

An image shows one of ten classes and has one of nine colour numbers: 0 for the original grey image, whose
caption names no colour, and 1 to 8 for an image multiplied by the red, green and blue factors of ``COLOURS``.
The label of the class-conditional model is ``id = 10 colour + class``.
"""

import random

__all__ = [
    "CAPTIONS",
    "CLASSES",
    "COLOURS",
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
COLOURS: dict[str, tuple[float, float, float]] = {  # colour number 1, 2, ...
    "white": (1.0, 1.0, 1.0),  # the same picture as colour 0, but named
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


def phrase(kind: int, colour: int = 0) -> str:
    """Returns the words for class number ``kind`` in colour number ``colour``, such as "red ankle boot"."""
    return f"{list(COLOURS)[colour - 1]} {CLASSES[kind]}" if colour else CLASSES[kind]


def label(kind: int, colour: int = 0) -> int:
    """Returns the label number of class number ``kind`` in colour number ``colour``."""
    return len(CLASSES) * colour + kind


def caption(kind: int, colour: int = 0, template: int = 2) -> str:
    """Returns the caption of class ``kind`` in ``colour`` with the wording ``TEMPLATES[template]``."""
    return TEMPLATES[template].format(phrase(kind, colour))


LABELS = [phrase(kind, colour) for colour in range(1 + len(COLOURS)) for kind in range(len(CLASSES))]
ID2LABEL = {str(number): words for number, words in enumerate(LABELS)}  # as in model_index.json
CAPTIONS = [template.format(words) for words in LABELS for template in TEMPLATES]  # 3 label + template


def labels(n: int, seed: int = 0) -> list[int]:
    """Returns ``n`` labels: all classes equally often, and as in training half of them without a colour.

    Arguments:
        n: The number of labels.
        seed: The seed of the drawing; the first labels do not depend on ``n``.
    """
    rng = random.Random(seed)
    kinds: list[int] = []
    while len(kinds) < n:
        kinds += rng.sample(range(len(CLASSES)), len(CLASSES))
    rng = random.Random(f"colours {seed}")
    return [label(kind, rng.choice((0, rng.randint(1, len(COLOURS))))) for kind in kinds[:n]]


def prompts(n: int, seed: int = 0) -> list[str]:
    """Returns the captions "a photo of a ..." of ``labels(n, seed)``, in the same order.

    Arguments:
        n: The number of prompts.
        seed: The seed of the drawing; the first prompts do not depend on ``n``.
    """
    return [TEMPLATES[-1].format(LABELS[number]) for number in labels(n, seed)]
