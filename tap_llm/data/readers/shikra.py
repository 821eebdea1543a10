"""Shikra's files, which GPT4RoI-style training uses too: questions whose phrases are linked to boxes."""

from __future__ import annotations

import re
from typing import Any

from ...errors import InputError
from ..messages import Piece
from ..samples import RegionSample
from .base import find_image
from .records import RecordSamples, build_messages, linked

FOLDERS = ("train2014", "val2014", "train2017", "flickr30k-images", "VG_100K", "VG_100K_2", "images")
LICENSE = "CC BY-NC 4.0"
_PHRASE = re.compile(r"<ph_st>\s*(.*?)\s*<ph_ed>", re.DOTALL)
_REFER: tuple[Piece, ...] = ("Describe ", 0, " so that it can be told from everything else in the picture.")
_TELL: tuple[Piece, ...] = ("Describe the picture and say which region is which.",)


class ShikraSamples(RecordSamples):
    """One sample per line; three layouts, which may be mixed. Boxes are x0, y0, x1, y1 in pixels.

    - Shikra-RD and GPT4Gen (GPT4GEN_*BoxCoT*.jsonl): `{"img_path", "boxes", "question", "question_boxes_seq",
      "cot_with_ans", "answer", "answer_boxes_seq"}`; the i-th phrase between `<ph_st>` and `<ph_ed>` of a text is
      linked to the boxes that entry i of its list names. The answer is "cot_with_ans", which holds the reasons, where
      there is one.
    - REG and REC: `{"img_path", "expression", "bbox"}`; the expression is the answer, and the region's caption.
    - Captions (CWB_flickr30k_*.jsonl): `{"image_id", "sentence", "boxes", "boxes_seq"}`.

    A linked phrase is followed by its regions: "the man (region 1)".
    """

    def _sample(self, record: dict[str, Any]) -> RegionSample:
        if "expression" in record:
            regions = [{"box": record["bbox"], "captions": [record["expression"]]}]
            spoken = [("user", list(_REFER)), ("assistant", [record["expression"]])]
        elif "sentence" in record:
            regions = _regions(record)
            spoken = [("user", list(_TELL)), ("assistant", _linked_text(record, "sentence", "boxes_seq"))]
        else:
            regions = _regions(record)
            answer = "cot_with_ans" if record.get("cot_with_ans") else "answer"
            spoken = [
                ("user", _linked_text(record, "question", "question_boxes_seq")),
                ("assistant", _linked_text(record, answer, "answer_boxes_seq")),
            ]
        name = record["img_path"] if "img_path" in record else f"{record['image_id']}.jpg"
        return RegionSample(
            find_image(self.root, name, FOLDERS),
            regions,
            conversations=build_messages(spoken, len(regions)),
            source="shikra",
            license=LICENSE,
        )


def _regions(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"box": box} for box in record["boxes"]]


def _linked_text(record: dict[str, Any], key: str, list_key: str) -> list[Piece]:
    """The text `key` with regions behind its phrases."""
    text, boxes = record[key], record.get(list_key) or []
    phrases = list(_PHRASE.finditer(text))
    if not phrases and key == "answer":
        boxes = []  # the short answer alone names none
    if len(phrases) != len(boxes):
        raise InputError(f"{key}: has {len(phrases)} marked phrases, but {list_key} has {len(boxes)} entries")
    pieces: list[Piece] = []
    end = 0
    for match, indices in zip(phrases, boxes, strict=True):
        missing = [index for index in indices if not 0 <= index < len(record["boxes"])]
        if missing:
            raise InputError(f"{list_key}: names box {missing[0]}, but there are {len(record['boxes'])}")
        pieces += [text[end : match.start()], match[1], *linked(indices)]
        end = match.end()
    return [piece for piece in (*pieces, text[end:]) if piece != ""]
