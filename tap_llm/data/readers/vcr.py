"""VCR (visual commonsense reasoning): questions about people in film scenes, with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ...errors import InputError, MissingFileError
from ..messages import Piece
from ..samples import RegionSample
from .base import read_json, size_of
from .records import RecordSamples, build_messages

FOLDER = "vcr1images"
_CLOSING = tuple(".,?!;:'") + ("n't",)  # said without a space before
Token = str | list[int]


class VcrSamples(RecordSamples):
    """One sample per line of train.jsonl or val.jsonl: the question, the right answer, and why.

    Texts are lists of words in which a list of numbers stands for entries of "objects"; those that are spoken of become
    regions, with the class as category, box and outline from the picture's metadata file. The *_orig texts are not
    used: their numbers are not always those of the objects. Records whose numbers point at no object are left out and
    counted in `notes`.

    Args:
        path: the file.
        image_root: folder of the pictures and metadata (vcr1images), or the one above; see [`SampleReader`].
        document: see [`RecordSamples`].
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None, document: Any = None) -> None:
        super().__init__(path, image_root, document)
        self.root = self.root / FOLDER if (self.root / FOLDER).is_dir() else self.root
        self._leave_out(_points_nowhere, "whose words point at objects that are not there")

    def _sample(self, record: dict[str, Any]) -> RegionSample:
        metadata = self._metadata(record["metadata_fn"])
        if len(metadata["boxes"]) != len(record["objects"]):
            raise InputError(
                f'"objects" has {len(record["objects"])} entries, but {record["metadata_fn"]} has '
                f"{len(metadata['boxes'])} boxes"
            )
        texts = [_joined(tokens) for tokens in _texts(record)]
        used = list(dict.fromkeys(piece for text in texts for piece in text if isinstance(piece, int)))
        question, answer, reason = (
            [used.index(piece) if isinstance(piece, int) else piece for piece in text] for text in texts
        )
        spoken: list[tuple[str, list[Piece]]]
        spoken = [("user", question), ("assistant", answer), ("user", ["Why?"]), ("assistant", reason)]
        return RegionSample(
            self.root / record["img_fn"],
            [_region(metadata, number, record["objects"][number]) for number in used],
            conversations=build_messages(spoken, len(used)),
            id=str(record.get("annot_id", "")),
            source="vcr",
            size=size_of(metadata),
        )

    def _metadata(self, name: str) -> dict[str, Any]:
        path = self.root / name
        if not path.is_file():
            raise MissingFileError(f"metadata_fn: there is no file {path}")
        return cast(dict[str, Any], read_json(path))


def _texts(record: dict[str, Any]) -> list[list[Token]]:
    """Question, right answer, right rationale."""
    chosen = (record[f"{key}_choices"][record[f"{key}_label"]] for key in ("answer", "rationale"))
    return [record["question"], *chosen]


def _points_nowhere(record: dict[str, Any]) -> bool:
    numbers = [number for text in _texts(record) for token in text if isinstance(token, list) for number in token]
    return not all(isinstance(number, int) and 0 <= number < len(record["objects"]) for number in numbers)


def _joined(tokens: Sequence[Token]) -> list[Piece]:
    """Words and numbers of objects with spaces between them; no space before a full stop and the like."""
    pieces: list[Piece] = []
    for token in tokens:
        if pieces and not (isinstance(token, str) and token.startswith(_CLOSING)):
            pieces.append(" ")
        if isinstance(token, str):
            pieces.append(token)
        else:
            for place, number in enumerate(token):
                pieces += [*([{len(token) - 1: " and "}.get(place, ", ")] if place else []), number]
    return pieces


def _region(metadata: dict[str, Any], number: int, category: str) -> dict[str, Any]:
    region = {"id": number, "box": metadata["boxes"][number][:4], "category": category}
    outlines = [[value for point in outline for value in point] for outline in metadata["segms"][number]]
    outlines = [outline for outline in outlines if len(outline) >= 6]
    return region | ({"mask": outlines} if outlines else {})
