"""Concept spaces: names with text embeddings, against which TAP's semantic embeddings are read.

A concept space can be swapped at run time; the model does not change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .download import NotInRepositoryError, download, is_hub_id
from .errors import InputError, MissingFileError

WEIGHTS_FILE, NAMES_FILE = "concepts.safetensors", "concepts.json"
DEFAULT_TEMPLATES = ("a {}",)
_MIN_NORM = 1e-12


class NoConceptsError(MissingFileError):
    """A place holds none of the concept files: a model without concepts."""


class ConceptSpace:
    """Names and their text weights.

    The columns of official spaces are unit vectors times the logit scale (about 100) of the text encoder, so
    probabilities need no further temperature (TAP, arXiv:2312.09128).

    Args:
        names: K different names.
        weights: (E, K), one column per name; copied, in float32.
        info: remarks that travel with the space as JSON, e.g. the templates and the logit scale.

    Raises:
        InputError: names that are empty, double or not strings; weights of another shape or not finite.
    """

    def __init__(self, names: Sequence[str], weights: Tensor | np.ndarray, info: dict[str, Any] | None = None) -> None:
        self.names = _checked_names(names)
        self.weights = torch.as_tensor(weights).detach().to(torch.float32, copy=True)
        self.info: dict[str, Any] = dict(info or {})
        if self.weights.ndim != 2 or self.weights.shape[1] != len(self.names):
            raise InputError(
                f"concept weights must be (E, {len(self.names)}), one column per name, got {tuple(self.weights.shape)}"
            )
        if not torch.isfinite(self.weights).all():
            raise InputError("concept weights contain NaN or infinite values: the file is damaged")

    def __len__(self) -> int:
        """Number of concepts K."""
        return len(self.names)

    def __repr__(self) -> str:
        shown = ", ".join(repr(name) for name in self.names[:3]) + (", …" if len(self) > 3 else "")
        return f"ConceptSpace({len(self)} concepts of width {self.width}: {shown})"

    @property
    def width(self) -> int:
        """Width E of the embeddings that it reads."""
        return self.weights.shape[0]

    def check_width(self, width: int) -> None:
        """Raise InputError unless the embeddings of a model, of width E, can be read with this space."""
        if width != self.width:
            raise InputError(
                f"these concepts are for embeddings of width {self.width}, the model's have width {width}: "
                "they belong to another text encoder"
            )

    def to(self, device: torch.device | str) -> ConceptSpace:
        """Move the weights to a device, in place; saves `classify` from moving a copy each time.

        Returns:
            itself.
        """
        self.weights = self.weights.to(device)
        return self

    def logits(self, semantic_embeds: Tensor) -> Tensor:
        """Similarity to each concept; its softmax over the last axis gives the probabilities.

        Args:
            semantic_embeds: (..., E) of any length, dtype and device.

        Returns:
            (..., K) float32 on the same device; differentiable.

        Raises:
            InputError: the embeddings have another width.
        """
        self.check_width(semantic_embeds.shape[-1])
        weights = self.weights.to(semantic_embeds.device)
        with torch.autocast(semantic_embeds.device.type, enabled=False):  # half precision would move probabilities
            return normalize(semantic_embeds.float(), dim=-1, eps=_MIN_NORM) @ weights

    def classify(self, semantic_embeds: Tensor, top_k: int = 1) -> tuple[list[Any], Tensor]:
        """Name regions.

        Args:
            semantic_embeds: (..., E), e.g. the routed embeddings (N, E).
            top_k: how many names per embedding, at most K.

        Returns:
            Names, most probable first, as lists nested like the leading axes with a last axis of `top_k`; and
            their probabilities (..., top_k), float32.

        Raises:
            InputError: the embeddings have another width or are not finite, or `top_k` is not in 1..K.
        """
        semantic_embeds = torch.as_tensor(semantic_embeds)
        if not torch.isfinite(semantic_embeds).all():
            raise InputError(
                "the semantic embeddings contain NaN or infinite values: damaged weights, or too large for float16; "
                "try dtype float32"
            )
        if not 1 <= top_k <= len(self):
            raise InputError(f"top_k must be between 1 and {len(self)}, the number of concepts; got {top_k}")
        # A stable sort, not topk: equal probabilities must come out in the same order everywhere.
        ranked = self.logits(semantic_embeds).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        return self._names_of(ranked.indices[..., :top_k].tolist()), ranked.values[..., :top_k]

    def _names_of(self, indices: Any) -> Any:
        return [self._names_of(item) for item in indices] if isinstance(indices, list) else self.names[indices]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `concepts.safetensors` (tensor `weights`) and `concepts.json` into a folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weights": self.weights.cpu().contiguous()}, folder / WEIGHTS_FILE)
        content = {**self.info, "names": self.names}
        (folder / NAMES_FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub_options: Any) -> ConceptSpace:
        """Load a concept space.

        Args:
            source: a folder with concept files (such as a model's), an official `.pkl`, or a hub id.
            hub_options: `revision`, `cache_dir`, `token`, `local_files_only` … for the hub.

        Returns:
            The space.

        Raises:
            InputError: damaged files, or one without the other.
            NoConceptsError: `source` has no concept files; a `MissingFileError`.
            MissingFileError: there is nothing at `source`, or the hub cannot be reached.
        """
        path = Path(source)
        if path.is_file():
            return cls.from_official(path)
        if not path.is_dir() and not is_hub_id(str(source)):
            raise NoConceptsError(f"there are no concepts at {source}: give a folder, a .pkl file or a hub id")
        files = {name: _find(path, name, hub_options) for name in (WEIGHTS_FILE, NAMES_FILE)}
        weights, names = files.values()
        if weights is None and names is None:
            raise NoConceptsError(f"{source} has no {WEIGHTS_FILE}: convert the model with --concepts")
        if weights is None or names is None:
            absent = next(name for name, file in files.items() if file is None)
            raise InputError(f"the concepts of {source} are incomplete: there is no {absent}")
        return cls._from_files(weights, names)

    @classmethod
    def _from_files(cls, weights_path: Path, names_path: Path) -> ConceptSpace:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(weights_path)["weights"]
            info = json.loads(names_path.read_text(encoding="utf-8"))
            return cls(info.pop("names"), weights, info)
        except (SafetensorError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"the concept files in {names_path.parent} are damaged: {error!r}") from None
        except InputError as error:
            raise InputError(f"{names_path.parent}: {error}") from None

    @classmethod
    def from_official(cls, path: str | Path) -> ConceptSpace:
        """Load an official concept file: a pickled list of weights (E, K) and names.

        Args:
            path: the `.pkl` file.

        Returns:
            The space.

        Raises:
            InputError: the file is damaged, unsafe or of another kind.
            MissingFileError: there is no such file.
        """
        from .tap.unpickle import read_concept_file

        weights, names = read_concept_file(path)
        try:
            return cls(names, weights)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    @torch.no_grad()
    def from_text(
        cls,
        names: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        model: Any = None,
        tokenizer: Any = None,
        batch_size: int = 64,
    ) -> ConceptSpace:
        """Build a concept space with the text encoder of a CLIP model.

        Each text is embedded and normalised; the texts of a name are averaged, normalised again and times
        the model's logit scale. Official TAP weights need names embedded by EVA02-CLIP-E/14+.

        Args:
            names: K different names.
            templates: texts with `{}` in place of the name.
            model: a Transformers `CLIPModel`, or any model with `get_text_features` and `logit_scale`.
            tokenizer: its tokenizer.
            batch_size: texts embedded at a time.

        Returns:
            The space, on the CPU; `info` has the templates and the logit scale.

        Raises:
            InputError: bad names, a template without `{}`, or no model or tokenizer.
        """
        names = _checked_names(names)
        bad = [template for template in templates if "{}" not in template]
        if bad or not templates or isinstance(templates, str):
            raise InputError(f"templates must be texts with {{}} in place of the name, got {bad or templates!r}")
        if model is None or tokenizer is None:
            raise InputError("a concept space needs the CLIP model and the tokenizer that embed its names")
        texts = [template.replace("{}", name) for name in names for template in templates]
        features = torch.cat(list(_embed_texts(texts, model, tokenizer, batch_size)))
        per_name = normalize(features, dim=-1).unflatten(0, (len(names), len(templates))).mean(dim=1)
        scale = float(model.logit_scale.detach().float().exp())
        info = {"templates": list(templates), "logit_scale": scale}
        return cls(names, (normalize(per_name, dim=-1) * scale).T, info)


def _find(folder: Path, name: str, hub_options: dict[str, Any]) -> Path | None:
    """A file of a folder or hub repository; None where it is known to have none."""
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return download(folder.as_posix(), name, **hub_options)
    except NotInRepositoryError:
        return None


def _checked_names(names: Sequence[str]) -> list[str]:
    names = list(names)
    if not names:
        raise InputError("a concept space needs at least one name")
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise InputError(f"concept names must be non-empty strings, got {wrong[0]!r}")
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise InputError(f"concept names must differ: {double!r} occurs more than once")
    return names


def _embed_texts(texts: list[str], model: Any, tokenizer: Any, batch_size: int) -> Iterator[Tensor]:
    """Text features (n, E) of batches of texts, float32 on the CPU."""
    limit = model.config.text_config.max_position_embeddings
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
        features = model.get_text_features(**inputs)
        features = features if isinstance(features, Tensor) else features.pooler_output
        yield features.float().cpu()


__all__ = ["ConceptSpace", "NoConceptsError"]
