"""Fixtures that several folders share."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tap_llm.tap.conversion import convert_checkpoint

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = SHARED / "goldens" / "tap_tiny"
TOKENIZER = SHARED / "goldens" / "tokenizer" / "tokenizer.model"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models of most tests are tiny: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_data() -> Path:
    """Folder of the reference numbers."""
    if not GOLDEN.is_dir():
        pytest.skip("the reference numbers are not here")
    return GOLDEN


@pytest.fixture(scope="session")
def golden_arrays(golden_data: Path) -> dict[str, np.ndarray]:
    """The miniature official checkpoint, with the two matrices that its file leaves out."""
    arrays = pickle.loads((golden_data / "weights.pkl").read_bytes())
    for seed, name, scale in ((7, "tok_embeddings", 0.03125), (8, "text_proj", 0.125)):
        values = np.random.RandomState(seed).standard_normal((32000, 128)).astype(np.float32)
        arrays[f"text_decoder.transformer.{name}.weight"] = values * np.float32(scale)
    arrays["text_decoder.transformer.text_proj.weight"][2] *= 2.5
    return arrays


@pytest.fixture(scope="session")
def golden_folder(
    golden_data: Path, golden_arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The miniature official checkpoint, converted with concepts and tokenizer."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "weights.pkl").write_bytes(pickle.dumps(golden_arrays))
    tokenizer = TOKENIZER if TOKENIZER.is_file() else None
    report = convert_checkpoint(folder / "weights.pkl", folder / "out", golden_data / "concepts_scaled.pkl", tokenizer)
    assert report.fits
    return folder / "out"
