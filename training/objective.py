"""TAP with the losses of its pre-training: masks, scores and concepts over two prompts (arXiv:2312.09128, section 3).

Symbols: B images, N regions, S = 4 slots, K concepts, C colour words, G = side of the image embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tap_llm.concepts import ConceptSpace
from tap_llm.data.colours import COLOUR_WORDS
from tap_llm.errors import InputError
from tap_llm.tap.modeling_tap import TapModel
from tap_llm.tap.outputs import take_slots

from .losses import IGNORED_NAME, concept_kl, mask_loss, name_kl, training_slots, true_iou
from .prompts import Prompts, PromptSampler

HEADS_FILE = "training_heads.safetensors"

LOSS_OF_CELLS = ("cell_name", "cell_colour")

Sums = dict[str, Tensor]
Metrics = dict[str, tuple[Tensor, Tensor]]


@dataclass
class PromptConfig:
    """The two-stage prompt sampler."""

    box_probability: float = 0.5
    """Share of regions that start from their box; the others start from a point."""
    interactive_probability: float = 0.5
    """Share of regions whose second prompt looks at the first answer."""
    error_region: bool = True
    """Put the points of the second prompt where the first mask was wrong; off for the ablation."""
    stages: int = 2


@dataclass
class LossConfig:
    """Weights of the losses; 0 leaves one out."""

    mask: float = 1.0
    """0 leaves the region decoder alone: the image encoder then learns names and colours from its cells."""
    pixel: str = "focal"
    """`focal` (as TAP), `bce`, or `soft` (against the share of each cell that is covered: finer edges)."""
    iou: float = 1.0
    concept: float = 1.0
    smoothing: float = 0.1
    """Of a name's distribution over the concepts."""
    all_slots: bool = False
    """Judge score and concept in every slot that may answer the prompt, not only in the best one."""
    colour: float = 0.0
    """Colours read off the semantic token by a linear layer that is thrown away."""
    cell_name: float = 0.0
    """Names read off the cells of the image embedding by a linear layer that is thrown away."""
    cell_colour: float = 0.0


class Answer(NamedTuple):
    """What TAP says to N prompts; see `TapOutput`."""

    masks: Tensor
    """(N, S, h, w) float32 logits."""
    scores: Tensor
    tokens: Tensor
    embeds: Tensor
    slots: Tensor


class RegionObjective(nn.Module):
    """TAP with its losses, as sums over rows.

    Args:
        model: TAP without the caption decoder.
        concepts: the space that names are read against.
        learn_concepts: train the directions of its weights; their lengths stay. For names without a text encoder.
        prompts: settings of the prompt sampler.
        loss: weights of the losses.
        freeze_encoder: leave the image encoder as it is, its BatchNorm statistics included.

    Raises:
        InputError: no losses, or no prompts.
    """

    concept_scale: Tensor

    def __init__(
        self,
        model: TapModel,
        concepts: ConceptSpace,
        learn_concepts: bool,
        prompts: PromptConfig,
        loss: LossConfig,
        freeze_encoder: bool = False,
    ) -> None:
        super().__init__()
        decoder = model.config.mask_decoder_config
        self.model, self.loss, self.stages = model, loss, prompts.stages
        self.concept_weights = nn.Parameter(concepts.weights.clone(), requires_grad=learn_concepts)
        self.register_buffer("concept_scale", concepts.weights.norm(dim=0))
        self.sampler = PromptSampler(
            model.config.vision_config.image_size,
            prompts.box_probability,
            interactive_probability=prompts.interactive_probability,
            error_region=prompts.error_region,
        )
        self.colour_head = nn.Linear(decoder.hidden_size, len(COLOUR_WORDS))
        self.cell_name_head = nn.Linear(decoder.hidden_size, decoder.semantic_embed_dim)
        self.cell_colour_head = nn.Linear(decoder.hidden_size, len(COLOUR_WORDS))
        regions = ("mask", "iou", "concept", "colour") if loss.mask else ()
        self.weights = {key: getattr(loss, key) for key in (*regions, *LOSS_OF_CELLS) if getattr(loss, key)}
        if not self.weights.keys() & {"mask", "cell_name"}:
            raise InputError("loss: without loss.mask, loss.cell_name must be above 0, or nothing is learnt of regions")
        if prompts.stages < 1:
            raise InputError(f"prompts.stages must be at least 1, got {prompts.stages}")
        self.freeze_encoder = freeze_encoder
        self._freeze_unused()

    def train(self, mode: bool = True) -> Self:
        """As in torch; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.freeze_encoder:
            self.model.vision_encoder.eval()
        return self

    def _freeze_unused(self) -> None:
        """Parts without a loss must not wait for gradients."""
        heads = {"colour": self.colour_head, "cell_name": self.cell_name_head, "cell_colour": self.cell_colour_head}
        for key, head in heads.items():
            head.requires_grad_(key in self.weights)
        if not self.weights.keys() & {"concept", "cell_name"}:
            self.concept_weights.requires_grad_(False)
        decoder = self.model.mask_decoder
        for key, part in {"concept": decoder.semantic_head, "iou": decoder.iou_head}.items():
            part.requires_grad_(key in self.weights)
        if self.freeze_encoder:
            self.model.vision_encoder.requires_grad_(False)
        if not self.loss.mask:
            decoder.requires_grad_(False)
            self.model.prompt_encoder.requires_grad_(False)

    def head_keys(self) -> list[str]:
        """Keys of the auxiliary heads, which are no part of TAP."""
        return [key for key, _ in self.named_parameters() if key.startswith(("colour_head", "cell_"))]

    def load_heads(self, folder: str | None) -> None:
        """Take over the auxiliary heads that an earlier stage left beside its model, if it did.

        Fresh heads on a trained model would send large gradients into it.
        """
        file = Path(folder or "") / HEADS_FILE
        if folder and file.is_file():
            self.load_state_dict(load_file(file), strict=False)

    def concepts(self) -> Tensor:
        """(E, K) weights of the concept space as they are now."""
        return scaled_concepts(self.concept_weights, self.concept_scale)

    def concept_logits(self, embeds: Tensor) -> Tensor:
        """(..., E) -> (..., K) float32, computed in float32: near names differ by little."""
        with torch.autocast(embeds.device.type, enabled=False):
            return F.normalize(embeds.float(), dim=-1) @ self.concepts()

    def counts(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Rows behind each loss: regions in both stages, and those with a name or a colour."""
        coloured = ~batch["colours"].isnan().any(1)
        regions = {
            "mask": len(batch["names"]),
            "iou": len(batch["names"]),
            "concept": int(self._taught(batch).sum()),
            "colour": int(coloured.sum()),
        }
        cells = {key: int((batch[f"{key}s"] != IGNORED_NAME).sum()) for key in LOSS_OF_CELLS}
        counts = {key: float(self.stages * value) for key, value in regions.items()} | cells
        return {key: counts[key] for key in self.weights}

    @staticmethod
    def _taught(batch: dict[str, Tensor]) -> Tensor:
        """(N,) which regions have a concept target: a teacher's embedding, or a name."""
        named = batch["names"] != IGNORED_NAME
        return named | ~batch["teacher"].isnan().any(1) if "teacher" in batch else named

    def forward(self, pixel_values: Tensor, **batch: Tensor) -> tuple[Sums, Metrics]:
        """Losses and metrics of a batch of [`RegionBatches`]."""
        images = self.model.get_image_embeddings(pixel_values)
        losses, metrics = self._judge_cells(images, batch)
        if not self.loss.mask:
            return losses, metrics
        prompts = Prompts(batch["input_points"], batch["input_labels"], batch["from_box"])
        for stage in range(self.stages):
            answer = self._ask(images, prompts, batch["region_image_index"])
            sums, seen = self._judge(answer, prompts.from_box, batch)
            losses |= {key: losses[key] + value if stage else value for key, value in sums.items()}
            metrics |= {f"{key}_corrected" if stage else key: pair for key, pair in seen.items()}
            if stage + 1 < self.stages:
                prompts = self._corrected(answer.masks, prompts, batch)
        return losses, metrics

    def _ask(self, images: Tensor, prompts: Prompts, region_image_index: Tensor) -> Answer:
        output: Any = self.model(
            image_embeddings=images,
            input_points=prompts.points,
            input_labels=prompts.labels,
            region_image_index=region_image_index,
            return_dict=True,
        )
        masks = output.pred_masks.float()
        return Answer(masks, output.iou_scores, output.semantic_tokens, output.semantic_embeds, output.slots)

    def _corrected(self, answered: Tensor, prompts: Prompts, batch: dict[str, Tensor]) -> Prompts:
        """Prompts with points added where the best of the answered masks (N, S, h, w) is wrong."""
        masks = batch["masks"] > 127
        slots = training_slots(-true_iou(answered, masks), prompts.from_box)
        predicted = take_slots(answered, slots) > 0
        generator = torch.Generator().manual_seed(int(batch["seed"]))
        return self.sampler.correct(prompts, masks, predicted, generator)

    def _judge_cells(self, images: Tensor, batch: dict[str, Tensor]) -> tuple[Sums, Metrics]:
        """Names and colours of the cells that lie inside one object, read off the image embedding (B, D, G, G)."""
        cells = images.permute(0, 2, 3, 1)  # (B, G, G, D)
        sums: Sums = {}
        metrics: Metrics = {}
        if "cell_name" in self.weights:
            known = batch["cell_names"] != IGNORED_NAME
            names = batch["cell_names"][known]
            logits = (
                F.normalize(self.cell_name_head(cells[known]), dim=-1) @ self.concepts()
            )  # many: no need to be exact
            sums["cell_name"] = name_kl(logits, names, self.loss.smoothing).sum()
            metrics["name/cell"] = (logits.argmax(-1) == names).sum(), known.sum()
        if "cell_colour" in self.weights:
            known = batch["cell_colours"] != IGNORED_NAME
            logits = self.cell_colour_head(cells[known]).float()
            sums["cell_colour"] = F.cross_entropy(logits, batch["cell_colours"][known], reduction="sum")
        return sums, metrics

    def _judge(self, answer: Answer, from_box: Tensor, batch: dict[str, Tensor]) -> tuple[Sums, Metrics]:
        """One answer to the prompts."""
        cover = batch["masks"].float() / 255
        inside = cover > 0.5
        losses = mask_loss(answer.masks, cover if self.loss.pixel == "soft" else inside, self.loss.pixel)
        ious = true_iou(answer.masks, inside)
        slots = training_slots(losses, from_box)
        weights = self._slot_weights(slots, from_box)  # (N, S)
        sums = {
            "mask": take_slots(losses, slots).sum(),
            "iou": ((answer.scores - ious).square() * weights).sum(),
            "concept": (self._concept_losses(answer.embeds, batch) * weights).sum(),
            "colour": self._colour_loss(take_slots(answer.tokens, slots), batch["colours"]),
        }
        guesses = self.concept_logits(take_slots(answer.embeds, answer.slots)).argmax(-1)
        right, named = guesses == batch["names"], batch["names"] != IGNORED_NAME
        routed = take_slots(ious, answer.slots)
        metrics: Metrics = {}
        for key, rows in (("box", from_box), ("point", ~from_box)):
            metrics[f"iou/{key}"] = routed[rows].sum(), rows.sum()
            metrics[f"name/{key}"] = right[rows].sum(), (rows & named).sum()
        return {key: value for key, value in sums.items() if key in self.weights}, metrics

    def _colour_loss(self, tokens: Tensor, colours: Tensor) -> Tensor:
        """Sum over regions and colour words; tokens (N, D), colours (N, C) with NaN where unknown."""
        known = ~colours.isnan()
        losses = F.binary_cross_entropy_with_logits(
            self.colour_head(tokens).float(), colours.nan_to_num(), reduction="none"
        )
        return (losses * known).sum()

    def _concept_losses(self, embeds: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """(N, S) divergence of every slot's concepts from the teacher's, 0 where there is no teacher."""
        logits = self.concept_logits(embeds)  # (N, S, K)
        rows, slots, concepts = logits.shape
        names = batch["names"][:, None].expand(rows, slots)
        by_name = name_kl(logits.reshape(-1, concepts), names.reshape(-1), self.loss.smoothing).view(rows, slots)
        if "teacher" not in batch:
            return by_name
        taught = ~batch["teacher"].isnan().any(1)
        with torch.no_grad(), torch.autocast(embeds.device.type, enabled=False):  # targets stay, and stay exact
            targets = self.concept_logits(batch["teacher"].nan_to_num()).log_softmax(-1)  # (N, K)
        by_teacher = concept_kl(logits, targets[:, None].expand_as(logits))
        return torch.where(taught[:, None], by_teacher, by_name)

    def _slot_weights(self, slots: Tensor, from_box: Tensor) -> Tensor:
        """(N, S) weights that add up to 1: the slot that learns the mask, or all that may answer the prompt."""
        routed = F.one_hot(slots, self.model.config.mask_decoder_config.num_masks).float()
        if not self.loss.all_slots:
            return routed
        others = torch.ones_like(routed)
        others[:, 0] = 0
        return torch.where(from_box[:, None], routed, others / others.sum(1, keepdim=True))


def scaled_concepts(weights: Tensor, lengths: Tensor) -> Tensor:
    """(E, K) directions and (K,) lengths -> (E, K) weights of a concept space."""
    return F.normalize(weights.float(), dim=0) * lengths
