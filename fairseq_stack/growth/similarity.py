"""The similarity of two representations of the same frames."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def linear_cka(x: ArrayLike, y: ArrayLike) -> float:
    """Linear centred kernel alignment (CKA) of two representations of the same N frames.

    ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) with centred columns, in float64. It is 1 if one is a rotated,
    shifted and scaled copy of the other. This form needs D1 x D2 numbers; the equivalent form with Gram
    matrices needs N x N. Source: Kornblith et al., "Similarity of Neural Network Representations
    Revisited", ICML 2019.

    Args:
        x: [N, D1].
        y: [N, D2].

    Returns:
        a number from 0 to 1; nan if x or y is the same in every frame.

    Raises:
        ValueError: x and y are not two matrices with the same number of rows.
    """
    return float(layer_similarity([x, y])[0, 1])


def layer_similarity(hidden_states: Sequence[ArrayLike]) -> np.ndarray:
    """Linear CKA between every two layers.

    Args:
        hidden_states: L representations of the same N frames, each [N, D] (D may differ).

    Returns:
        [L, L] float64, symmetric.

    Raises:
        ValueError: a representation is not a matrix, or the numbers of frames differ.
    """
    shapes = [np.shape(layer) for layer in hidden_states]
    if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(f"expected matrices [N, D] with one N, got the shapes {shapes}")
    layers = [np.asarray(layer, dtype=np.float64) for layer in hidden_states]
    layers = [layer - layer.mean(axis=0) for layer in layers]
    similarity = np.empty((len(layers), len(layers)))
    for i, x in enumerate(layers):
        for j, y in enumerate(layers[: i + 1]):
            similarity[i, j] = similarity[j, i] = np.square(x.T @ y).sum()
    norms = np.sqrt(similarity.diagonal())
    with np.errstate(invalid="ignore"):
        return similarity / np.outer(norms, norms)


def explained_variance(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Share of the targets' variance that the predictions explain: 1 - SSE / SST, in float64.

    SSE is the sum of the squared errors, SST the sum of the squared distances to the mean of each dimension,
    both over all frames and dimensions. Predictions of the mean give 0, worse predictions less than 0.

    Args:
        predictions: [N, D].
        targets: [N, D].

    Raises:
        ValueError: the shapes differ, or the targets do not vary.
    """
    predictions = np.asarray(predictions, dtype=np.float64)
    targets = np.asarray(targets, dtype=np.float64)
    if predictions.shape != targets.shape or targets.ndim != 2:
        raise ValueError(f"expected two matrices [N, D], got {predictions.shape} and {targets.shape}")
    total = np.square(targets - targets.mean(axis=0)).sum()
    if total == 0:
        raise ValueError("the targets are the same in every frame: there is no variance to explain")
    return float(1 - np.square(predictions - targets).sum() / total)
