"""Flickr30k Entities as MDETR lays it out: final_flickr_*GT_*.json."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ..messages import Piece
from ..samples import RegionSample
from .base import find_image, size_of
from .coco import CocoSamples
from .records import build_messages, linked

FOLDERS = ("flickr30k-images", "flickr30k_images")
_QUESTION = "Describe the picture and say which region is which."


class Flickr30kSamples(CocoSamples):
    """One sample per sentence: it is the caption, and the answer in which each phrase is followed by its regions.

    The file is a COCO dict in which an *image record* is one sentence ("caption"); "tokens_positive" of an annotation
    are the spans of characters that name its box. "A man (region 1) holds two dogs (region 2, region 3)."
    """

    folders = FOLDERS

    def _read(self, index: int) -> RegionSample:
        image, annotations, _, _ = self._records[index]
        caption = image["caption"]
        pieces = _linked_caption(caption, [record["tokens_positive"] for record in annotations])
        regions = [self._region(record) for record in annotations]
        for region in regions:
            region.pop("category", None)  # a class for all of them
        return RegionSample(
            find_image(self.root, Path(image["file_name"]).name, FOLDERS),
            regions,
            captions=[caption],
            conversations=build_messages([("user", [_QUESTION]), ("assistant", pieces)], len(regions)),
            id=str(image["id"]),
            source="flickr30k",
            size=size_of(image),
        )


def _linked_caption(caption: str, spans: list[list[list[int]]]) -> list[Piece]:
    """The caption with regions behind the phrases that name them; region i is named by the first of `spans[i]`."""
    named: dict[int, list[int]] = {}
    for index, ((start, end), *_) in enumerate(spans):
        if not 0 <= start < end <= len(caption):
            raise InputError(f"tokens_positive [{start}, {end}] lies outside the caption of {len(caption)} characters")
        named.setdefault(end, []).append(index)
    pieces: list[Piece] = []
    start = 0
    for end in sorted(named):
        pieces += [caption[start:end], *linked(named[end])]
        start = end
    return [piece for piece in (*pieces, caption[start:]) if piece != ""]
