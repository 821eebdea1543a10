"""One call: picture and regions in; masks, names and captions out.

    pipe = RegionPipeline.from_pretrained("tap-tiny")
    pipe("photo.jpg", regions=[{"box": [10, 20, 200, 220]}, {"points": [[60, 80]]}])
    pipe("photo.jpg", everything=True)

For clicking, `encoded = pipe.encode("photo.jpg")` runs the image encoder once: pass it in place of the picture.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Pipeline

from .concepts import ConceptSpace
from .encoded import EncodedImage, TightMask, encode_image, prompt_rows, tight_masks
from .errors import InputError, MissingFileError
from .everything import EverythingConfig, segment_everything
from .images import load_image
from .loading import Concepts, load_concepts, load_tap, parse_device
from .regions import MaskPrompt, Region, normalize_region_lists
from .tap.modeling_tap import TapForConditionalGeneration
from .tap.outputs import take_slots
from .tap.processing_tap import TapProcessor
from .tap.tokenization import NO_TOKENIZER_MESSAGE

TASK = "region-understanding"
DEFAULT_MODEL = "tap-tiny"

Result = dict[str, Any]

_SEVERAL_ANSWERS = {"num_return_sequences", "return_dict_in_generate"}


@dataclass
class _Job:
    """One picture with its checked prompts; no dict, so that Transformers hands the regions on untouched."""

    image: Any  # PIL image or EncodedImage
    regions: Sequence[Region]
    rows: tuple[Tensor, Tensor] | None = None  # input_points, input_labels
    everything: EverythingConfig | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture."""
        encoded = isinstance(self.image, EncodedImage)
        return self.image.original_size if encoded else (self.image.height, self.image.width)


@dataclass
class _Answer:
    """What the model says about N regions of one picture."""

    regions: Sequence[Region]
    size: tuple[int, int]  # (height, width) of the picture
    masks: Sequence[TightMask]
    iou_scores: Sequence[float]
    embeds: Tensor  # (N, E)
    captions: list[str]


class RegionPipeline(Pipeline):
    """Masks, names and captions of regions; also `transformers.pipeline("region-understanding", model=...)`.

    Args:
        model: a [`TapForConditionalGeneration`].
        processor: its [`TapProcessor`].
        concepts: a [`ConceptSpace`], or the folder or hub id of one; by default that of the model, if any.
        batch_size: regions decoded at once, 64 by default; bounds memory.
        kwargs: as for any Transformers pipeline (`device`, ...), and defaults for the options of a call.

    Attributes:
        concepts: the concept space in use, or None. Assign another one at any time.
    """

    model: TapForConditionalGeneration
    processor: TapProcessor

    _load_processor = True  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    _pipeline_calls_generate = True
    _non_generation_params = ("top_k",)  # here it counts names

    def __init__(
        self,
        model: TapForConditionalGeneration,
        processor: TapProcessor,
        concepts: Concepts | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, processor=processor, **{"task": TASK, **kwargs})
        # Transformers means pictures by this name, and would keep it to itself.
        self._forward_params.update(self._sanitize_parameters(batch_size=batch_size)[1])
        self.model.eval()
        self.concepts = load_concepts(concepts, model.name_or_path or "")
        self._warnings: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = DEFAULT_MODEL,
        tokenizer: str | Path | None = None,
        concepts: Concepts | None = None,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> RegionPipeline:
        """Load a model for use.

        Args:
            name: bundled name, folder, hub id, or official name such as `tap_vit_b_v1_1` (downloaded, converted).
            tokenizer: SentencePiece file (or tokenizer folder), where the model comes without.
            concepts: a concept space, or the file, folder or hub id of one, in place of the model's own; for
                official models also `merged_2560` (default), `lvis_1203` or `coco_80`.
            device: such as `"cpu"` or `"cuda:0"`; the first accelerator by default.
            dtype: such as `"bfloat16"`; that of the weights by default.
            kwargs: defaults for the options of a call.

        Raises:
            InputError: unknown model, device or dtype, or files that cannot be used.
            MissingFileError: a file is not there.
        """
        target = parse_device(device)
        model, processor, space = load_tap(name, tokenizer, concepts, dtype)
        return cls(model=model, processor=processor, concepts=space, device=target, **kwargs)

    @property
    def concepts(self) -> ConceptSpace | None:
        """The concept space in use. Assigning one of another width than the model's embeddings is an InputError."""
        return self._concepts

    @concepts.setter
    def concepts(self, space: ConceptSpace | None) -> None:
        decoder: Any = self.model.config.mask_decoder_config
        if space is not None and not isinstance(space, ConceptSpace):
            raise InputError(f"concepts must be a ConceptSpace, got {space!r}; see ConceptSpace.from_pretrained")
        if space is not None:
            space.check_width(decoder.semantic_embed_dim)
        self._concepts = space

    @property
    def can_caption(self) -> bool:
        """Whether the model came with a tokenizer."""
        return self.processor.tokenizer is not None

    def encode(self, image: Any) -> EncodedImage:
        """Run the image encoder once; pass the result in place of the picture, any number of times.

        Raises:
            InputError: the picture cannot be read.
        """
        with self.device_placement():
            return encode_image(self.model, self.processor, load_image(image))

    def __call__(  # type: ignore[override]
        self, image: Any, regions: Sequence[Any] | None = None, **options: Any
    ) -> list[Result] | list[list[Result]]:
        """Describe regions of one picture, or of several.

        Args:
            image: a picture (PIL, path, (H, W, 3) uint8 array, (3, H, W) tensor), the result of `encode`, or a
                list of them.
            regions: region dicts; for a list of pictures one list per picture (ragged, may be empty).
            everything: True, or settings (`EverythingConfig` or a dict of its fields): find all regions instead.
            captions: by default where the model can; True is an error where it cannot, False leaves them out.
            top_k: above 1 each result also has "concepts", a list of [name, score]; at most all names.
            max_new_tokens: longest caption in tokens.
            generate_kwargs: further options of `generate`, such as `num_beams`.
            batch_size: regions decoded at once, 64 by default; bounds memory.
            mask_prompt: how masks prompt, `"box_and_points"` or `"points"`.
            progress: show a bar for everything mode.
            **options: the options above; only these are taken.

        Returns:
            One dict per region, in order: "region" (as given), "mask" (H, W) bool array, "box" (tight box of
            the mask, [x0, y0, x1, y1] with exclusive right and bottom edges, None if empty), "iou" (predicted),
            "concept", "concept_score", "caption"; without a concept space "" and 0.0, without captions "".
            A list of such lists for a list of pictures.

        Raises:
            InputError: a picture, a region or an option that cannot be used.
            MissingFileError: captions asked for, but the model has no tokenizer.
        """
        for name in options.keys() - inspect.signature(self._sanitize_parameters).parameters.keys():
            raise InputError(f"unknown option {name!r}; options of generate go into generate_kwargs={{...}}")
        stages = self._sanitize_parameters(**options)
        before, during, after = (
            {**defaults, **given}
            for defaults, given in zip(
                (self._preprocess_params, self._forward_params, self._postprocess_params), stages, strict=True
            )
        )
        images = list(image) if isinstance(image, list | tuple) else [image]
        wants_all = before.get("everything") not in (None, False)
        if (regions is None) != wants_all:
            raise InputError("give either regions=[...] or everything=True")
        if not self.can_caption:
            if during.get("captions"):
                raise MissingFileError(NO_TOKENIZER_MESSAGE)
            if during.get("captions") is None:
                self._warn_once(f"captions stay empty: {NO_TOKENIZER_MESSAGE}")
        if self.concepts is None:
            self._warn_once("names stay empty: the model's folder has no concept space; assign one to pipe.concepts")
        lists = [[] for _ in images] if regions is None else normalize_region_lists(regions, len(images))
        if not isinstance(image, list | tuple):
            return self.run_single((image, lists[0]), before, during, after)
        pairs = enumerate(zip(images, lists, strict=True))
        return [self._run_listed(index, pair, before, during, after) for index, pair in pairs]

    def _warn_once(self, message: str) -> None:
        if message not in self._warnings:
            warnings.warn(message, stacklevel=3)
            self._warnings.add(message)

    def _run_listed(self, index: int, pair: tuple[Any, Sequence[Region]], *stages: dict[str, Any]) -> list[Result]:
        """One picture of a list: errors say which."""
        try:
            return self.run_single(pair, *stages)
        except InputError as error:
            raise type(error)(f"image {index}: {error}") from error

    def _sanitize_parameters(  # type: ignore[override]
        self,
        everything: Any = None,
        mask_prompt: MaskPrompt | None = None,
        captions: bool | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        top_k: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "top_k": top_k}
        for name, value in counts.items():
            if value is not None and (not isinstance(value, Integral) or value < 1):
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(generate_kwargs, Mapping | None):
            raise InputError(f"generate_kwargs must be a dict of options of generate, got {generate_kwargs!r}")
        for name in _SEVERAL_ANSWERS & (generate_kwargs or {}).keys():
            raise InputError(f"generate_kwargs: {name} is for model.generate; here each region gets one caption")
        generate = {**(generate_kwargs or {}), **_given(max_new_tokens=max_new_tokens)}
        before = _given(everything=everything, mask_prompt=mask_prompt)
        during = _given(captions=captions, batch_size=batch_size, progress=progress)
        return before, {**during, "generate_kwargs": generate} if generate else during, _given(top_k=top_k)

    def preprocess(  # type: ignore[override]
        self,
        input_: tuple[Any, Sequence[Region]],
        everything: Any = False,
        mask_prompt: MaskPrompt = "box_and_points",
    ) -> _Job:
        """Read the picture and check its regions, before any work."""
        image, regions = input_
        picture = image if isinstance(image, EncodedImage) else load_image(image)
        if everything is not False:
            recommended = self.model.config.everything
            return _Job(picture, [], everything=EverythingConfig.from_options(everything, recommended))
        job = _Job(picture, regions)
        job.rows = prompt_rows(self.processor, regions, job.size, mask_prompt)
        return job

    def _forward(  # type: ignore[override]
        self,
        job: _Job,
        captions: bool | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> _Answer:
        if job.everything is not None:
            found = segment_everything(self.model, self.processor, job.image, job.everything, progress)
            texts = self._captions(found.semantic_tokens, captions, generate_kwargs)
            return _Answer(found.regions, job.size, found.masks, found.iou_scores, found.semantic_embeds, texts)
        return self._describe(job, captions, generate_kwargs, batch_size)

    def _describe(
        self, job: _Job, captions: bool | None, generate_kwargs: Mapping[str, Any] | None, batch_size: int
    ) -> _Answer:
        """Answer given regions, `batch_size` at a time; without regions nothing is encoded."""
        if not job.regions or job.rows is None:
            return _Answer([], job.size, [], [], torch.zeros(0), [])
        encoded = job.image
        if not isinstance(encoded, EncodedImage):
            encoded = encode_image(self.model, self.processor, encoded)
        masks: list[TightMask] = []
        tokens, embeds, scores = [], [], []
        for points, labels in zip(*(rows.split(batch_size) for rows in job.rows), strict=True):
            out = self.model(
                input_points=points.to(self.device),
                input_labels=labels.to(self.device),
                image_embeddings=encoded.image_embeddings,
            )
            masks += tight_masks(self.processor, take_slots(out.pred_masks, out.slots), encoded)
            scores += take_slots(out.iou_scores, out.slots).tolist()
            tokens.append(take_slots(out.semantic_tokens, out.slots))
            embeds.append(take_slots(out.semantic_embeds, out.slots))
        texts = self._captions(torch.cat(tokens), captions, generate_kwargs)
        return _Answer(job.regions, job.size, masks, scores, torch.cat(embeds).cpu(), texts)

    def _captions(self, tokens: Tensor, wanted: bool | None, options: Mapping[str, Any] | None) -> list[str]:
        """Captions of semantic tokens (N, D); empty ones where they are not wanted or not possible."""
        if wanted is False or not self.can_caption or not len(tokens):
            return [""] * len(tokens)
        generate_kwargs = self._prepare_generate_kwargs(dict(options or {}))
        ids = self.model.generate(semantic_tokens=tokens.to(self.device, self.model.dtype), **generate_kwargs)
        return self.processor.batch_decode(ids)

    def postprocess(self, model_outputs: _Answer, top_k: int = 1) -> list[Result]:  # type: ignore[override]
        """Name the regions and put the results together."""
        answer = model_outputs
        if not all(map(math.isfinite, answer.iou_scores)):
            raise InputError(
                "the model answers with NaN or infinite values: damaged weights, or too large for float16; "
                "try dtype float32"
            )
        named = self._names(answer.embeds, top_k) if answer.regions else []
        columns = zip(answer.regions, answer.masks, answer.iou_scores, named, answer.captions, strict=True)
        return [_result(answer.size, *column, top_k) for column in columns]

    def _names(self, embeds: Tensor, top_k: int) -> list[list[list[Any]]]:
        """[[name, score], ...] for each of (N, E), best first; empty without a concept space."""
        if self.concepts is None:
            return [[] for _ in embeds]
        names, scores = self.concepts.classify(embeds, top_k=min(top_k, len(self.concepts)))
        pairs = zip(names, scores.tolist(), strict=True)
        return [[list(pair) for pair in zip(*row, strict=True)] for row in pairs]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Save model, processor and concept space as one folder that `from_pretrained` reads."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if self.concepts is not None:
            self.concepts.save_pretrained(save_directory)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _result(
    size: tuple[int, int],
    region: Region,
    mask: TightMask,
    iou: float,
    names: list[list[Any]],
    caption: str,
    top_k: int,
) -> Result:
    best = names[0] if names else ["", 0.0]
    result = {
        "region": region,
        "mask": mask.full(*size),
        "box": None if mask.box is None else list(mask.box),
        "iou": iou,
        "concept": best[0],
        "concept_score": best[1],
        "caption": caption,
    }
    return {**result, "concepts": names} if top_k > 1 else result


def register_pipeline() -> None:
    """Make `transformers.pipeline("region-understanding", model=...)` work; may be called again."""
    from transformers.pipelines import PIPELINE_REGISTRY

    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=RegionPipeline, pt_model=TapForConditionalGeneration, type="multimodal"
        )


__all__ = ["EncodedImage", "RegionPipeline", "register_pipeline"]
