"""Linear CKA and explained variance against slow forms written from their definitions."""

import math

import numpy as np
import pytest

from fairseq_stack.growth.similarity import (
    explained_variance,
    layer_similarity,
    linear_cka,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def gram_cka(x, y):
    """CKA as the normalised HSIC of the N x N Gram matrices, with an explicit centring matrix."""
    frames = len(x)
    centring = np.eye(frames) - np.ones((frames, frames)) / frames

    def hsic(k, m):
        return np.trace(k @ centring @ m @ centring) / (frames - 1) ** 2

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("frames, left, right", [(50, 7, 7), (50, 3, 11), (10, 20, 30)])
def test_cka_equals_the_normalised_hsic_of_gram_matrices(rng, frames, left, right):
    x = rng.normal(size=(frames, left)) + 5
    y = x[:, :1] * rng.normal(size=(1, right)) + rng.normal(size=(frames, right))
    assert linear_cka(x, y) == pytest.approx(gram_cka(x, y), rel=1e-10)


def test_cka_of_two_columns_is_their_squared_correlation():
    # Centred: (-1, 0, 1) and (-1, 1, 0); correlation 1 / 2.
    assert linear_cka([[1.0], [2.0], [3.0]], [[0.0], [2.0], [1.0]]) == pytest.approx(0.25)


def test_cka_ignores_rotation_scale_and_shift_but_no_stretching_of_one_axis(rng):
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, 6))
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, -3 * x @ rotation + 2) == pytest.approx(1)
    assert linear_cka(x @ rotation, 0.1 * y) == pytest.approx(linear_cka(x, y))
    assert linear_cka(x * [100, 1, 1, 1, 1, 1], x) < 0.9


def test_cka_of_float32_frames_far_from_zero_is_computed_in_float64(rng):
    x = (rng.normal(size=(200, 5)) + 1e3).astype(np.float32)
    y = (x[:, ::-1] + rng.normal(size=(200, 5))).astype(np.float32)
    expected = gram_cka(x.astype(np.float64) - 1e3, y.astype(np.float64) - 1e3)
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-8)


def test_a_representation_that_never_changes_has_no_similarity(rng):
    assert math.isnan(linear_cka(np.ones((5, 2)), rng.normal(size=(5, 2))))


def test_layer_similarity_holds_every_pair(rng):
    layers = [rng.normal(size=(30, width)) for width in (4, 4, 6)]
    expected = [[gram_cka(x, y) for y in layers] for x in layers]
    np.testing.assert_allclose(layer_similarity(layers), expected, rtol=1e-10)


def test_different_numbers_of_frames_are_refused(rng):
    with pytest.raises(ValueError, match=r"\(30, 4\), \(31, 4\)"):
        layer_similarity([rng.normal(size=(30, 4)), rng.normal(size=(31, 4))])
    with pytest.raises(ValueError):
        linear_cka(np.ones(3), np.ones(3))


def test_explained_variance_by_hand():
    targets = [[0.0, 10.0], [2.0, 10.0], [4.0, 16.0]]  # SST = 8 + 24 around the means 2 and 12
    predictions = [[0.0, 10.0], [2.0, 14.0], [4.0, 16.0]]  # SSE = 16
    assert explained_variance(predictions, targets) == pytest.approx(0.5)


def test_explained_variance_is_1_for_the_targets_0_for_their_mean_and_negative_for_worse(rng):
    targets = rng.normal(size=(20, 3)) + 7
    assert explained_variance(targets, targets) == 1
    assert explained_variance(np.broadcast_to(targets.mean(axis=0), (20, 3)), targets) == pytest.approx(0)
    assert explained_variance(np.zeros((20, 3)), targets) < -1


def test_explained_variance_refuses_other_shapes_and_constant_targets():
    with pytest.raises(ValueError, match="two matrices"):
        explained_variance(np.ones((3, 1)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="no variance"):
        explained_variance(np.ones((3, 2)), np.ones((3, 2)))
