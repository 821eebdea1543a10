"""Osprey-724K: conversations, descriptions and short answers about masks in COCO pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..messages import Message, split_markers
from ..samples import RegionSample
from .base import box_from_xywh, find_image, size_of
from .records import RecordSamples, build_messages, messages_from_turns

FOLDERS = ("train2017", "val2017", "train2014", "val2014")
SHORT = "Answer the question using a single word or phrase."
_MARKER = re.compile(r"<region(\d+)>")
_DESCRIPTION = re.compile(r"\s*<region(\d+)>\s*:?\s*(.*\S)\s*", re.DOTALL)
_QUESTIONS = ("Describe ", "Give a full description of ", "Tell me all about ")


class OspreySamples(RecordSamples):
    """One sample per record of any of the five files, which are lists of
    `{"file_name", "height", "width", "annotation": [{"bbox", "segmentation"}], "conversations": [...]}`.

    "<region1>" in the turns stands for the first annotation. Records of detail_description have "description":
    `["<region1>: ...", ...]` in place of turns; each becomes a question and its answer. In files called short_form and
    part_level every question ends with the request for a single word or phrase, as Osprey trains on them. Regions
    are their masks, else their boxes (x, y, width, height).

    File names may carry the prefix of COCO's older editions ("COCO_train2014_"): where there is no such file, the part
    after the last "_" is looked for.
    """

    def _sample(self, record: dict[str, Any]) -> RegionSample:
        regions = [_region(annotation) for annotation in record["annotation"]]
        return RegionSample(
            self._image(record["file_name"]),
            regions,
            conversations=self._messages(record, len(regions)),
            source="osprey",
            size=size_of(record),
        )

    def _image(self, name: str) -> Path:
        path = find_image(self.root, name, FOLDERS)
        bare = Path(name).name
        return path if path.is_file() or "_" not in bare else find_image(self.root, bare.rsplit("_", 1)[1], FOLDERS)

    def _messages(self, record: dict[str, Any], count: int) -> list[Message]:
        if "description" in record:
            return _described(record["description"], count)
        short = any(part in self.path.stem for part in ("short_form", "part_level"))
        return messages_from_turns(record["conversations"], count, _MARKER, 1, SHORT if short else "")


def _region(annotation: dict[str, Any]) -> dict[str, Any]:
    mask = annotation.get("segmentation")
    return {"mask": mask} if mask else {"box": box_from_xywh(annotation.get("bbox"))}


def _described(descriptions: list[str], count: int) -> list[Message]:
    """A question and an answer for each description."""
    spoken = []
    for place, text in enumerate(descriptions):
        match = _DESCRIPTION.fullmatch(text)
        if match is None:
            raise InputError(f'description[{place}]: expected "<region1>: ...", got {text[:40]!r}')
        try:
            about = split_markers(f"<region{match[1]}>", _MARKER, 1, count)
            spoken.append(("user", [_QUESTIONS[place % len(_QUESTIONS)], *about, "."]))
            spoken.append(("assistant", split_markers(match[2], _MARKER, 1, count)))
        except InputError as error:
            raise InputError(f"description[{place}]: {error}") from error
    return build_messages(spoken, count)
