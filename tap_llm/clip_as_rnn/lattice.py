"""Gaussian filtering of many points in many dimensions: the permutohedral lattice as sparse matrices.

Each point spreads its values over the d + 1 corners of the simplex that it lies in, the corners are blurred along the
d + 1 axes of the lattice, and each point reads them back. The work grows with the number of points, not with its square
(Adams, Baek, Davis: Fast High-Dimensional Filtering Using the Permutohedral Lattice, 2010).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ..errors import InputError
from ..masks import FloatArray, IntArray

Values = NDArray[np.float32]

_TINY = 1e-20  # keeps the normaliser finite


class GaussianKernel:
    """The kernel exp(-|f_i - f_j|² / 2) of n points, symmetrically normalised; a point counts among its neighbours.

    Args:
        features: (n, d), each axis in units of its standard deviation.

    Attributes:
        scale: (n,) float32, one over the root of each point's sum of kernel weights.

    Raises:
        InputError: NaN or infinite features, or more lattice cells than 64 bits can count.
    """

    def __init__(self, features: FloatArray) -> None:
        if not np.isfinite(features).all():
            raise InputError("features of the lattice must be finite")
        count, corners = features.shape[0], features.shape[1] + 1
        origin, rank, weights = _enclosing_simplex(features)
        keys, steps = _pack_corners(origin[:, :-1], rank[:, :-1])
        vertices, inverse = np.unique(keys, return_inverse=True)
        starts = np.arange(0, count * corners + 1, corners)
        shape = (count, len(vertices))
        self._slice = sparse.csr_matrix((weights.astype(np.float32).ravel(), inverse.ravel(), starts), shape=shape)
        self._blurs = [_blur_matrix(vertices, step) for step in steps]
        self._gain = np.float32(1 / (1 + 2.0 ** -(corners - 1)))
        self.scale = (self._filter(np.ones((count, 1), np.float32))[:, 0] + np.float32(_TINY)) ** np.float32(-0.5)
        self._slice.data *= np.repeat(self.scale, corners)

    def __call__(self, values: Values) -> Values:
        """Filter values (n, C) float32 -> (n, C): scale_i * sum over j of kernel_ij * scale_j * value_j."""
        return self._filter(values)

    def _filter(self, values: Values) -> Values:
        lattice: Any = self._slice.T @ values
        for blur in self._blurs:
            lattice = blur @ lattice
        filtered: Values = self._slice @ lattice
        filtered *= self._gain
        return filtered


def _enclosing_simplex(features: FloatArray) -> tuple[IntArray, IntArray, FloatArray]:
    """The simplex of each point: its first corner (n, d + 1), the rank of each coordinate, and the corners' weights."""
    embedded = _embed(features)
    side = embedded.shape[1]  # d + 1: what the coordinates of lattice points differ by
    rounded = np.rint(embedded / side).astype(np.int64)
    excess = rounded.sum(axis=1, keepdims=True)
    origin = rounded * side
    rank = _descending_ranks(embedded - origin) + excess
    turn = side * ((rank < 0).astype(np.int64) - (rank >= side))  # brings the coordinates' sum back to 0
    origin += turn
    rank += turn
    return origin, rank, _barycentric((embedded - origin) / side, rank)


def _embed(features: FloatArray) -> FloatArray:
    """(n, d) -> (n, d + 1) in the plane where coordinates sum to 0, scaled to a blur of standard deviation 1."""
    count, dims = features.shape
    axis = np.arange(dims)
    scaled = features * ((dims + 1) * np.sqrt(2 / 3) / np.sqrt((axis + 1) * (axis + 2)))
    embedded = np.empty((count, dims + 1))
    total = np.zeros(count)
    for i in range(dims, 0, -1):
        embedded[:, i] = total - i * scaled[:, i - 1]
        total += scaled[:, i - 1]
    embedded[:, 0] = total
    return embedded


def _descending_ranks(values: FloatArray) -> IntArray:
    """Place of each value in its row, the largest first; of equal values the left one. (n, k) -> (n, k)."""
    ranks = np.zeros(values.shape, dtype=np.int64)
    for i in range(values.shape[1]):
        for j in range(i + 1, values.shape[1]):
            less = values[:, i] < values[:, j]
            ranks[:, i] += less
            ranks[:, j] += ~less
    return ranks


def _barycentric(offsets: FloatArray, rank: IntArray) -> FloatArray:
    """Weights (n, d + 1) of a simplex's corners, from the offsets to its first corner in units of the side."""
    count, corners = offsets.shape
    weights = np.zeros((count, corners + 1))
    rows = np.arange(count)[:, None]
    weights[rows, corners - 1 - rank] += offsets
    weights[rows, corners - rank] -= offsets
    weights[:, 0] += 1 + weights[:, corners]
    return weights[:, :corners]


def _pack_corners(origin: IntArray, rank: IntArray) -> tuple[IntArray, list[int]]:
    """One whole number per corner of each simplex (n, d + 1), and what to add to it per step along each axis.

    The last coordinate follows from the others; room at both ends keeps neighbours apart.
    """
    side = origin.shape[1] + 1
    low = origin.min(axis=0) - 2 * side
    spans = [int(span) for span in origin.max(axis=0) - low + 1 + 2 * side]
    strides = [int(np.prod(spans[:i], dtype=object)) for i in range(side)]
    if strides[-1] >= 2**62:
        raise InputError("the lattice has too many cells; larger standard deviations have fewer")
    strides = strides[:-1]
    first = (origin - low) @ strides
    jumps = np.where(rank[:, None] < side - np.arange(side)[:, None], 0, -side) @ strides  # (n, side)
    keys = first[:, None] + np.arange(side) * sum(strides) + jumps
    return keys, [side * stride - sum(strides) for stride in [*strides, 0]]


def _blur_matrix(vertices: IntArray, step: int) -> sparse.csr_matrix:
    """Identity plus half of the two neighbours, where they exist, along one axis of sorted packed vertices."""
    count = len(vertices)
    wanted = vertices + step
    above = np.minimum(np.searchsorted(vertices, wanted), count - 1).astype(np.int32)
    below = np.flatnonzero(vertices[above] == wanted).astype(np.int32)
    above = above[below]
    first, last = np.zeros(count, dtype=np.int32), np.zeros(count, dtype=np.int32)
    first[above] = last[below] = 1  # a row's entries: the neighbour below, the vertex itself, the neighbour above
    ends = np.cumsum(1 + first + last, dtype=np.int32)
    columns, weights = np.empty(ends[-1], dtype=np.int32), np.full(ends[-1], 0.5, dtype=np.float32)
    middle = ends - 1 - last
    columns[middle], weights[middle] = np.arange(count, dtype=np.int32), 1
    columns[middle[above] - 1], columns[middle[below] + 1] = below, above
    return sparse.csr_matrix((weights, columns, np.concatenate(([0], ends), dtype=np.int32)), shape=(count, count))


__all__ = ["GaussianKernel"]
