"""What was found for queries that name something and for those that do not, as numbers and as cases to look at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .base import Case, Prediction
from .tables import aligned, cell

_NOTHING = {"score": 0.0, "found": 0, "shared": 0, "mask": None}


def _rows(prediction: Prediction, variant: str) -> list[dict[str, Any]]:
    """Name, true pixels and answer of each query; of a scene without an answer the wrong one."""
    known = [
        {"name": name, "true": true} for name, true in zip(prediction["queries"], prediction["pixels"], strict=True)
    ]
    if "found" not in prediction:
        return [{**row, **_NOTHING, "found": 0 if row["true"] else 1} for row in known]
    return [{**row, **said} for row, said in zip(known, prediction["found"][variant]["queries"], strict=True)]


def _iou(row: dict[str, Any]) -> float:
    union = row["true"] + row["found"] - row["shared"]
    return row["shared"] / union if union else 1.0


def find_metrics(predictions: Sequence[Prediction], variant: str) -> dict[str, Any]:
    """All of `eval.find`, of one variant."""
    rows = [row for prediction in predictions for row in _rows(prediction, variant)]
    present = [row for row in rows if row["true"]]
    absent = [row for row in rows if not row["true"]]
    steps = [one["found"][variant]["steps"] for one in predictions if "found" in one]
    return {
        "present": len(present),
        "absent": len(absent),
        "present_miou": _mean([_iou(row) for row in present]),
        "all_miou": _mean([_iou(row) for row in rows]),
        "class_miou": class_miou(rows),
        "present_kept": _mean([row["found"] > 0 for row in present]),
        "absent_rejected": _mean([row["found"] == 0 for row in absent]),
        "steps": _mean(steps),
    }


def class_miou(rows: Sequence[dict[str, Any]]) -> float | None:
    """Mean over the names that occur of shared by united pixels, each summed over all scenes."""
    sums: dict[str, Any] = defaultdict(lambda: np.zeros(3, dtype=np.int64))
    for row in rows:
        sums[row["name"]] += (row["true"], row["found"], row["shared"])
    return _mean([shared / (true + found - shared) for true, found, shared in sums.values() if true])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def find_cases(predictions: Sequence[Prediction], variant: str) -> list[Case]:
    """Every scene by the mean IoU of its queries."""
    return [
        {
            "score": float(np.mean([_iou(row) for row in rows])),
            "title": prediction["id"],
            "text": prediction.get("fault") or "\n".join(map(_told, rows)),
            "image": prediction["image"],
            "truth": [
                {"mask": mask, "concept": row["name"]}
                for mask, row in zip(prediction["true_masks"], rows, strict=True)
                if mask
            ],
            "answer": [
                {"mask": row["mask"], "concept": row["name"], "concept_score": row["score"]}
                for row in rows
                if row["mask"]
            ],
        }
        for prediction in predictions
        for rows in [_rows(prediction, variant)]
    ]


def _told(row: dict[str, Any]) -> str:
    there = "there" if row["true"] else "not there"
    said = f"found, score {row['score']:.2f}" if row["found"] else "not found"
    return f"{row['name']} ({there}): {said}, IoU {_iou(row):.2f}"


def variants_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per variant."""
    names = list(next(iter(metrics.values())))
    return aligned([["", *names], *([variant, *map(cell, row.values())] for variant, row in metrics.items())])
