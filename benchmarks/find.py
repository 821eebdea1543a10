"""Time of CaR per image against the number of queries, beside an implementation without caching.

    python benchmarks/find.py [--model NAME] [--queries 1 5 20 50] [--plain 1 5 20] [--refine none|crf]

Without `--model` the weights are random and small: the ratios are about the code, not about what is found. The plain
implementation finds the same, but encodes the image for each query (f), each prompted image for each template (g),
and all texts, in every step. Runs with and without caching take turns; quoted are the minima of the rounds.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tap_llm.clip_as_rnn import CarOutput, CarStep, Clip, ClipAsRnn, TextEmbeddings, get_preset
from tap_llm.clip_as_rnn.affinity import min_max, refine_cams, upsample
from tap_llm.clip_as_rnn.classifier import class_table, embed_pictures, survivors
from tap_llm.clip_as_rnn.notes import free_background
from tap_llm.clip_as_rnn.proposals import text_directions
from tap_llm.clip_as_rnn.text import PassTexts, TextEncoder
from tap_llm.clip_as_rnn.visual_prompts import PromptPainter, prompt_mask

AIM = 3.0
IMAGE_SIZE = (375, 500)
THINGS = ("dog", "kite", "car", "cup", "tree", "bus", "cat", "boat", "chair", "clock")


class WordTokenizer:
    """A number per word between a start (256) and an end (257): enough to keep a text encoder busy."""

    def __call__(self, texts: Sequence[str], return_tensors: str | None = None, **options: Any) -> dict[str, Any]:
        """Ids and attention mask of texts, padded with the end."""
        rows = [[256, *(crc32(word.encode()) % 256 for word in text.split()), 257] for text in texts]
        if return_tensors is None:
            return {"input_ids": rows}
        longest = max(map(len, rows))
        ids = torch.tensor([row + [257] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def random_clip(seed: int, width: int, layers: int) -> Clip:
    """A CLIP model with random weights, 16-pixel patches and 224-pixel pictures."""
    torch.manual_seed(seed)
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }
    text = tower | {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    vision = tower | {"image_size": 224, "patch_size": 16}
    return Clip(
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256)).eval(), WordTokenizer()
    )


def random_image() -> np.ndarray:
    """(375, 500, 3) uint8: smooth patches of colour."""
    coarse = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0))
    return (255 * upsample(coarse, IMAGE_SIZE)).byte().permute(1, 2, 0).numpy()


def plain_find(car: ClipAsRnn, image: np.ndarray, queries: list[str]) -> list[CarStep]:
    """CaR's loop without any caching; semantic mode."""
    alive, trace = list(range(len(queries))), []
    while True:
        texts = plain_texts(car, [queries[index] for index in alive])
        views = [plain_view(car, image, texts, row) for row in range(len(alive))]
        columns = [plain_table(car, views, texts, template) for template in range(len(texts.g))]
        table = torch.stack(columns).sum(dim=0).softmax(dim=1)
        kept = [alive[row] for row in survivors(table, car.config.keep_threshold)]
        trace.append(CarStep(tuple(alive), tuple(table.diagonal().tolist()), tuple(kept)))
        if kept == alive:
            return trace
        alive = kept


def plain_texts(car: ClipAsRnn, queries: list[str]) -> PassTexts:
    """All texts, embedded anew."""
    config = car.config
    f, g = (TextEncoder(model, clip.tokenizer) for model, clip in zip((car.f, car.g), car.clips, strict=True))
    words, _ = free_background(config, queries)
    given = TextEmbeddings(
        f.embed_mean(queries, config.f_templates),
        f.embed_mean(words, config.f_templates),
        g.embed(queries, config.templates),
    )
    return given.prepared(len(queries), car.f.config.projection_dim, car.g.config.projection_dim, car.device)


def plain_view(car: ClipAsRnn, image: np.ndarray, texts: PassTexts, row: int) -> np.ndarray:
    """The picture with the mask of one query shown on it."""
    config, features = car.config, car.encode(image).features
    scale = float(car.f.logit_scale.exp())
    directions = text_directions(features.embedding, texts.f, texts.f_background, scale, config)
    cam = features.cams(directions[row : row + 1])
    scaled = min_max(cam.flatten(1)).reshape(cam.shape)
    soft = upsample(refine_cams(features.affinity, scaled, config.box_threshold), IMAGE_SIZE)[0].numpy()
    return PromptPainter(image, config.prompts).paint(prompt_mask(soft, config.mask_threshold))


def plain_table(car: ClipAsRnn, views: list[np.ndarray], texts: PassTexts, template: int) -> Tensor:
    """First softmax of one template."""
    images = embed_pictures(car.g, car.clips[1].settings, views)
    return class_table(images, texts.g[template : template + 1], float(car.g.logit_scale.exp()), ensemble=False)


def cached_find(car: ClipAsRnn, image: np.ndarray, queries: list[str], refine: str) -> CarOutput:
    """CaR as it is, with nothing known from the run before."""
    car.forget_texts()
    return car(image, queries, refine=refine, progress=False)


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one run, which other work on the machine does not lengthen; with accelerators wall time."""
    clock = time.perf_counter if torch.accelerator.is_available() else time.process_time
    start = clock()
    run()
    return clock() - start


def compare(car: ClipAsRnn, count: int, rounds: int, refine: str, with_plain: bool) -> dict[str, float]:
    """Seconds with and (where wanted) without caching, minima of the rounds in turns."""
    image = random_image()
    queries = [f"{THINGS[index % len(THINGS)]} number {index}" for index in range(count)]
    best = {"cached": float("inf"), "plain": float("inf")}
    for _ in range(rounds):
        best["cached"] = min(best["cached"], seconds(lambda: cached_find(car, image, queries, refine)))
        if with_plain:
            best["plain"] = min(best["plain"], seconds(lambda: plain_find(car, image, queries)))
    return best


def load(name: str | None) -> ClipAsRnn:
    """The named models, or random ones."""
    if name is not None:
        return ClipAsRnn.from_pretrained(name)
    return ClipAsRnn(random_clip(0, 128, 6), random_clip(1, 192, 6), get_preset("default").updated(min_contrast=0))


def main() -> None:
    """Print a line per number of queries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="preset, folder, bundled name or hub id; default: random weights")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 5, 20, 50])
    parser.add_argument("--plain", type=int, nargs="*", default=[1, 5, 20], help="numbers that are also run uncached")
    parser.add_argument("--refine", choices=["none", "crf"], default="none")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    car = load(options.model)
    print(f"{date.today()}, {platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    compare(car, 1, 1, options.refine, False)  # warm up
    first: tuple[int, float] | None = None
    for count in options.queries:
        best = compare(car, count, options.rounds, options.refine, count in options.plain)
        first = first or (count, best["cached"])
        growth = best["cached"] / first[1]
        line = (
            f"{count:4} queries  {best['cached']:7.3f} s  x{growth:5.2f} of {first[0]} (aim <= x{count / first[0]:g})"
        )
        if count in options.plain:
            line += f"  uncached {best['plain']:8.3f} s  ratio {best['plain'] / best['cached']:5.2f}"
            line += f" (aim >= {AIM:g})" if count >= 20 else ""
        print(line, flush=True)


if __name__ == "__main__":
    main()
