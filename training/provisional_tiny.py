"""Train the PROVISIONAL bundled model `tap-tiny` on drawn shapes: masks, IoU, names, and captions at once.

One linear script for two CPU cores; it needs no data set. From the root of a clone:

    OMP_WAIT_POLICY=PASSIVE python -m training.provisional_tiny --minutes 30 --out tap_llm/assets/tap-tiny

(The variable keeps idle threads from spinning where other programs use the cores too.) A stopped run goes on from
the checkpoint in `--run-dir`; the end writes model, concepts, and a card with the measured quality. The losses follow
TAP, arXiv:2312.09128; a box trains slot 0, points train the best of slots 1..3.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from operator import contains, eq
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.utils.data import DataLoader, Dataset

from tap_llm.concepts import ConceptSpace
from tap_llm.tap.configuration_tap import TapConfig
from tap_llm.tap.image_processing_tap import TapImageProcessor
from tap_llm.tap.modeling_tap import TapForConditionalGeneration
from tap_llm.tap.processing_tap import TapProcessor
from tap_llm.tap.tokenization import load_sentencepiece_tokenizer
from training import provisional_shapes as shapes

SIDE, CELL = 256, 16  # canvas and patch, pixels
IMAGES, PROMPTS = 8, 4  # scenes per step, regions per scene
VOCABULARY, LOGIT_SCALE = 512, 30.0
CELL_WORDS = shapes.SHAPE_NAMES, tuple(shapes.COLOURS)  # what the cells of the image grid are asked for
FIRST_TEST_SEED, TEST_SCENES = 10**9, 150  # training stays below
TEST_SIZES = ((256, 256), (640, 480), (300, 450))
LONGEST_STEP = 10.0  # seconds; a step that takes longer was paused, and a pause uses up no time
# Plain words, so that the tokenizer does not fall apart on other English.
WORDS = """
the a an of and or in on is are was at to by with without it this that there no not left right top bottom center
middle front behind near next under over above below inside outside picture photo image drawing object thing shape
background sky grass water person man woman child hand face head dog cat bird horse car bus train bike road house door
window wall floor table chair bed book cup bottle bowl plate food fruit apple banana tree flower leaf light dark
bright gray big little long short round flat old new one two three four five many some wooden metal glass paper
plastic shirt pants shoes hat bag standing sitting walking running holding wearing looking made color
"""


# The tokenizer


def train_tokenizer(folder: Path) -> Path:
    """Train a small SentencePiece BPE on captions and plain words; ids: unk 0, bos 1, eos 2, pad last.

    The last piece is the rarest character; one that no caption needs is put in on purpose, to serve as pad.
    """
    captions = [caption for seed in range(600) for caption in shapes.draw_scene(seed, 64).captions]
    corpus = folder / "corpus.txt"
    corpus.write_text(
        "\n".join([*captions, *WORDS.split() * 20, *"abcdefghijklmnopqrstuvwxyz0123456789.,!?'-" * 2, "¤"])
    )
    spm.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=VOCABULARY,
        character_coverage=1.0, byte_fallback=True, normalization_rule_name="identity",
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


# Data: a batch is a pure function of its number, so a resumed run sees what the first one would have seen


class Batches(Dataset[dict[str, Tensor]]):
    """Batch i: `IMAGES` fresh scenes with `PROMPTS` regions each, as flat rows, and their targets."""

    def __init__(self, processor: TapProcessor) -> None:
        self.processor = processor

    def _scene_rows(self, seed: int) -> tuple[shapes.Scene, list[dict[str, Any]], np.ndarray]:
        rng = np.random.default_rng((seed, 1))
        scene = shapes.draw_scene(seed, shapes.random_size(rng, SIDE))
        picks = rng.integers(0, len(scene.names), PROMPTS)
        return scene, [shapes.sample_region(rng, scene.masks[i]) for i in picks], picks

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """The processor's keys, plus `masks` (N, SIDE/4, SIDE/4), `names` (N,), and `cells` (B, 2, G, G)."""
        drawn = [self._scene_rows(number * IMAGES + i) for i in range(IMAGES)]
        batch = dict(
            self.processor(
                [scene.image for scene, _, _ in drawn],
                [regions for _, regions, _ in drawn],
                [scene.captions[i] for scene, _, picks in drawn for i in picks],
            )
        )
        masks, cells, names = [], [], []
        for scene, _, picks in drawn:
            canvas = np.zeros((len(scene.masks), SIDE, SIDE), dtype=bool)
            canvas[:, : scene.image.shape[0], : scene.image.shape[1]] = scene.masks
            said = zip(scene.names, scene.colours, strict=True)
            classes = np.array([[words.index(w) for words, w in zip(CELL_WORDS, pair, strict=True)] for pair in said])
            masks.append(canvas[picks].reshape(len(picks), SIDE // 4, 4, SIDE // 4, 4).mean((2, 4), np.float32))
            at_centres = canvas[:, CELL // 2 :: CELL, CELL // 2 :: CELL].astype(np.int64)
            cells.append(np.einsum("mw,myx->wyx", classes + 1, at_centres))
            names.append(classes[picks, 0])
        targets = {"masks": np.concatenate(masks), "cells": np.stack(cells), "names": np.concatenate(names)}
        return batch | {key: torch.from_numpy(target) for key, target in targets.items()}


# Losses


def mask_losses(logits: Tensor, target: Tensor) -> Tensor:
    """BCE + dice per row and slot: (N, S, h, w) against (N, h, w) soft targets -> (N, S)."""
    target, logits = target[:, None].expand_as(logits).flatten(2), logits.flatten(2)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * target).sum(-1) + 1) / (p.sum(-1) + target.sum(-1) + 1)
    return 2 * bce + dice


@torch.no_grad()
def true_iou(logits: Tensor, target: Tensor) -> Tensor:
    """IoU of each slot's thresholded mask, (N, S)."""
    predicted, wanted = (logits > 0).flatten(2), (target > 0.5)[:, None].flatten(2)
    overlap = (predicted & wanted).sum(-1)
    return overlap / (predicted | wanted).sum(-1).clamp(min=1)


def slot_weights(losses: Tensor, from_box: Tensor) -> Tensor:
    """(N, S): a box trains slot 0, points the best of the others (and those a little, lest they die)."""
    points = F.one_hot(losses[:, 1:].detach().argmin(1) + 1, losses.shape[1]).float()
    points[:, 1:] += 0.1
    box = F.one_hot(torch.zeros_like(from_box, dtype=torch.long), losses.shape[1]).float()
    return torch.where(from_box[:, None], box, points / points.sum(1, keepdim=True))


def cell_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of image cells, (B, G, G, K) against (B, G, G); the many background cells (0) count little."""
    weights = torch.ones(logits.shape[-1]).index_fill(0, torch.tensor(0), 0.1)
    return F.cross_entropy(logits.flatten(0, 2), target.flatten(), weights)


class Trainee(nn.Module):
    """The model with its losses; throw-away heads that read shape and colour off image cells start words early."""

    concept_weights: Tensor

    def __init__(self, model: TapForConditionalGeneration, concepts: ConceptSpace) -> None:
        super().__init__()
        self.model = model
        width = model.model.mask_decoder.config.hidden_size
        self.cell_heads = nn.ModuleList(nn.Linear(width, 1 + len(words)) for words in CELL_WORDS)
        self.register_buffer("concept_weights", concepts.weights.clone(), persistent=False)

    def forward(self, masks: Tensor, names: Tensor, cells: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Losses by name, to be summed. The caption reads the slot that inference would read."""
        out = self.model(**inputs)
        from_box = (inputs["input_labels"] == 2).any(1)
        logits = out.pred_masks.float()
        losses = mask_losses(logits, masks)
        weights = slot_weights(losses, from_box)
        iou_error = (out.iou_scores - true_iou(logits, masks)).square()
        concept_logits = F.normalize(out.semantic_embeds.float(), dim=-1) @ self.concept_weights
        every_slot = names[:, None].expand(concept_logits.shape[:2])  # a shape has no parts: one name for all slots
        image = out.image_embeddings.permute(0, 2, 3, 1)
        cell_losses = [cell_loss(head(image).float(), cells[:, i]) for i, head in enumerate(self.cell_heads)]
        return {
            "mask": (losses * weights).sum(1).mean(),
            "iou": (iou_error * (weights > 0)).sum(1).mean(),
            "name": 2 * F.cross_entropy(concept_logits.flatten(0, 1), every_slot.flatten()),
            "caption": 2 * out.loss,
            "cell": torch.stack(cell_losses).sum(),
        }


# Building, checkpoints, the loop


def build(run_dir: Path) -> tuple[TapForConditionalGeneration, TapProcessor, ConceptSpace]:
    """A fresh model of 3.5 M parameters, its processor, and a concept space of fixed orthogonal names."""
    file = run_dir / "tokenizer.model"
    tokenizer = load_sentencepiece_tokenizer(file if file.exists() else train_tokenizer(run_dir))
    init = {"initializer_range": 0.05}  # PyTorch's own scale at these widths; with 0.02 masks start later
    config = TapConfig.from_variant(
        "tiny",
        vision_config=init,
        prompt_config=init,
        mask_decoder_config={"dropout": 0.0, **init},
        text_config={"vocab_size": VOCABULARY, "dropout": 0.0, "attention_dropout": 0.0, **init},
    )
    config.provisional = True
    config.everything = {"pred_iou_threshold": 0.6, "stability_threshold": 0.8}  # its scores are modest
    processor = TapProcessor(TapImageProcessor(size={"longest_edge": SIDE}), tokenizer)
    # Plain attention: under bfloat16 on CPU it trains faster than the fused one.
    model = TapForConditionalGeneration._from_config(config, attn_implementation="eager")
    shape = model.model.mask_decoder.config.semantic_embed_dim, len(shapes.SHAPE_NAMES)
    directions = torch.linalg.qr(torch.randn(shape, generator=torch.Generator().manual_seed(0)))[0]
    return model, processor, ConceptSpace(list(shapes.SHAPE_NAMES), LOGIT_SCALE * directions)


def make_optimizers(module: nn.Module, lr: float) -> list[Optimizer]:
    """Muon for the matrices of attention and MLPs (names start earlier), AdamW for the rest."""
    rest: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        is_matrix = name.endswith(("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight"))
        (matrices if is_matrix else rest).append(parameter)
    muon = Muon([{"params": matrices, "peak": 3 * lr}], weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, AdamW([{"params": rest, "peak": lr}], weight_decay=0.05)]


def save_checkpoint(path: Path, trainee: Trainee, optimizers: list[Optimizer], **progress: float) -> None:
    """Write a checkpoint in one step, so that a killed run leaves a whole one."""
    part = path.with_suffix(".part")
    torch.save({"model": trainee.state_dict(), "optimizers": [o.state_dict() for o in optimizers], **progress}, part)
    os.replace(part, path)


def schedule(step: int, done: float, warmup: int = 50) -> float:
    """Factor on the learning rate: linear warm-up over steps, then a cosine over the share of the time used up."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def load_checkpoint(path: Path, trainee: Trainee, optimizers: list[Optimizer]) -> tuple[int, float]:
    """Steps done and seconds spent, (0, 0.0) without a checkpoint."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    trainee.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    print(f"resumed at step {state['step']}, {state['seconds'] / 60:.1f} min")
    return state["step"], state["seconds"]


def train_step(trainee: Trainee, batch: dict[str, Tensor], optimizers: list[Optimizer], lr: float) -> dict[str, float]:
    """One step at a share of the peak learning rates; the losses before it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = trainee(**batch)
    torch.stack(list(losses.values())).sum().backward()
    nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["peak"]
        optimizer.step()
        optimizer.zero_grad()
    return {name: loss.item() for name, loss in losses.items()}


def train(trainee: Trainee, dataset: Batches, args: argparse.Namespace) -> int:
    """Train for `args.minutes`, time before an interruption included; the number of steps."""
    optimizers = make_optimizers(trainee, args.lr)
    path = args.run_dir / "checkpoint.pt"
    step, seconds = load_checkpoint(path, trainee, optimizers)
    budget, saved, tick = 60 * args.minutes, seconds, time.time()
    smooth: dict[str, float] = {}
    trainee.train()
    # Scenes are drawn by a process of their own.
    batches = iter(DataLoader(dataset, batch_size=None, sampler=range(step, FIRST_TEST_SEED // IMAGES), num_workers=1))
    while seconds < budget:
        losses = train_step(trainee, next(batches), optimizers, schedule(step, seconds / budget))
        step, previous, tick = step + 1, tick, time.time()
        seconds += min(tick - previous, LONGEST_STEP)
        smooth = {name: 0.95 * smooth.get(name, value) + 0.05 * value for name, value in losses.items()}
        if step % 25 == 0:
            text = " ".join(f"{name} {value:.3f}" for name, value in smooth.items())
            eta = f"{step * IMAGES / seconds:.1f} img/s, ETA {(budget - seconds) / 60:.1f} min"
            print(f"step {step} {text} | {eta}", flush=True)
        if seconds - saved > 120 or seconds >= budget:
            saved = seconds
            save_checkpoint(path, trainee, optimizers, step=step, seconds=seconds)
    return step


# Measuring and saving


@torch.no_grad()
def predict(
    model: TapForConditionalGeneration, processor: TapProcessor, concepts: ConceptSpace,
    image: np.ndarray, regions: list[dict[str, Any]],
) -> tuple[list[np.ndarray], list[str], list[str]]:  # fmt: skip
    """Masks (H, W), names and captions of regions on one image, through the public path."""
    inputs = processor([image], [regions])
    out = model(**inputs)
    index = torch.arange(len(regions)), out.slots
    sizes = inputs["original_sizes"], inputs["resized_sizes"]
    masks = processor.post_process_masks(out.pred_masks, *sizes, inputs["region_image_index"], out.slots)
    names, _ = concepts.classify(out.semantic_embeds[index], top_k=1)
    captions = processor.batch_decode(model.generate(semantic_tokens=out.semantic_tokens[index]))
    return [mask.numpy() for mask in masks], [name[0] for name in names], captions


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two bool masks."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def evaluate(model: TapForConditionalGeneration, processor: TapProcessor, concepts: ConceptSpace) -> dict[str, float]:
    """Quality on scenes that training never draws, in percent, for tight boxes and for one random point."""
    model.eval()
    scores: dict[str, list[float]] = {}
    for number in range(TEST_SCENES):
        scene = shapes.draw_scene(FIRST_TEST_SEED + number, TEST_SIZES[number % len(TEST_SIZES)])
        rng = np.random.default_rng(number)
        prompts = {
            "box": [shapes.box_region(mask) for mask in scene.masks],
            "point": [shapes.point_region(rng, mask, 1) for mask in scene.masks],
        }
        for kind, regions in prompts.items():
            masks, names, captions = predict(model, processor, concepts, scene.image, regions)
            said = [caption.split() for caption in captions]
            right = {
                "mIoU": map(mask_iou, masks, scene.masks),
                "name top-1": map(eq, names, scene.names),
                "caption has the name": map(contains, said, scene.names),
                "caption has the colour": map(contains, said, scene.colours),
            }
            for key, values in right.items():
                scores.setdefault(f"{kind} {key}", []).extend(values)
    return {key: 100 * float(np.mean(values)) for key, values in scores.items()}


CARD = """---
license: apache-2.0
library_name: transformers
tags: [tap, region-understanding, provisional]
---
# tap-tiny (PROVISIONAL)

A very small TAP model ("Tokenize Anything via Prompting", arXiv:2312.09128) that comes with `tap-llm`, so that
examples and tests run offline. **It is provisional: a better one replaces it.** It knows drawn shapes and
nothing else; on photos its masks are rough and its names and captions are meaningless.

- Size: {parameters:.2f} M parameters, stored in half precision, loaded in float32; canvas {side} x {side} pixels.
- Names: {names}.
- Captions: colour, shape, often size and texture ("a small striped red star").
- Data: scenes drawn by `training/provisional_shapes.py`; no photos, no third-party data. Licence: Apache-2.0.
- Command: `python -m training.provisional_tiny --minutes {minutes:g} --out tap_llm/assets/tap-tiny`
  ({steps} steps, {images} scenes, on 2 CPU cores).

## Measured quality

{scenes} held-out drawn scenes, sizes 256 x 256, 640 x 480 and 300 x 450, masks compared at the original
resolution, captions decoded greedily; {date}, 2 CPU cores.

| | tight box | one random point |
|---|---|---|
{rows}
"""


def write_card(args: argparse.Namespace, model: nn.Module, steps: int, scores: dict[str, float]) -> None:
    """The model card with the measured numbers."""
    keys = [key.removeprefix("box ") for key in scores if key.startswith("box ")]
    rows = [f"| {key} | {scores['box ' + key]:.1f} % | {scores['point ' + key]:.1f} % |" for key in keys]
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        side=SIDE, names=", ".join(shapes.SHAPE_NAMES), steps=steps, images=steps * IMAGES, minutes=args.minutes,
        scenes=TEST_SCENES, date=time.strftime("%Y-%m-%d"), rows="\n".join(rows),
    )  # fmt: skip
    (args.out / "README.md").write_text(card)


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the provisional tap-tiny on drawn shapes.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/tap-tiny"), help="checkpoint, resumed if any")
    parser.add_argument("--minutes", type=float, default=30, help="wall clock of the training")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    return parser.parse_args()


def main() -> None:
    """Build, train, save, measure, write the card."""
    args = parse_args()
    args.run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, processor, concepts = build(args.run_dir)
    steps = train(Trainee(model, concepts), Batches(processor), args)
    state = model.state_dict()
    halves = {k: v.half() if v.ndim > 1 and "coord_matrix" not in k else v for k, v in state.items()}
    model.save_pretrained(args.out, state_dict=halves)  # half the size; the config makes it load as float32
    for part in (processor, concepts):
        part.save_pretrained(args.out)
    model = TapForConditionalGeneration.from_pretrained(args.out)
    scores = evaluate(model, processor, concepts)
    print(scores)
    write_card(args, model, steps, scores)


if __name__ == "__main__":
    main()
