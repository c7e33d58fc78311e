"""Streamed mean and covariance: as numpy's of all vectors at once, however they are split."""

import numpy as np
import pytest

from diffaccel.errors import OptionError
from diffaccel.eval.features import FeatureFile, blocks
from diffaccel.eval.frechet import frechet_distance
from diffaccel.eval.moments import Gaussian, Moments

DIM, COUNT = 24, 600


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return rng.standard_normal((COUNT, DIM)) @ rng.standard_normal((DIM, DIM)) + 3


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def check(moments, vectors):
    gaussian = moments.gaussian()
    assert gaussian.count == len(vectors) and gaussian.dim == vectors.shape[1]
    assert relative(gaussian.mean, vectors.mean(0)) <= 1e-14
    assert relative(gaussian.covariance, np.cov(vectors, rowvar=False)) <= 1e-14
    assert (gaussian.covariance == gaussian.covariance.T).all()


def stream(vectors, size):
    moments = Moments(vectors.shape[1])
    for start in range(0, len(vectors), size):
        moments.update(vectors[start : start + size])
    return moments


@pytest.mark.parametrize("size", [1, 7, 64, COUNT])
@pytest.mark.parametrize("order", [1, -1])
def test_as_numpy_for_any_batch_and_order(vectors, size, order):
    check(stream(vectors[::order], size), vectors)


@pytest.mark.parametrize("cuts", [[300], [1, 2, 599], [0, 100, 100, 400]])
def test_as_numpy_for_any_split_over_ranks(vectors, cuts):
    whole = Moments(DIM)
    for part in reversed(np.split(vectors, cuts)):
        whole.merge(stream(part, 50))
    check(whole, vectors)


def test_feature_file_and_array_agree(vectors, tmp_path):
    file = FeatureFile(tmp_path / "rows.f32", DIM)
    for part in np.array_split(vectors, 7):
        file.append(part)
    again = FeatureFile(tmp_path / "rows.f32", DIM)
    assert again.shape == (COUNT, DIM) and [len(b) for b in blocks(again, 256)] == [256, 256, 88]
    assert (again[3:9:2] == vectors[3:9:2].astype(np.float32)).all() and again[9:3].shape == (0, DIM)
    ours, theirs = Gaussian.of(again), Gaussian.of(vectors.astype(np.float32))
    assert (ours.covariance == theirs.covariance).all()


def test_a_row_written_by_half_is_written_over(vectors, tmp_path):
    path = tmp_path / "rows.f32"
    FeatureFile(path, DIM).append(vectors[:2])
    with path.open("ab") as file:
        file.write(b"\0" * 30)
    file = FeatureFile(path, DIM)
    file.append(vectors[2:4])
    assert (file[0:4] == vectors[:4].astype(np.float32)).all()
    with pytest.raises(OptionError, match="holds vectors of 24"):
        file.append(vectors[:, :3])


def test_small_variance_far_from_zero():
    """Naive float32 sums of squares fail at an offset of 50; these do not."""
    rng = np.random.default_rng(1)
    x, y = (50 + 0.1 * rng.standard_normal((2, 4000, 64))).astype(np.float32)

    def naive(rows):
        mean = rows.sum(0, dtype=np.float32) / len(rows)
        squares = rows.T @ rows - np.float32(len(rows)) * np.outer(mean, mean)
        return Gaussian(mean.astype(float), (squares / np.float32(len(rows) - 1)).astype(float), len(rows))

    def exact(rows):
        return Gaussian(rows.mean(0, dtype=float), np.cov(rows.astype(float), rowvar=False), len(rows))

    truth = frechet_distance(exact(x), exact(y))
    assert frechet_distance(stream(x, 100).gaussian(), stream(y, 37).gaussian()) == pytest.approx(
        truth, rel=1e-9
    )
    assert abs(frechet_distance(naive(x), naive(y)) - truth) > 10 * truth


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.full((2, DIM), np.nan), "not finite"),
        (np.full((2, DIM), np.inf), "not finite"),
        (np.zeros((2, DIM + 1)), "25 numbers; expected 24"),
    ],
)
def test_wrong_vectors_are_refused_and_change_nothing(vectors, wrong, message):
    moments = stream(vectors, 100)
    with pytest.raises(OptionError, match=message):
        moments.update(wrong)
    check(moments, vectors)


def test_another_length_is_not_merged(vectors):
    with pytest.raises(OptionError, match="3 numbers; expected 24"):
        stream(vectors, 100).merge(Moments(3))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few(vectors, count):
    with pytest.raises(OptionError, match="at least 2"):
        stream(vectors[:count], 10).gaussian()


def test_the_input_is_not_changed(vectors):
    before = vectors.copy()
    Moments(DIM).update(vectors)
    assert (vectors == before).all()
