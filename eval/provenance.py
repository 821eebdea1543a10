"""Where results come from: hashes of weights and data, and versions of what computed them."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tap_llm

from .cache import as_json

_MODULES = {"pillow": "PIL"}
_PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "numpy", "pillow", "scipy", "pycocotools", "lvis", "pycocoevalcap",
)  # fmt: skip


def describe_model(pipe: Any, name: str) -> dict[str, Any]:
    """What identifies a model with a concept space in a results file.

    Args:
        pipe: a [`RegionPipeline`], or anything else with `model` and `concepts`.
        name: as the user gave it.

    Returns:
        As `describe_modules`, and number and hash of the concepts.
    """
    concepts = pipe.concepts
    named = None if concepts is None else hash_tensors({"weights": concepts.weights}, *concepts.names)
    about = {"concepts": 0 if concepts is None else len(concepts), "concepts_sha256": named}
    return describe_modules(name, pipe.model) | about


def describe_modules(name: str, *modules: nn.Module) -> dict[str, Any]:
    """What identifies a model in a results file.

    Args:
        name: as the user gave it.
        modules: at least one; all that the model consists of, in a fixed order.

    Returns:
        Name, number of parameters, dtype and device of the first one, and a hash of all weights.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    one = len(modules) == 1
    weights = {
        key if one else f"{index}.{key}": value
        for index, module in enumerate(modules)
        for key, value in module.state_dict().items()
    }
    return {
        "name": str(name),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "device": str(parameters[0].device),
        "sha256": hash_tensors(weights),
    }


def hash_tensors(tensors: dict[str, Tensor], *texts: str) -> str:
    """SHA-256 of tensors by name, and of texts; independent of files, order and device."""
    digest = hashlib.sha256(hash_texts(*texts).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_texts(*texts: str) -> str:
    """SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def fingerprint(*parts: Any) -> str:
    """SHA-256 of arrays and JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            packed = np.packbits(part) if part.dtype == bool else np.ascontiguousarray(part)
            digest.update(f"{part.dtype} {part.shape}".encode() + packed.tobytes())
        else:
            digest.update(as_json(part).encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of this package, of Python, and of those installed packages that can change a number."""
    installed = [package for package in _PACKAGES if importlib.util.find_spec(_MODULES.get(package, package))]
    packages = {package: metadata.version(package) for package in installed}
    return {"tap_llm": tap_llm.__version__, "python": platform.python_version(), **packages}
