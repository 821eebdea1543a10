"""Regions and names as the records of public region benchmarks have them."""

from __future__ import annotations

import re
from typing import Any

from tap_llm.data.readers.base import box_from_xywh
from tap_llm.errors import InputError
from tap_llm.regions import Region

_NAMED = re.compile(r"<[Rr]egion\s*\d+>\s*:?\s*([^<]*)")


def names_of(record: dict[str, Any]) -> list[str]:
    """Categories of the regions, in order: `categories`, or `gt_answers` as "<Region 1>: dog <Region 2>: cat"."""
    given = record.get("categories", record.get("gt_answers"))
    if isinstance(given, str):
        given = _NAMED.findall(given) or [given]
    if not isinstance(given, list):
        return []
    return [_NAMED.sub(r"\1", str(name)).strip(" .,;\n") for name in given]


def regions_of(record: dict[str, Any]) -> list[Region]:
    """Regions in order: `annotations` with a segmentation, box or point each, or the lists `bbox` or `points`.

    Boxes are x, y, width, height. A region without any form is empty, for `parse_region` to refuse.

    Raises:
        InputError: there are none.
        KeyError: the record has none of these fields.
    """
    key = next((key for key in ("bbox", "points", "point") if record.get(key)), None)
    if "annotations" in record or key is None:
        regions = [_region(annotation) for annotation in record["annotations"]]
    else:
        values = record[key] if isinstance(record[key][0], list) else [record[key]]
        regions = [_region({key: value}) for value in values]
    if not regions:
        raise InputError("there are no regions")
    return regions


def _region(annotation: dict[str, Any]) -> Region:
    if annotation.get("segmentation"):
        return {"mask": annotation["segmentation"]}
    if annotation.get("bbox"):
        return {"box": box_from_xywh(annotation["bbox"])}
    point = annotation.get("points") or annotation.get("point")
    return {"points": point if isinstance(point[0], list) else [point]} if point else {}
