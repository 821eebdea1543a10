"""Pictures of predictions show the colours that the image processor took away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tap_llm.tap.image_processing_tap import TapImageProcessor
from training.pictures import _pixels


@pytest.mark.parametrize("colours", [{}, {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.5, 1.0, 0.3]}])
def test_colours_come_back(colours: dict[str, Any]) -> None:
    processor = TapImageProcessor(size={"longest_edge": 16}, **colours)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    shown = _pixels(processor(image, return_tensors="pt")["pixel_values"], processor)
    torch.testing.assert_close(shown[0].permute(1, 2, 0), torch.from_numpy(image) / 255, rtol=0, atol=1e-6)
