"""Processor of TAP: images and regions to tensors, tensors to masks and captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from ..errors import InputError, MissingFileError
from ..images import load_image
from ..regions import MaskPrompt, Region, parse_regions, prompts_to_rows
from .image_processing_tap import TapImageProcessor, canvas_side, resize_factor
from .tokenization import NO_TOKENIZER_MESSAGE, encode_captions

MAX_CAPTION_IDS = 39  # BOS and EOS included; with the semantic token this fills the 40 positions of TAP


class TapProcessor(ProcessorMixin):
    """Image processor, tokenizer and the region schema in one.

    Args:
        image_processor: a [`TapImageProcessor`].
        tokenizer: of the caption decoder. Official weights may come without it: masks and concepts still work,
            and everything about captions raises an error that says which file is missing.
    """

    def __init__(
        self, image_processor: TapImageProcessor, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
    ) -> None:
        if tokenizer is not None:
            super().__init__(image_processor, tokenizer, **kwargs)
            return
        self.chat_template = kwargs.pop("chat_template", None)
        self.check_argument_for_proper_class("image_processor", image_processor)
        self.image_processor, self.tokenizer = image_processor, None

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type: str, name: str, **kwargs: Any) -> Any:
        """A folder without `tokenizer.json` gives a processor without a tokenizer."""
        hub = {key: kwargs[key] for key in ("cache_dir", "force_download", "local_files_only", "revision", "token",
                                            "subfolder") if kwargs.get(key) is not None}  # fmt: skip
        if cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub) is None:
            return None
        return super()._load_tokenizer_from_pretrained(sub_processor_type, name, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """As in Transformers; without a tokenizer only the image processor is saved."""
        if self.tokenizer is not None:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if push_to_hub:
            raise InputError("a processor without a tokenizer is not pushed: save it, then upload the model's folder")
        os.makedirs(save_directory, exist_ok=True)
        path = os.path.join(save_directory, "processor_config.json")
        self.to_json_file(path)
        return [path]

    def __call__(
        self,
        images: Any,
        regions: Sequence[Any] | None = None,
        text: Sequence[str] | None = None,
        mask_prompt: MaskPrompt | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare images and regions for TAP.

        Args:
            images: one image or a list: PIL, path, numpy HWC uint8, torch CHW.
            regions: a list of regions per image (ragged, may be empty for some); for one image also a flat list.
                None prepares the images only.
            text: one caption per region, in the order of the rows, for training.
            return_tensors: `"pt"`, `"np"` or None.
            mask_prompt: how masks prompt: `"box_and_points"` or `"points"`.
            kwargs: options of the image processor.

        Returns:
            `pixel_values` (B, 3, S, S) float32, `original_sizes` and `resized_sizes` (B, 2) int64 (height, width);
            with regions `input_points` (N, n, 2) float32 in canvas pixels, `input_labels` (N, n) int64,
            `region_image_index` (N,) int64; with text `labels` (N, L) int64, padded with -100.

        Raises:
            InputError: an image or a region that cannot be used.
            MissingFileError: text given, but there is no tokenizer.
        """
        kwargs = {**kwargs.pop("images_kwargs", {}), **kwargs}
        return_tensors = kwargs.pop("return_tensors", "pt")
        fixed = sorted({"size", "do_resize", "do_pad"} & kwargs.keys())
        if fixed:
            raise InputError(f"{', '.join(fixed)}: the canvas belongs to the model; set it on the image processor")
        if text is not None and (regions is None or isinstance(text, str)):
            raise InputError("text is a list with one caption per region: give regions and a list")
        pictures = [load_image(image) for image in (images if isinstance(images, list | tuple) else [images])]
        # Checked before the pixels are touched: a wrong region costs no work.
        sizes = [(picture.height, picture.width) for picture in pictures]
        rows = self._region_rows(regions, sizes, mask_prompt or "box_and_points") if regions is not None else {}
        if text is not None:
            rows["labels"] = self._caption_labels(text, len(rows["region_image_index"]))
        features = self.image_processor(pictures, return_tensors="np", **kwargs)
        return BatchFeature({**features, **rows}, tensor_type=return_tensors)

    def _region_rows(
        self,
        regions: Sequence[Region] | Sequence[Sequence[Region]],
        sizes: list[tuple[int, int]],
        mask_prompt: MaskPrompt,
    ) -> dict[str, np.ndarray]:
        """Regions as the model's flat rows, in canvas pixels."""
        prompts, owners = parse_regions(regions, sizes, mask_prompt)
        points, labels = prompts_to_rows(prompts)
        side = canvas_side(self.image_processor)
        factors = np.array([resize_factor(*size, side) for size in sizes], dtype=np.float32)
        if len(prompts):
            points = points * factors[owners][:, None, None]
        return {"input_points": points, "input_labels": labels, "region_image_index": owners}

    def _caption_labels(self, text: Sequence[str], rows: int) -> np.ndarray:
        """(N, L) caption ids, padded with -100."""
        if len(text) != rows:
            raise InputError(f"{len(text)} captions for {rows} regions: give one caption per region, in their order")
        ids = encode_captions(self._require_tokenizer(), list(text), MAX_CAPTION_IDS)
        labels = np.full((rows, max(map(len, ids), default=1)), -100, dtype=np.int64)
        for row, row_ids in enumerate(ids):
            labels[row, : len(row_ids)] = row_ids
        return labels

    def _require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise MissingFileError(NO_TOKENIZER_MESSAGE)
        return self.tokenizer

    def post_process_masks(
        self,
        pred_masks: Tensor,
        original_sizes: Tensor,
        resized_sizes: Tensor,
        region_image_index: Tensor | None = None,
        slots: Tensor | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """N bool masks, (H, W) with `slots` and (4, H, W) without; see [`TapImageProcessor.post_process_masks`]."""
        return self.image_processor.post_process_masks(
            pred_masks, original_sizes, resized_sizes, region_image_index, slots, **kwargs
        )

    def batch_decode(self, ids: Tensor | Sequence[Sequence[int]], **kwargs: Any) -> list[str]:
        """Generated ids to captions.

        Args:
            ids: (N, L): BOS, words, EOS, pads. Whatever follows the first EOS is dropped.
            kwargs: options of the tokenizer.

        Returns:
            N captions.

        Raises:
            MissingFileError: there is no tokenizer.
        """
        tokenizer = self._require_tokenizer()
        rows = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else [list(row) for row in ids]
        return [tokenizer.decode(_words(row, tokenizer), **kwargs).strip() for row in rows]

    def decode(self, ids: Tensor | Sequence[int], **kwargs: Any) -> str:
        """One row of [`TapProcessor.batch_decode`]."""
        return self.batch_decode([list(map(int, ids))], **kwargs)[0]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that the model takes."""
        rows = ["input_points", "input_labels", "region_image_index"]
        return [*self.image_processor.model_input_names, *rows]


def _words(row: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids between BOS and EOS, without pads."""
    if tokenizer.eos_token_id in row:
        row = row[: row.index(tokenizer.eos_token_id)]
    return [token for token in row if token not in (tokenizer.bos_token_id, tokenizer.pad_token_id)]


__all__ = ["TapProcessor"]
