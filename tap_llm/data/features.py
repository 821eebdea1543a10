"""Columns of the parquet files we write; apart from `samples` because `datasets` takes a second to import."""

from __future__ import annotations

from datasets import Features, Image, Json, List, Value

# What may be absent is None. `Json` holds values of mixed types.
FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "size": List(Value("int32")),  # height, width
        "regions": List(
            {
                "id": Json(),
                "box": List(Value("float64")),
                "points": List(List(Value("float64"))),
                "labels": List(Value("int64")),
                "sketch": List(List(Value("float64"))),
                "mask": {"size": List(Value("int32")), "counts": Value("string")},
                "category": Value("string"),
                "captions": List(Value("string")),
                "attributes": Json(),
            }
        ),
        "captions": List(Value("string")),
        "conversations": List(Json()),
        "source": Value("string"),
        "license": Value("string"),
    }
)
