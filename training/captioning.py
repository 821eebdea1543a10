"""TAP's caption decoder with its loss, and the batches it learns from (arXiv:2312.09128, section 3.3).

The rest of TAP is frozen. Symbols: B images, N regions, L ids, S canvas side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tap_llm.errors import InputError
from tap_llm.tap.image_processing_tap import TapImageProcessor, canvas_side
from tap_llm.tap.modeling_tap import TapForConditionalGeneration
from tap_llm.tap.outputs import take_slots
from tap_llm.tap.tokenization import encode_captions

from .examples import Example, Pictures, pick_regions
from .losses import IGNORED_NAME as IGNORED
from .prompts import Prompts, PromptSampler


@dataclass
class CaptionLossConfig:
    """How the decoder is prompted and judged."""

    box_share: float = 0.5
    """Share of regions whose token comes from the box; the others' from points of the mask predicted for the box."""
    max_points: int = 9
    smoothing: float = 0.1
    max_length: int = 40
    """Ids of a caption, begin and end included; what is longer is cut."""


class CaptionObjective(nn.Module):
    """The caption decoder of a frozen TAP, with its loss as a sum over ids.

    Args:
        tap: the model; all but its caption decoder is frozen and stays in eval mode.
        config: prompts and loss.

    Raises:
        InputError: captions may be longer than the decoder takes.
    """

    weights = {"caption": 1.0}

    def __init__(self, tap: TapForConditionalGeneration, config: CaptionLossConfig) -> None:
        super().__init__()
        longest = tap.config.text_config.max_position_embeddings
        if not 2 <= config.max_length <= longest:
            raise InputError(f"loss.max_length must be 2 to {longest} for this decoder, got {config.max_length}")
        self.tap, self.config = tap, config
        tap.model.requires_grad_(False)
        self.sampler = PromptSampler(tap.config.vision_config.image_size, 0.0, max_points=config.max_points)

    def train(self, mode: bool = True) -> Self:
        """As in torch; the frozen part stays in eval mode."""
        super().train(mode)
        self.tap.model.eval()
        return self

    def counts(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Ids that are predicted: all but the first of each caption."""
        return {"caption": float((batch["labels"][:, 1:] != IGNORED).sum())}

    def forward(self, pixel_values: Tensor, **batch: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Loss and accuracy of a batch of [`CaptionBatches`]."""
        tokens = self._semantic_tokens(pixel_values, batch)
        labels = batch["labels"]
        text = self.tap.config.text_config
        prompt = torch.tensor([[text.semantic_token_id, text.bos_token_id]], device=labels.device)
        ids = labels.masked_fill(labels == IGNORED, text.pad_token_id)
        logits = self.tap.caption_decoder(
            input_ids=torch.cat([prompt.expand(len(labels), -1), ids[:, 1:-1]], dim=1),
            semantic_tokens=tokens,
            use_cache=False,
            logits_to_keep=labels.shape[1] - 1,
            return_dict=True,
        ).logits.float()  # (N, L - 1, V)
        wanted = labels[:, 1:]
        loss = F.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=IGNORED,
            label_smoothing=self.config.smoothing,
        )  # fmt: skip
        known = wanted != IGNORED
        return {"caption": loss}, {"accuracy": (((logits.argmax(-1) == wanted) & known).sum(), known.sum())}

    @torch.no_grad()
    def _semantic_tokens(self, pixel_values: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """(N, D): of the box, or of points inside the mask that was predicted for the box."""
        generator = torch.Generator().manual_seed(int(batch["seed"]))
        images = self.tap.get_image_embeddings(pixel_values)
        prompts = Prompts.from_boxes(batch["boxes"])
        by_box = self._prompt(images, prompts, batch)
        predicted = by_box.pred_masks[:, 0] > 0
        empty = ~predicted.flatten(1).any(1)
        by_points = self._prompt(images, self.sampler.start(predicted, generator), batch)
        from_box = (torch.rand(len(empty), generator=generator).to(empty.device) < self.config.box_share) | empty
        tokens = take_slots(by_points.semantic_tokens, by_points.slots)
        return torch.where(from_box[:, None], by_box.semantic_tokens[:, 0], tokens)

    def _prompt(self, images: Tensor, prompts: Prompts, batch: dict[str, Tensor]) -> Any:
        return self.tap.model(
            image_embeddings=images, input_points=prompts.points, input_labels=prompts.labels,
            region_image_index=batch["region_image_index"], return_dict=True,
        )  # fmt: skip


class CaptionBatches:
    """Micro-batch n of captioned regions.

    Args:
        pictures: picture n, with captions.
        tokenizer: of the caption decoder.
        image_processor: makes `pixel_values`.
        batch_size: B.
        regions: captions per image, at most; an image with fewer regions gives fewer rows.
        max_length: ids of a caption.
        length: number of batches; None for an endless run.
    """

    def __init__(
        self,
        pictures: Pictures,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: TapImageProcessor,
        batch_size: int,
        regions: int,
        max_length: int,
        length: int | None = None,
    ) -> None:
        self.pictures, self.tokenizer, self.image_processor = pictures, tokenizer, image_processor
        self.batch_size, self.regions, self.max_length, self.length = batch_size, regions, max_length, length
        self.side = canvas_side(image_processor)

    def __len__(self) -> int:
        return self.length if self.length is not None else 2**40

    def __getitem__(self, number: int) -> Example:
        """A batch.

        Returns:
            `pixel_values` (B, 3, S, S); `boxes` (N, 4) in canvas pixels, `region_image_index` (N,), `labels` (N, L)
            with begin and end, padded with -100; `seed` () int64 for the prompts.
        """
        first = number * self.batch_size
        images, boxes, captions, rows = [], [], [], []
        for position in range(self.batch_size):
            picture = self.pictures[first + position]
            rng = np.random.default_rng((self.pictures.seed, first + position, 2))
            captioned = [row for row, texts in enumerate(picture.captions) if texts]
            picks = [captioned[pick] for pick in pick_regions(rng, len(captioned), min(self.regions, len(captioned)))]
            images.append(picture.image)
            boxes.append(picture.boxes[picks] * self.side / max(picture.image.shape[:2]))
            captions += [str(rng.choice(picture.captions[pick])) for pick in picks]
            rows.append(len(picks))
        return {
            "pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"],
            "boxes": torch.from_numpy(np.concatenate(boxes)).float(),
            "region_image_index": torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)),
            "labels": self._labels(captions),
            "seed": torch.tensor(first),
        }

    def take_problems(self) -> list[str]:
        """Messages about broken samples that were met since the last call."""
        return self.pictures.take_problems()

    def _labels(self, captions: list[str]) -> Tensor:
        ids = encode_captions(self.tokenizer, captions, self.max_length)
        labels = torch.full((len(ids), max(map(len, ids), default=2)), IGNORED)
        for row, row_ids in enumerate(ids):
            labels[row, : len(row_ids)] = torch.tensor(row_ids)
        return labels
