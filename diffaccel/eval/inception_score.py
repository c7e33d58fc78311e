r"""The inception score: how sure a classifier is of each image, and how many classes they cover together.

.. math:: \exp \Big( \frac{1}{N} \sum_n \operatorname{KL}(p_n \Vert \bar p) \Big),
          \qquad \bar p = \frac{1}{N} \sum_n p_n,

with :math:`p_n` the softmax of the logits of image n: 1 if all are alike, C for C classes in equal shares.
"""

import math
from dataclasses import dataclass

import numpy as np

from ..errors import OptionError
from .estimate import Estimate
from .features import Rows, check_rows, placed

__all__ = ["InceptionScore", "inception_score"]


@dataclass(frozen=True)
class InceptionScore(Estimate):
    """The mean inception score of the splits.

    Arguments:
        scores: The score of each split.
    """

    scores: tuple[float, ...] = ()

    @property
    def std(self) -> float:
        """The standard deviation over the splits with divisor their number, as papers print it."""
        return float(np.std(self.scores))


def inception_score(
    logits: Rows, splits: int = 1, shuffle_seed: int | None = None, split_size: int | None = None
) -> InceptionScore:
    """Returns the inception score, the mean over splits.

    ``split_size=5000`` is the way of ADM, whose logits are taken before the bias is added; ``splits=10,
    shuffle_seed=2020`` is that of torch-fidelity, whose deviation is `InceptionScore.std`. More and smaller
    splits give a smaller score, so none of these compare with each other.

    The logits are read twice, in blocks; one float for each image is kept, and C for each split.

    References:
        Salimans et al., Improved Techniques for Training GANs, 2016, arXiv 1606.03498.
        Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv 2105.05233.

    Arguments:
        logits: The logits of generated images, with shape (N, C).
        splits: The number of splits, of equal size to within one image.
        shuffle_seed: The seed of numpy's legacy permutation of the images before the split; None keeps their
            order, which makes the score depend on it if there is more than one split.
        split_size: The images of a split, of which the last may have fewer, in place of ``splits``.

    Returns:
        The score, its standard error by the delta method, and its first-order bias.

    Raises:
        OptionError: If there are fewer than 2 rows or fewer rows than splits, a size is below 1, both
            ``splits`` and ``split_size`` are given, or a logit is NaN or infinite.
    """
    count, classes = check_rows(logits, "logits", 2)
    label = _labels(count, splits, shuffle_seed, split_size)
    sizes = np.bincount(label)
    sums, squares = np.zeros((2, len(sizes), classes))
    for place, block in placed(logits):
        part = label[place]
        probability = np.exp(_log_softmax(block))
        for split in np.unique(part):
            rows = probability[part == split]
            sums[split] += rows.sum(0)
            squares[split] += np.square(rows).sum(0)
    mean = sums / sizes[:, None]
    divergence = _divergences(logits, label, mean)
    return _score(divergence, label, _log_bias(mean, squares / sizes[:, None], sizes))


def _labels(count: int, splits: int, shuffle_seed: int | None, split_size: int | None) -> np.ndarray:
    """Returns the split of each image (N,)."""
    if split_size is not None:
        if splits != 1 or split_size < 1:
            raise OptionError(f"split_size={split_size}, splits={splits}: give one of them, and at least 1")
        edges = np.arange(0, count, split_size)
    else:
        if not 1 <= splits <= count:
            raise OptionError(f"splits={splits} is outside 1..{count}, the number of images")
        edges = np.arange(splits) * count // splits
    place = np.arange(count)
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(count)
        place[order] = np.arange(count)
    return np.searchsorted(edges, place, side="right") - 1


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _divergences(logits: Rows, label: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Returns the divergence of each image from the mean of its split (N,)."""
    # a class of which no image has a share in float64 adds 0, not 0 * inf
    log_mean = np.log(np.maximum(mean, np.finfo(np.float64).tiny))
    found: list[np.ndarray] = []
    for place, block in placed(logits):
        log_p = _log_softmax(block)
        found.append((np.exp(log_p) * (log_p - log_mean[label[place]])).sum(1))
    return np.concatenate(found)


def _log_bias(mean: np.ndarray, square: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns the bias of the logarithm of each split's score: the mean of few images is too uneven."""
    variance = np.maximum(square - np.square(mean), 0)
    ratio = np.divide(variance, mean, out=np.zeros_like(mean), where=mean > 0)
    return -ratio.sum(1) / (2 * np.maximum(sizes - 1, 1))


def _score(divergence: np.ndarray, label: np.ndarray, log_bias: np.ndarray) -> InceptionScore:
    sizes = np.bincount(label)
    log_score = np.bincount(label, divergence) / sizes
    spread = np.bincount(label, np.square(divergence - log_score[label]))
    # the influence of an image on the logarithm is its divergence: that on the mean's entropy is included
    variance = spread / (sizes * np.maximum(sizes - 1, 1))
    scores = np.exp(log_score)
    se = math.sqrt(float(np.sum(np.square(scores) * variance))) / len(sizes)
    bias = float(np.mean(scores * (log_bias + variance / 2)))
    return InceptionScore(float(scores.mean()), se, bias, scores=tuple(map(float, scores)))
