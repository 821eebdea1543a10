"""What a recipe consists of: its configuration, what it trains, and what the loop is handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from .config import OptimizerConfig, RunConfig
from .delivery import Batch, Batches
from .models import ModelConfig
from .sources import DataConfig

VALIDATION_BATCHES = 12

Sums = dict[str, Tensor]
Metrics = dict[str, tuple[Tensor, Tensor]]


@dataclass
class RecipeConfig:
    """What the configurations of all recipes have."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


class Trainee(Protocol):
    """What a recipe trains: a module whose forward gives sums over rows, so that means are exact over processes."""

    def __call__(self, **batch: Any) -> tuple[Sums, Metrics]:
        """Sum of each loss over the rows of the batch, and metrics as (sum, count)."""

    def counts(self, batch: Batch) -> dict[str, float]:
        """Rows that each loss is a mean over."""

    weights: dict[str, float]
    """Factor on each loss."""


@dataclass
class Recipe:
    """A recipe's parts, handed to [`fit`].

    Args:
        trainee: see [`Trainee`].
        batches: micro-batch n of the whole run, over all processes.
        validation: batches for validation; the same at every time.
        save: writes the finished model into a folder, given the whole state dict of the trainee. One process does
            it, so it must not touch the trainee's own weights, of which it may have a part only.
        better: name of the validation metric that says which model is the best (higher is better).
        pictures: predictions to look at in TensorBoard, {title: (H, W, 3) uint8}, given the unwrapped trainee.
    """

    trainee: nn.Module
    batches: Batches
    validation: Batches
    save: Callable[[dict[str, Tensor], Path], None]
    better: str
    pictures: Callable[[nn.Module], dict[str, Any]] | None = None
