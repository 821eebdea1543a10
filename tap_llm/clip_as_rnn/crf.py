"""Dense CRF: soft masks that follow the edges of the picture. NumPy and SciPy only.

Fully connected pairs with Gaussian edge potentials and the mean-field iteration of Krähenbühl and Koltun
(arXiv:1210.5644), with the numbers that CaR (arXiv:2312.07661) runs with.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import InputError
from .lattice import GaussianKernel, Values

ITERATIONS = 10
SMOOTHNESS = (3.0, 1.0)  # weight, and pixels
APPEARANCE = (4.0, 67.0, 3.0)  # weight, pixels, and steps of 0..255 of each colour

MAX_SIDE = 1000  # pixels
MAX_VALUES = 2**26  # pixels x classes: bounds memory where there are very many classes
_FLOOR = 1e-5


class DenseCrf:
    """The CRF of one picture, ready for any number of probability maps.

    Above `max_side` it works on a smaller copy, so that time and memory stay bounded; the standard deviations are in
    pixels of that copy, as they were tuned on small pictures.

    Args:
        image: (H, W, 3) uint8, RGB.
        smoothness: weight and standard deviation (pixels) of the pairwise term of nearness.
        appearance: weight and standard deviations (pixels, colour steps) of that of nearness and like colour.
        max_side: longest side that is worked on, in pixels.

    Raises:
        InputError: not such a picture, or a standard deviation that is not above 0.
    """

    def __init__(
        self,
        image: NDArray[np.uint8],
        smoothness: tuple[float, float] = SMOOTHNESS,
        appearance: tuple[float, float, float] = APPEARANCE,
        max_side: int = MAX_SIDE,
    ) -> None:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise InputError(f"image: expected (height, width, 3) uint8, got {image.shape} of {image.dtype}")
        if not (smoothness[1] > 0 and appearance[1] > 0 and appearance[2] > 0):
            raise InputError("standard deviations of the CRF must be above 0")
        self._image = image
        self._weights = (smoothness[0], appearance[0])
        self._deviations = (smoothness[1], *appearance[1:])
        self._max_side = max_side
        self._kernels: dict[tuple[int, int], list[GaussianKernel]] = {}

    def __call__(self, probabilities: Values, iterations: int = ITERATIONS) -> Values:
        """Refine probability maps.

        Args:
            probabilities: (C, H, W) float32 in 0..1, background first by custom; they need not sum to 1.
            iterations: of mean field; 0 gives the clipped probabilities, made to sum to 1.

        Returns:
            (C, H, W) float32, at each pixel summing to 1.

        Raises:
            InputError: another size than the picture's, no class, or values that are not finite.
        """
        height, width = self._image.shape[:2]
        if probabilities.ndim != 3 or not len(probabilities) or probabilities.shape[1:] != (height, width):
            raise InputError(f"probabilities: expected (classes, {height}, {width}), got {probabilities.shape}")
        size = working_size(height, width, len(probabilities), self._max_side)
        unary = np.stack([_resized(plane, size).ravel() for plane in probabilities], axis=1)
        if not np.isfinite(unary).all():
            raise InputError("probabilities contain NaN or infinite values")
        scores = np.log(np.clip(unary, _FLOOR, 1, out=unary), out=unary)
        solved = _mean_field(scores, self._kernels_of(size), self._weights, iterations)
        return np.stack([_resized(plane.reshape(size), (height, width)) for plane in solved.T])

    def _kernels_of(self, size: tuple[int, int]) -> list[GaussianKernel]:
        if size not in self._kernels:
            picture = Image.fromarray(self._image)
            if picture.size != size[::-1]:
                picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
            self._kernels = {size: _kernels(np.asarray(picture), *self._deviations)}
        return self._kernels[size]


def dense_crf(
    image: NDArray[np.uint8],
    probabilities: Values,
    iterations: int = ITERATIONS,
    smoothness: tuple[float, float] = SMOOTHNESS,
    appearance: tuple[float, float, float] = APPEARANCE,
    max_side: int = MAX_SIDE,
) -> Values:
    """Refine probability maps (C, H, W) by one picture (H, W, 3); see [`DenseCrf`] for all arguments."""
    return DenseCrf(image, smoothness, appearance, max_side)(probabilities, iterations)


def working_size(height: int, width: int, classes: int, max_side: int = MAX_SIDE) -> tuple[int, int]:
    """(height, width) that a CRF of so many classes works at: at most `max_side` long and `MAX_VALUES` in all."""
    shrink = min(1.0, max_side / max(height, width), (MAX_VALUES / (height * width * classes)) ** 0.5)
    return max(1, int(height * shrink)), max(1, int(width * shrink))


def _resized(plane: Values, size: tuple[int, int]) -> Values:
    """A map (h, w) at another size: bilinear, and averaging where it shrinks."""
    if plane.shape == size:
        return np.asarray(plane, dtype=np.float32)
    picture = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))


def _kernels(image: NDArray[np.uint8], nearby: float, far: float, color: float) -> list[GaussianKernel]:
    """Kernels of smoothness and of appearance over the pixels of a picture, row by row."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    places = np.stack([columns.ravel(), rows.ravel()], axis=1).astype(np.float64)
    colors = image.reshape(-1, 3).astype(np.float64)
    return [GaussianKernel(places / nearby), GaussianKernel(np.hstack([places / far, colors / color]))]


def _mean_field(scores: Values, kernels: list[GaussianKernel], weights: tuple[float, float], iterations: int) -> Values:
    """Mean field with Potts compatibility: scores (n, C), the logs of the probabilities -> marginals (n, C)."""
    marginals = _softmax(scores.copy())
    for _ in range(iterations):
        logits = scores.copy()
        for kernel, weight in zip(kernels, weights, strict=True):
            message = kernel(marginals)
            message *= np.float32(weight)
            logits += message
        marginals = _softmax(logits)
    return marginals


def _softmax(logits: Values) -> Values:
    """Softmax over the columns of (n, C), in place."""
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


__all__ = ["DenseCrf", "dense_crf", "working_size"]
