"""Optimisers and learning rates (TAP training recipe: AdamW, warm-up, cosine, weight decay on all but norms)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tap_llm.errors import InputError

from .config import OptimizerConfig

SCHEDULES = ("cosine", "linear", "constant")
_LAYER = re.compile(r"vision_encoder\.layers\.(\d+)\.")
_MATRIX = re.compile(r"(qkv|[qkvo]_proj|proj|fc1|fc2)\.weight$")
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def build_optimizers(module: nn.Module, config: OptimizerConfig, sharded: bool = False) -> list[Optimizer]:
    """Optimisers over all trainable parameters; every group carries its peak learning rate as `peak`.

    Args:
        module: what is trained.
        config: settings.
        sharded: parameters will be sharded (FSDP, DeepSpeed).

    Raises:
        InputError: settings that cannot be, Muon for sharded parameters, or nothing to train.
    """
    check_optimizer(config)
    if config.name == "muon" and sharded:
        raise InputError("Muon needs whole matrices: use optimizer.name=adamw with FSDP and DeepSpeed")
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    is_matrix = {name: config.name == "muon" and bool(_MATRIX.search(name)) for name, _ in named}
    norms = _norm_parameters(module)
    depth = encoder_depth(module)
    groups: dict[tuple[bool, float, float], list[Tensor]] = {}
    for name, parameter in named:
        decay = 0.0 if name in norms else config.weight_decay
        factor = layer_factor(name, depth, config.layer_decay) * _named_factor(name, config)
        groups.setdefault((is_matrix[name], decay, factor), []).append(parameter)
    rest = _groups(groups, False, config.learning_rate)
    matrices = _groups(groups, True, config.matrix_learning_rate)
    optimizers: list[Optimizer] = []
    if rest:
        optimizers.append(AdamW(rest, lr=config.learning_rate, betas=(config.betas[0], config.betas[1])))
    if matrices:
        optimizers.append(_muon(matrices, config.matrix_learning_rate))
    if not optimizers:
        raise InputError("nothing is left to train: all parts are frozen, or have no loss")
    return optimizers


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise InputError for settings that cannot be."""
    if config.name not in ("adamw", "muon"):
        raise InputError(f"optimizer.name must be adamw or muon, got {config.name!r}")
    if config.schedule not in SCHEDULES:
        raise InputError(f"optimizer.schedule must be one of {', '.join(SCHEDULES)}, got {config.schedule!r}")
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise InputError(f"optimizer.betas must be two numbers from 0 to below 1, got {config.betas}")
    wrong = {
        text: factor for text, factor in config.factors.items() if not isinstance(factor, int | float) or factor < 0
    }
    if wrong:
        raise InputError(f"optimizer.factors must be numbers of at least 0, got {wrong}")
    if config.warmup < 0:
        raise InputError(f"optimizer.warmup must not be negative, got {config.warmup}")


def _muon(groups: list[dict], rate: float) -> Optimizer:
    try:
        from torch.optim import Muon
    except ImportError:
        raise InputError("optimizer.name=muon needs torch 2.9 or later; use adamw") from None
    return Muon(groups, lr=rate, adjust_lr_fn="match_rms_adamw")


def _groups(groups: dict[tuple[bool, float, float], list[Tensor]], matrices: bool, rate: float) -> list[dict]:
    return [
        {"params": parameters, "weight_decay": decay, "peak": rate * factor}
        for (is_matrix, decay, factor), parameters in groups.items()
        if is_matrix == matrices
    ]


def _norm_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters of normalisation layers, which alone are not decayed (TAP v1.1)."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _NORMS)]
    return {f"{name}.{key}" for name, layer in layers for key, _ in layer.named_parameters(recurse=False)}


def encoder_depth(module: nn.Module) -> int:
    """Number of layers of the image encoder inside a module; 0 without one."""
    found = [int(match[1]) for name, _ in module.named_parameters() if (match := _LAYER.search(name))]
    return max(found, default=-1) + 1


def layer_factor(name: str, depth: int, decay: float) -> float:
    """Learning rate factor of a parameter: `decay` to the number of encoder layers after it.

    The patch and position embeddings count as one layer before the first; all that follows the encoder gets 1.
    """
    match = _LAYER.search(name)
    if match:
        return decay ** (depth - 1 - int(match[1]))
    if "vision_encoder.patch_embeddings" in name or "vision_encoder.position_embeddings" in name:
        return decay**depth
    return 1.0


def _named_factor(name: str, config: OptimizerConfig) -> float:
    return math.prod(factor for text, factor in config.factors.items() if text in name)


def schedule_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the peak learning rates at a step (from 0).

    Warm-up a + (1 - a) * (s + 1) / W as long as s < W; then down to `min_factor` along a cosine or a line, or none.
    """
    warmup = min(config.warmup, steps)
    if step < warmup:
        share = (step + 1) / warmup
        return config.warmup_start + (1 - config.warmup_start) * share
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "constant":
        return 1.0
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_factor + (1 - config.min_factor) * left


def set_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every group's learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
