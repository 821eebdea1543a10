"""How long does the dense CRF take, beside pydensecrf2 (`pip install pydensecrf2`, which needs a compiler)?

    python benchmarks/crf.py [--size 500x375] [--classes 2 5 21] [--rounds 3]

Textured pictures and smooth probability maps, 10 iterations, one picture once: making the lattices is part of the time.
Runs in turns; processor seconds, minimum of the rounds; and how far the two are apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tap_llm.clip_as_rnn.crf import APPEARANCE, ITERATIONS, SMOOTHNESS, dense_crf


def make_problem(width: int, height: int, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A picture (H, W, 3) of blurred blobs with noise, and smooth maps (C, H, W) in 0..1."""
    rng = np.random.default_rng(0)
    blobs = ndimage.gaussian_filter(rng.uniform(size=(height, width, 3)), (8, 8, 0))
    blobs = 255 * (blobs - blobs.min()) / np.ptp(blobs)
    maps = ndimage.gaussian_filter(rng.uniform(size=(classes, height, width)), (0, 10, 10))
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    image = np.clip(blobs + rng.normal(0, 4, blobs.shape), 0, 255).astype(np.uint8)
    return image, ((maps - low) / (high - low)).astype(np.float32)


def compiled_crf(image: NDArray[np.uint8], maps: NDArray[np.float32]) -> Any:
    """The same with pydensecrf2."""
    from pydensecrf.densecrf import DenseCRF2D

    field = DenseCRF2D(image.shape[1], image.shape[0], len(maps))
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(maps.clip(1e-5, 1)).reshape(len(maps), -1)))
    field.addPairwiseGaussian(sxy=SMOOTHNESS[1], compat=SMOOTHNESS[0])
    field.addPairwiseBilateral(sxy=APPEARANCE[1], srgb=APPEARANCE[2], rgbim=image, compat=APPEARANCE[0])
    return np.array(field.inference(ITERATIONS)).reshape(maps.shape)


def timed(solve: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and the answer."""
    start = time.process_time()
    answer = solve()
    return time.process_time() - start, answer


def compare(width: int, height: int, classes: int, rounds: int) -> str:
    """A row of the table."""
    image, maps = make_problem(width, height, classes)
    ours: list[tuple[float, Any]] = []
    theirs: list[tuple[float, Any]] = []
    for _ in range(rounds):
        ours.append(timed(lambda: dense_crf(image, maps)))
        theirs.append(timed(lambda: compiled_crf(image, maps)))
    fastest, other = min(seconds for seconds, _ in ours), min(seconds for seconds, _ in theirs)
    gap = np.abs(ours[0][1] - theirs[0][1]).max()
    same = (ours[0][1].argmax(axis=0) == theirs[0][1].argmax(axis=0)).mean()
    return f"| {classes} | {fastest:.2f} s | {other:.2f} s | {fastest / other:.2f} | {gap:.1e} | {same:.2%} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="500x375", metavar="WxH")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 5, 21])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if importlib.util.find_spec("pydensecrf") is None:
        parser.error("there is nothing to compare with: pip install pydensecrf2")
    width, height = map(int, args.size.split("x"))
    print("| classes | ours | pydensecrf2 | ratio | largest difference | same labels |\n|---|---|---|---|---|---|")
    for classes in args.classes:
        print(compare(width, height, classes, args.rounds), flush=True)


if __name__ == "__main__":
    main()
