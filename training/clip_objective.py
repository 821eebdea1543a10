"""What a small CLIP learns so that CaR works with it: words for patches, regions, views, pictures; where to look.

CaR uses a CLIP in two ways. Its proposals are Grad-CAMs of the mean of the final patch tokens, against all phrases and
background words; its classifier reads the class token of views of single objects. Both are trained here in the form in
which they will be used, on images, regions and pixels as UMG-CLIP (arXiv:2401.06397) is.

Symbols: D pictures, V views, n patches, d width, R regions, T phrases, K background words, P pixels of a side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from tap_llm.clip_as_rnn.affinity import attention_affinity

from .recipe import Metrics, Sums

MAX_SCALE = math.log(100.0)
OWNED = 0.5  # share of a patch that one object covers, from which on the patch is the object's
EMPTY = 0.02  # share that all objects cover together, up to which a patch is background
BACKGROUND, UNCLEAR = -1, -2  # owners of patches
SLOPE = 0.1  # of negative values of a CAM in the loss, so that a CAM of zeros still learns
_THRESHOLD = 0.4  # of the CAM's maximum, in the metric

Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass
class ClipLossConfig:
    """Weights of the losses."""

    patch: float = 1.0
    """Each patch names the object that covers it, or background."""
    region: float = 0.5
    """The mean over an object's patches and its phrases find each other, among all of the batch."""
    view: float = 1.0
    """The class token of a view names what the view points at."""
    caption: float = 0.2
    """The class tokens of pictures and their captions find each other."""
    cam: float = 1.0
    """The Grad-CAM of an object's phrase has the form of the object: one minus the cosine of both maps."""
    affinity: float = 1.0
    """So does the CAM after CaR has refined it by the attention of all blocks, which learns to group patches."""
    smoothing: float = 0.05
    """Share of the probability that all texts get alike."""


@dataclass
class Seen:
    """Vision tokens of D pictures, then V views.

    Attributes:
        normed: (D + V, 1 + n, d) output of the last block's first layer norm: what CAMs are made of.
        tokens: (D + V, 1 + n, d) final tokens after the last layer norm.
        attention: (D + V, n, n) mean over heads and blocks of the attention between patches.
    """

    normed: Tensor
    tokens: Tensor
    attention: Tensor


class ClipObjective(nn.Module):
    """Contrastive losses of a batch of [`ClipBatches`].

    Args:
        clip: any CLIP of Transformers, with eager attention: the others give no gradients of gradients.
        mean: (3,) of the image processor.
        std: (3,) likewise.
        config: weights.
    """

    def __init__(self, clip: CLIPModel, mean: list[float], std: list[float], config: ClipLossConfig) -> None:
        super().__init__()
        self.clip, self.smoothing = clip, config.smoothing
        names = ("patch", "region", "view", "caption", "cam", "affinity")
        self.weights = {name: getattr(config, name) for name in names}
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Rows behind each loss."""
        owners = patch_owners(batch["cover"], batch["region_image_index"], len(batch["picked"]))
        return {
            "patch": float((owners != UNCLEAR).sum()),
            "region": float(len(batch["cover"])),
            "view": float(len(batch["images"]) - len(batch["picked"])),
            "caption": float(len(batch["picked"])),
            **dict.fromkeys(("cam", "affinity"), float((batch["picked"] >= 0).sum())),
        }

    def forward(
        self,
        images: Tensor,
        cover: Tensor,
        region_image_index: Tensor,
        picked: Tensor,
        input_ids: Tensor,
        positives: Tensor,
        is_background: Tensor,
    ) -> tuple[Sums, Metrics]:
        """Losses and accuracies; see [`ClipBatches`] for the arguments."""
        pictures, regions = len(picked), len(cover)
        vectors = self.text_vectors(input_ids)
        texts, captions = vectors.split((len(is_background), pictures))
        seen = self.look(images)
        patches, classes = seen.tokens[:pictures, 1:], seen.tokens[:, 0]
        owners = patch_owners(cover, region_image_index, pictures)
        known = owners != UNCLEAR
        fitting = torch.cat([positives[:regions], is_background[None]])  # the last row is background: owner -1
        pairs: Pairs = {
            "patch": (self.logits(patches[known], texts), fitting[owners[known]]),
            "region": (self.logits(region_means(patches, cover, region_image_index), texts), positives[:regions]),
            "view": (self.logits(classes[pictures:], texts), positives[regions:]),
            "caption": (self.logits(classes[:pictures], captions), torch.eye(pictures, device=images.device) > 0),
        }
        sums = {name: divergence(logits, wanted, self.smoothing).sum() for name, (logits, wanted) in pairs.items()}
        for name in ("region", "caption"):
            sums[name] = (sums[name] + self._from_texts(*pairs[name])) / 2
        rows = picked[picked >= 0]
        cams, shapes = self.cams(seen, texts, rows, cover, region_image_index, positives)
        refined = refined_cams(cams, seen.attention[region_image_index[rows]])
        sums["cam"] = unlikeness(F.leaky_relu(cams, SLOPE), shapes)
        sums["affinity"] = unlikeness(refined, shapes)
        with torch.no_grad():
            allowed = allowed_texts(positives, is_background, region_image_index, pictures)
            overlaps = {"iou/cam": cam_overlap(cams, shapes), "iou/refined": cam_overlap(refined, shapes)}
            metrics = accuracies(pairs, allowed, known, owners) | overlaps
        return sums, metrics

    def text_vectors(self, input_ids: Tensor) -> Tensor:
        """(N, L) token ids -> (N, e) projected, not of unit length."""
        hidden = self.clip.text_model(input_ids=input_ids).pooler_output
        return self.clip.text_projection(hidden)

    def look(self, images: Tensor) -> Seen:
        """(N, P, P, 3) uint8 -> tokens."""
        vision = self.clip.vision_model
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        hidden = vision.pre_layrnorm(vision.embeddings(pixels))
        *blocks, last = vision.encoder.layers
        attention = []
        for block in blocks:
            _, hidden, weights = run_block(block, hidden)
            attention.append(weights)
        with torch.enable_grad():  # CAMs need gradients in validation too
            normed, hidden, weights = run_block(last, hidden)
            return Seen(normed, vision.post_layernorm(hidden), torch.stack([*attention, weights]).mean(0))

    def logits(self, tokens: Tensor, texts: Tensor) -> Tensor:
        """(N, d) final tokens and (T, e) texts -> (N, T) scaled cosines, float32."""
        vectors = self.clip.visual_projection(tokens).float()
        scale = self.clip.logit_scale.clamp(max=MAX_SCALE).exp()
        with torch.autocast(tokens.device.type, enabled=False):
            return scale * F.normalize(vectors, dim=-1) @ F.normalize(texts.float(), dim=-1).T

    def cams(
        self, seen: Seen, texts: Tensor, rows: Tensor, cover: Tensor, owners: Tensor, positives: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Grad-CAMs as CaR makes them, each of one region, and what they should look like.

        The score is the cosine of the mean of a picture's final patch tokens and a phrase, less what it is on average
        over all texts by their probability: the gradient of the phrase's probability without the factor that may
        underflow. Weights are means of its gradient over patches.

        Args:
            seen: tokens.
            texts: (T + K, e).
            rows: (C,) regions, of one picture each.
            cover: (R, n).
            owners: (R,) picture of each region.
            positives: (R + V, T + K).

        Returns:
            (C, n) before the ReLU, and (C, n) cover of all regions of the picture that the phrase is true of.
        """
        pictures, asked = owners[rows], positives[rows].int().argmax(1)  # a region's first phrase
        with torch.enable_grad():
            pooled = self.clip.visual_projection(seen.tokens[:, 1:].mean(1)[pictures]).float()
            directions = F.normalize(texts.detach().float(), dim=-1)
            vectors = F.normalize(pooled, dim=-1)
            scale = self.clip.logit_scale.detach().clamp(max=MAX_SCALE).exp()
            shares = (scale * vectors.detach() @ directions.T).softmax(-1)
            score = (vectors * (directions[asked] - shares @ directions)).sum()
            (gradient,) = torch.autograd.grad(score, seen.normed, create_graph=self.training)
            weights = gradient[pictures, 1:].mean(1)  # (C, d)
            cams = torch.einsum("cnd,cd->cn", seen.normed[pictures, 1:].float(), weights.float())
        same = (owners == pictures[:, None]) & positives[: len(cover), asked].T  # (C, R)
        return cams, same.to(cover.dtype) @ cover

    def _from_texts(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Divergence from texts to rows, its mean over texts with a row, times the number of rows."""
        texts = wanted.any(0)
        losses = divergence(logits.T[texts], wanted.T[texts], self.smoothing)
        return losses.sum() * (len(logits) / max(1, len(losses)))


def run_block(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A vision block on (N, 1 + n, d) tokens, with what CaR needs of its inside.

    Returns:
        Output of its first layer norm, its own output, and (N, n, n) attention between patches, mean over heads.
    """
    normed = block.layer_norm1(hidden)
    mixed, weights = block.self_attn(normed)
    hidden = hidden + mixed
    return normed, hidden + block.mlp(block.layer_norm2(hidden)), weights[:, :, 1:, 1:].float().mean(1)


def refined_cams(cams: Tensor, attention: Tensor) -> Tensor:
    """CAMs (C, n) spread by the affinity of patches, of attention (C, n, n), as CaR does, less their minima.

    Boxes around the CAM, which CaR restricts the sources to, are left out.
    """
    if not len(cams):
        return cams
    with torch.autocast(cams.device.type, enabled=False):
        affinity = torch.stack([attention_affinity(table) for table in attention])
        spread = torch.einsum("cnm,cm->cn", affinity, cams.float().relu())
    return spread - spread.amin(1, keepdim=True)


def unlikeness(maps: Tensor, shapes: Tensor) -> Tensor:
    """One minus the cosine of each map (C, n) and its shape, summed; of any scale."""
    return (1 - F.cosine_similarity(maps, shapes, eps=1e-20)).sum()


def divergence(logits: Tensor, wanted: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy (N,) of each row against equal shares for what is wanted.

    Args:
        logits: (N, T).
        wanted: (N, T) bool, at least one in each row.
        smoothing: share of the probability that goes to all alike.
    """
    target = wanted / wanted.sum(1, keepdim=True).clamp(min=1)
    target = (1 - smoothing) * target + smoothing / max(1, logits.shape[1])
    return -(target * logits.log_softmax(-1)).sum(-1)


def patch_owners(cover: Tensor, region_image_index: Tensor, pictures: int) -> Tensor:
    """(D, n) region that covers most of each patch; -1 where there is only background, -2 where it is unclear.

    Args:
        cover: (R, n) share of each patch that shows the region.
        region_image_index: (R,) picture of each region.
        pictures: D.
    """
    inside = region_image_index[:, None] == torch.arange(pictures, device=cover.device)  # (R, D)
    shares = cover[:, None] * inside[..., None]
    none = torch.full_like(shares[:0].sum(0), BACKGROUND, dtype=torch.long)
    if not len(cover):
        return none
    most, owners = shares.max(0)
    free = torch.where(shares.sum(0) <= EMPTY, none, UNCLEAR)
    return torch.where(most > OWNED, owners, free)


def region_means(patches: Tensor, cover: Tensor, region_image_index: Tensor) -> Tensor:
    """(R, d) means of patch tokens (D, n, d), weighted by how much of each patch (R, n) shows the region."""
    sums = torch.einsum("rn,rnd->rd", cover.to(patches.dtype), patches[region_image_index])
    return sums / cover.sum(1, keepdim=True)


def allowed_texts(positives: Tensor, is_background: Tensor, region_image_index: Tensor, pictures: int) -> Tensor:
    """(D, T + K) texts that accuracies choose among: those about the picture or its view, about nothing in the batch,
    and background."""
    inside = region_image_index[:, None] == torch.arange(pictures, device=positives.device)
    regions = len(region_image_index)
    here = (inside[..., None] & positives[:regions, None]).any(0) | positives[regions:]
    return here | ~positives.any(0) | is_background


def accuracies(pairs: Pairs, allowed: Tensor, known: Tensor, owners: Tensor) -> Metrics:
    """Shares of patches of objects, of views, and of pictures whose best text is a right one.

    Args:
        pairs: logits and wanted texts.
        allowed: (D, T + K).
        known: (D, n) patches that are in `pairs`.
        owners: (D, n) regions of patches.
    """
    image, _ = known.nonzero(as_tuple=True)
    is_object = owners[known] >= 0
    logits, wanted = pairs["patch"]
    return {
        "top1/patch": _hits(logits[is_object], wanted[is_object], allowed[image[is_object]]),
        "top1/background": _hits(logits[~is_object], wanted[~is_object], allowed[image[~is_object]]),
        "top1/view": _hits(*pairs["view"], allowed),
        "top1/caption": _hits(*pairs["caption"], torch.ones_like(pairs["caption"][1])),
    }


def _hits(logits: Tensor, wanted: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    best = logits.masked_fill(~allowed, -torch.inf).argmax(1, keepdim=True)
    right = wanted.gather(1, best)
    return right.sum(), torch.tensor(len(right), device=right.device)


def cam_overlap(cams: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of where a CAM is above 0.4 of its maximum and the patches that are mostly object: sum and count."""
    found = cams > _THRESHOLD * cams.amax(1, keepdim=True).clamp(min=1e-20)
    true = shapes > OWNED
    overlap = (found & true).sum(1) / (found | true).sum(1).clamp(min=1)
    return overlap.sum(), torch.tensor(len(overlap), device=overlap.device)
