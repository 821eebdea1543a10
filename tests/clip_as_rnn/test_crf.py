"""The dense CRF against sums over all pairs of pixels, against pydensecrf2 where it is installed, and by properties."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from tap_llm.clip_as_rnn.crf import MAX_SIDE, DenseCrf, dense_crf, working_size
from tap_llm.clip_as_rnn.lattice import GaussianKernel
from tap_llm.errors import InputError

Floats = NDArray[np.float32]
Picture = tuple[NDArray[np.uint8], Floats]


def textured(height: int, width: int, classes: int, seed: int = 0) -> Picture:
    """Soft blobs of colour with noise, and soft maps that know nothing of them."""
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.uniform(size=(height, width, 3)), (5, 5, 0))
    blobs = 255 * (blobs - blobs.min()) / np.ptp(blobs)
    maps = ndimage.gaussian_filter(rng.uniform(size=(classes, height, width)), (0, 4, 4))
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    image = np.clip(blobs + rng.normal(0, 4, blobs.shape), 0, 255).astype(np.uint8)
    return image, ((maps - low) / (high - low)).astype(np.float32)


def rectangle(size: tuple[int, int], top: int, left: int, height: int, width: int) -> NDArray[np.bool_]:
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def misplaced(scale: int = 1) -> tuple[NDArray[np.uint8], Floats, NDArray[np.bool_]]:
    """A blue rectangle on orange, and soft maps of one that is 1 row and 2 columns off."""
    size = (24 * scale, 32 * scale)
    truth = rectangle(size, *(scale * value for value in (6, 8, 12, 16)))
    wrong = rectangle(size, *(scale * value for value in (7, 10, 12, 16)))
    image = np.where(truth[..., None], [30, 60, 200], [230, 160, 40]).astype(np.uint8)
    object_ = np.where(wrong, 0.7, 0.3).astype(np.float32)
    return image, np.stack([1 - object_, object_]), truth


def iou(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((mask & other).sum() / (mask | other).sum())


def exact_crf(image: NDArray[np.uint8], probabilities: Floats, iterations: int = 10) -> Floats:
    """Mean field with all pairs of pixels."""
    height, width = image.shape[:2]
    places = np.stack(np.mgrid[:height, :width], axis=-1).reshape(-1, 2)
    far = np.hstack([places / 67, image.reshape(-1, 3) / 3])
    kernels = []
    for weight, features in ((3, places), (4, far)):
        kernel = np.exp(-((features[:, None] - features[None]) ** 2).sum(axis=2) / 2)
        scale = kernel.sum(axis=1) ** -0.5
        kernels.append(weight * scale[:, None] * kernel * scale)
    scores = np.log(probabilities.reshape(len(probabilities), -1).T.clip(1e-5, 1))
    marginals = _softmax(scores)
    for _ in range(iterations):
        marginals = _softmax(scores + sum(kernel @ marginals for kernel in kernels))
    return marginals.T.reshape(probabilities.shape).astype(np.float32)


def _softmax(logits: NDArray) -> NDArray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_the_kernel_is_a_gaussian() -> None:
    features = np.random.default_rng(0).uniform(0, 3, (400, 3))
    kernel = GaussianKernel(features)
    exact = np.exp(-((features[:, None] - features[None]) ** 2).sum(axis=2) / 2)
    exact *= exact.sum(axis=1)[:, None] ** -0.5 * exact.sum(axis=0) ** -0.5
    ours = kernel(np.eye(400, dtype=np.float32))
    assert np.abs(ours - exact).max() < 0.3 * exact.max()
    assert np.abs(ours - ours.T).max() < 0.15 * exact.max()
    values = np.sin(features[:, :1] * 2).astype(np.float32)
    assert np.abs(kernel(values) - exact @ values).max() < 0.08


def test_points_that_are_far_apart_do_not_meet() -> None:
    kernel = GaussianKernel(np.array([[0.0, 0.0], [100.0, 0.0], [100.0, 100.0]]))
    assert np.allclose(kernel(np.eye(3, dtype=np.float32)), np.eye(3), atol=1e-6)


def test_all_pairs_of_pixels_give_the_same_labels() -> None:
    image, maps, _ = misplaced()
    ours, exact = dense_crf(image, maps), exact_crf(image, maps)
    assert np.array_equal(ours.argmax(axis=0), exact.argmax(axis=0))
    assert np.abs(ours - exact).max() < 0.01


def test_noise_that_decides_nothing_differs_from_all_pairs_in_few_pixels() -> None:
    image, maps = textured(24, 32, 3)
    ours, exact = dense_crf(image, maps), exact_crf(image, maps)
    assert (ours.argmax(axis=0) == exact.argmax(axis=0)).mean() > 0.98


@pytest.mark.parametrize(("picture", "tolerance"), [((24, 32, 3), 2e-4), ((90, 120, 2), 9e-3), ((60, 80, 5), 9e-3)])
def test_pydensecrf_gives_the_same(picture: tuple[int, int, int], tolerance: float) -> None:
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")
    image, maps = textured(*picture)
    field = densecrf.DenseCRF2D(image.shape[1], image.shape[0], len(maps))
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(maps.clip(1e-5, 1)).reshape(len(maps), -1)))
    field.addPairwiseGaussian(sxy=1, compat=3)
    field.addPairwiseBilateral(sxy=67, srgb=3, rgbim=image, compat=4)
    theirs = np.array(field.inference(10)).reshape(maps.shape)
    ours = dense_crf(image, maps)
    assert np.array_equal(ours.argmax(axis=0), theirs.argmax(axis=0))
    assert np.abs(ours - theirs).max() < tolerance


def test_without_iterations_the_clipped_probabilities_sum_to_one() -> None:
    image, maps = textured(20, 30, 3)
    clipped = maps.clip(1e-5, 1)
    assert np.allclose(dense_crf(image, maps, iterations=0), clipped / clipped.sum(axis=0), atol=1e-6)


def test_without_weights_the_likeliest_class_stays() -> None:
    image, maps = textured(20, 30, 3)
    refined = dense_crf(image, maps, smoothness=(0, 1), appearance=(0, 67, 3))
    assert np.array_equal(refined.argmax(axis=0), maps.argmax(axis=0))


def test_the_order_of_classes_means_nothing() -> None:
    image, maps = textured(20, 30, 4)
    order = [2, 0, 3, 1]
    crf = DenseCrf(image)
    assert np.allclose(crf(maps[order]), crf(maps)[order], atol=1e-5)


def test_a_misplaced_rectangle_moves_to_its_place() -> None:
    image, maps, truth = misplaced()
    assert iou(maps[1] > 0.5, truth) == pytest.approx(0.67, abs=0.005)
    refined = dense_crf(image, maps)
    assert iou(refined[1] > 0.5, truth) == 1.0
    assert np.allclose(refined.sum(axis=0), 1, atol=1e-5)


def test_a_picture_of_one_colour_keeps_what_is_certain() -> None:
    _, maps, _ = misplaced()
    refined = dense_crf(np.full((24, 32, 3), 127, np.uint8), maps)
    assert np.isfinite(refined).all() and refined[1].mean() < maps[1].mean()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_the_smallest_pictures_pass(size: tuple[int, int]) -> None:
    refined = dense_crf(np.zeros((*size, 3), np.uint8), np.full((1, *size), 0.5, np.float32))
    assert refined.shape == (1, *size) and (refined == 1).all()


def test_large_pictures_are_solved_at_a_bounded_size() -> None:
    assert working_size(375, 500, 21) == (375, 500)
    assert working_size(3000, 4000, 2) == (750, MAX_SIDE)
    height, width = working_size(3000, 4000, 1000)
    assert height * width * 1000 <= 2**26 and height / width == pytest.approx(0.75, abs=0.01)
    assert working_size(1, 10**6, 2) == (1, MAX_SIDE)
    image, maps, truth = misplaced(scale=8)
    refined = dense_crf(image, maps, max_side=128)
    assert refined.shape == maps.shape and refined.dtype == np.float32
    assert np.allclose(refined.sum(axis=0), 1, atol=1e-5)
    assert iou(refined[1] > 0.5, truth) > 0.94


def test_one_picture_serves_many_maps() -> None:
    image, maps = textured(20, 30, 3)
    crf = DenseCrf(image)
    crf(maps)
    kernels = crf._kernels_of((20, 30))
    assert np.array_equal(crf(maps[:2]), dense_crf(image, maps[:2]))
    assert crf._kernels_of((20, 30)) is kernels


def test_bad_input_is_named() -> None:
    image, maps = textured(20, 30, 2)
    for bad in (image[..., 0], image.astype(np.float32), image[:0]):
        with pytest.raises(InputError, match=r"expected \(height, width, 3\) uint8"):
            DenseCrf(bad)
    with pytest.raises(InputError, match=r"expected \(classes, 20, 30\), got \(2, 30, 20\)"):
        dense_crf(image, maps.transpose(0, 2, 1))
    with pytest.raises(InputError, match="NaN"):
        dense_crf(image, np.full_like(maps, np.nan))
    with pytest.raises(InputError, match="above 0"):
        dense_crf(image, maps, smoothness=(3, 0))
    with pytest.raises(InputError, match="too many cells"):
        dense_crf(image, maps, appearance=(4, 1e-6, 1e-6))
