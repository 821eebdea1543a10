"""A language model that learns the text of the scene world, with words in the place of regions.

Later a projector puts what TAP knows of a region, and its box, into one embedding or a few. So that such embeddings are
nothing new, the placeholder of a region gets the sum of the embeddings of all words about it, plus a code of its box;
the projector then has to find these sums, which the language model can read already (`training/tell.py`).

Symbols: R rows of conversations, L tokens, N regions, W words, d width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tap_llm.errors import InputError
from tap_llm.region_llm.encoding import IGNORED
from tap_llm.region_llm.placeholders import placeholder_mask
from tap_llm.region_llm.projectors import BoxPosition

from .recipe import Metrics, Sums


class LanguageObjective(nn.Module):
    """Next-token loss on all text, apart for what users ask and what the assistant answers.

    Args:
        llm: any causal LM of Transformers.
        region_token_id: the placeholder.
        questions: weight of what users ask; that of answers is 1.
    """

    def __init__(self, llm: Any, region_token_id: int, questions: float = 1.0) -> None:
        super().__init__()
        self.llm, self.region_token_id = llm, region_token_id
        self.weights = {"answers": 1.0, "questions": questions}
        self.position = BoxPosition(llm.config.hidden_size, llm.config.initializer_range)
        self.position.init_weights()

    def counts(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Tokens that are predicted."""
        known, answers = batch["labels"][:, 1:] != IGNORED, batch["answers"][:, 1:]
        return {"answers": float((known & answers).sum()), "questions": float((known & ~answers).sum())}

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, answers: Tensor, words: Tensor, boxes: Tensor
    ) -> tuple[Sums, Metrics]:
        """Losses, and the accuracy of answers, of a batch of [`TalkBatches`]."""
        embeds = self.embed(input_ids, words, boxes)
        logits = self.llm(inputs_embeds=embeds, position_ids=position_ids, use_cache=False).logits[:, :-1].float()
        wanted, is_answer = labels[:, 1:], answers[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED)  # (R, L - 1)
        asked = is_answer & (wanted != IGNORED)
        right = (logits.argmax(-1) == wanted) & asked
        sums = {"answers": losses[is_answer].sum(), "questions": losses[~is_answer].sum()}
        return sums, {"accuracy": (right.sum(), asked.sum())}

    def embed(self, input_ids: Tensor, words: Tensor, boxes: Tensor) -> Tensor:
        """Token embeddings (R, L, d), with a region's row in the place of each placeholder.

        Args:
            input_ids: (R, L) with N placeholders.
            words: (N, W) ids about each region, padded with -1; one without any keeps the placeholder's embedding.
            boxes: (N, 4) (cx, cy, w, h) in shares.
        """
        table = self.llm.get_input_embeddings()
        embeds = table(input_ids)
        places = placeholder_mask(input_ids, self.region_token_id, len(words))
        # The code has unit RMS at the start, and then that of embeddings.
        code = self.position(boxes) * self.llm.config.initializer_range
        rows = (told_embeddings(table, words) + code) * math.sqrt(0.5)
        rows = rows.where((words >= 0).any(1, keepdim=True), embeds[places])
        return embeds.masked_scatter(places.unsqueeze(-1), rows.to(embeds.dtype))


def told_embeddings(table: nn.Module, words: Tensor) -> Tensor:
    """(N, d) sums of the embeddings of all words about each region, over the root of their number.

    Args:
        table: token embeddings.
        words: (N, W) ids, padded with -1.
    """
    known = (words >= 0).unsqueeze(-1)
    return (table(words.clamp(min=0)) * known).sum(1) / known.sum(1).clamp(min=1).sqrt()


REGION_CODE = "region_code.safetensors"


def save_region_code(objective: LanguageObjective, state: dict[str, Tensor], folder: Path) -> None:
    """Keep the linear layer over box codes that the language model reads, beside it.

    Args:
        objective: what was trained.
        state: its state dict, or that of an average of it.
        folder: of the language model.
    """
    scale = objective.position.gain * objective.llm.config.initializer_range
    keys = ("weight", "bias")
    code = {key: (state[f"position.linear.{key}"].float() * scale).contiguous() for key in keys}
    save_file(code, folder / REGION_CODE)


@torch.no_grad()
def load_region_code(position: BoxPosition, scale: float, folder: str) -> None:
    """Give a layer the code of boxes that a language model has learned to read.

    Args:
        position: what it is given to.
        scale: what the layer's output is multiplied with later.
        folder: of the language model.

    Raises:
        InputError: the folder holds no such code, or one of another size.
    """
    path = Path(folder) / REGION_CODE
    if not path.is_file():
        raise InputError(f"{folder} has no {REGION_CODE}: it was not made by training.language")
    code = load_file(path)
    if code["weight"].shape != position.linear.weight.shape:
        raise InputError(f"{path} is for embeddings of width {len(code['bias'])}, not {position.linear.out_features}")
    for key, value in code.items():
        getattr(position.linear, key).copy_(value / (position.gain * scale))
