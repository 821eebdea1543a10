"""Captions of regions: what benchmarks of them share.

A region that cannot be asked about, or that the model says nothing about, counts as an empty caption: its references
stay among those that CIDEr-D takes document frequencies from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tap_llm.errors import InputError, MissingFileError
from tap_llm.masks import mask_to_box
from tap_llm.pipelines import RegionPipeline
from tap_llm.regions import Region, parse_region, read_mask
from tap_llm.tap.tokenization import NO_TOKENIZER_MESSAGE

from .answerers import chat_arguments, load_answerer
from .base import Prediction, Run, Scores
from .caption_metrics import METRICS, WHOLE, score_captions
from .caption_records import CaptionPictures, CaptionProtocol
from .command import benchmark_parser, common_arguments, evaluate, finish, parse, positive
from .inquiries import Record
from .prompting import EncodedPictures
from .questions import Answerer, Question, RegionQuestions, answers_of

LONGEST = 38  # new tokens: with the semantic token and the begin of the text, TAP's 40 positions
_NO_REFERENCE = "none"  # for a region without; its caption counts as empty, so nothing can match


class RegionCaptions(RegionQuestions):
    """See the module's head.

    Args:
        protocol: how regions are asked for.
        pictures: of a file.
        answerer: model under test.
        metrics: of `caption_metrics`.
    """

    unit = "regions"

    def __init__(
        self,
        protocol: CaptionProtocol,
        pictures: CaptionPictures,
        answerer: Answerer,
        metrics: Sequence[str] = METRICS,
    ) -> None:
        super().__init__(pictures, answerer)
        self.how, self.metrics = protocol, metrics
        self.protocol = protocol.name  # type: ignore[misc]

    def questions(self, record: Record, image: Image.Image) -> list[Question]:
        return [self._question(item, image) for item in record["items"]]

    def _question(self, item: Record, image: Image.Image) -> Question:
        try:
            region = _prompt(item["region"], image, self.how.prompt == "mask")
        except InputError as error:
            return Question(problem=item["problem"] or f"{item['where']}: {error}")
        return Question([region], [self.how.question[0], 0, self.how.question[1]], item["problem"])

    def settings(self) -> dict[str, Any]:
        question = "<region>".join(self.how.question)
        return {**super().settings(), "prompt": self.how.prompt, "question_for_chat": question}

    def facts(self, record: Record) -> Prediction:
        return {"regions": [{key: item[key] for key in ("key", "references")} for item in record.get("items", [])]}

    def score(self, predictions: list[Prediction]) -> Scores:
        """Metrics of all regions, each with references of its own."""
        said = [answers_of(prediction, len(prediction["regions"])) for prediction in predictions]
        rows = [
            list(zip(prediction["regions"], captions, strict=True))
            for prediction, captions in zip(predictions, said, strict=True)
        ]
        captions = {region["key"]: caption for group in rows for region, caption in group}
        references = {region["key"]: region["references"] or [_NO_REFERENCE] for group in rows for region, _ in group}
        found = score_captions(captions, references, metrics=self.metrics)
        metrics: dict[str, Any] = {
            "regions": len(captions),
            "answered": sum(map(bool, captions.values())) / len(captions),
            **found.metrics[WHOLE],
        }
        ranks = [[(found.each[one["key"]], _lines(one, caption)) for one, caption in group] for group in rows]
        return self.scores(metrics, predictions, ranks, not_measured=found.not_measured)


def _prompt(region: Region, image: Image.Image, masks: bool) -> Region:
    """The region, checked; its box where masks are not asked for."""
    parse_region(region, image.height, image.width)
    if masks or "mask" not in region:
        return region
    return {"box": mask_to_box(read_mask(region["mask"], image.height, image.width))}


def _lines(region: dict[str, Any], caption: str) -> str:
    references = [f"reference: {text}" for text in region["references"]]
    return "\n".join([f"caption: {caption or '-'}", *references])


class TapCaptioner:
    """TAP's own captions, greedy: mask slot 0, as its evaluation takes it for boxes.

    Args:
        pipe: with a tokenizer.
        batch_size: regions decoded at once.
        max_new_tokens: longest caption; at most what the model has positions for.

    Raises:
        MissingFileError: without a tokenizer.
    """

    def __init__(self, pipe: RegionPipeline, batch_size: int = 64, max_new_tokens: int = LONGEST) -> None:
        if not pipe.can_caption:
            raise MissingFileError(NO_TOKENIZER_MESSAGE)
        text: Any = pipe.model.config.text_config
        self.pipe, self.batch_size = pipe, batch_size
        self.max_new_tokens = min(max_new_tokens, text.max_position_embeddings - 2)

    def settings(self) -> dict[str, Any]:
        """The longest caption."""
        return {"max_new_tokens": self.max_new_tokens, "slot": 0}

    @torch.no_grad()
    def __call__(self, asked: Sequence[tuple[Image.Image, list[Question]]]) -> list[list[str]]:
        """Captions of the regions of each picture; each is encoded once, with the others of the batch."""
        pictures = [(image, [region for one in asked_of for region in one.regions]) for image, asked_of in asked]
        wanted = [(image, regions) for image, regions in pictures if regions]
        if not wanted:
            return [[] for _ in asked]
        encoded = RegionTokens(self.pipe, [image for image, _ in wanted], self.batch_size)
        tokens = encoded.tokens([regions for _, regions in wanted])
        ids = self.pipe.model.generate(
            semantic_tokens=tokens, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens
        )
        captions = iter(self.pipe.processor.batch_decode(ids))
        return [[next(captions) for _ in regions] for _, regions in pictures]


class RegionTokens(EncodedPictures):
    """Semantic tokens of regions, without their masks."""

    def tokens(self, regions: Sequence[Sequence[Region]]) -> Tensor:
        """(N, D) tokens of slot 0 of all regions, picture by picture.

        Raises:
            InputError: a region that cannot be used, or tokens that are not finite.
        """
        images = torch.cat([picture.image_embeddings for picture in self.pictures])
        chunks = [rows.to(images.device).split(self.batch_size) for rows in self._rows(regions)]
        found = []
        for points, labels, owners in zip(*chunks, strict=True):
            prompts = {"input_points": points, "input_labels": labels, "region_image_index": owners}
            found.append(self.pipe.model(**prompts, image_embeddings=images).semantic_tokens[:, 0])
        tokens = torch.cat(found)
        if not torch.isfinite(tokens).all():
            raise InputError("the model answers with NaN or infinite values; try dtype float32")
        return tokens


# The command


def caption_command(
    name: str, doc: str | None, protocols: dict[str, CaptionProtocol], arguments: Sequence[str] | None
) -> Run:
    """Run the command of a benchmark of region captions.

    Args:
        name: of the benchmark.
        doc: its module's head.
        protocols: by what --protocol takes; the first is the default.
        arguments: as typed.

    Raises:
        InputError: something on the command line cannot be used.
    """
    parser = benchmark_parser(name, doc)
    common_arguments(parser, model_help="a TAP, or a model that chats", batch="regions decoded at once")
    chat_arguments(parser, LONGEST)
    add, default = parser.add_argument, next(iter(protocols))
    add("--data", type=Path, required=True, metavar="FILE", help="captions")
    add("--protocol", choices=list(protocols), default=default, help=f"what the file is [{default}]")
    add("--pictures", type=positive, default=8, metavar="N", help="pictures encoded at once [8]")
    add("--spice", action="store_true", help="also SPICE: slow, and downloads a parser at its first use")
    args = parse(parser, arguments)
    protocol = protocols[args.protocol]
    pictures = CaptionPictures(args.data, args.images, protocol)
    answerer, model = load_answerer(args, lambda pipe: TapCaptioner(pipe, args.batch_size, args.max_new_tokens))
    metrics = [*METRICS, "spice"] if args.spice else METRICS
    benchmark = RegionCaptions(protocol, pictures, answerer, metrics)
    return finish(evaluate(benchmark, args, model, args.pictures), args)
