"""The folder of an adapter: what is in it, and which TAP and LLM it needs.

tap_llm_adapter.json         projector settings; names and fingerprints of TAP and LLM
projector.safetensors
adapter_config.json          LoRA, if there is any: as PEFT has it for the bare LLM, so that other tools
adapter_model.safetensors    (PEFT, servers) load it too
processor_config.json, …     processor, if it was saved
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError, MissingFileError
from ..hub import ASSETS, OFFICIAL_MODELS, bundled_models, home
from .fingerprints import Fingerprint, difference, fingerprint
from .left_out import fingerprint_of_tap

if TYPE_CHECKING:
    from peft import LoraConfig

RECORD, PROJECTOR = "tap_llm_adapter.json", "projector.safetensors"
LORA_CONFIG, LORA = "adapter_config.json", "adapter_model.safetensors"
PROCESSOR = "processor_config.json"
PEFT_PREFIX = "base_model.model."  # how PEFT calls the bare LLM in its files
# Fields of the model's configuration that make a projector.
SETTINGS = (
    "projector", "projector_hidden_size", "roi_grid", "global_grid", "embedding_rms", "initializer_range",
    "region_token_id",
)  # fmt: skip
_VERSION = 1


@dataclass(frozen=True)
class Base:
    """A model that an adapter was trained on.

    Attributes:
        name: what it loads by; empty if it was never loaded from anywhere.
        fingerprint: see [`fingerprint`].
    """

    name: str
    fingerprint: Fingerprint

    def check(self, model: Any, kind: str, folder: Path) -> None:
        """Raise [`InputError`] if a model is another one; `kind` is "TAP" or "LLM"."""
        problem = difference(self.fingerprint, model)
        if problem is not None:
            other = portable_name(model.config) or type(model).__name__
            if other == self.name and other in bundled_models():
                raise InputError(
                    f"the adapter {folder} was trained with the {kind} {other} of another version of this package, and "
                    f"does not fit this one's: {problem}; train it again, or install that version"
                )
            raise InputError(
                f"the adapter {folder} was trained with the {kind} {self.name or '(without a name)'}, and does not fit "
                f"{other}: {problem}; load it with its own {kind}"
            )


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter says of itself.

    Attributes:
        settings: fields of [`TapLlmConfig`] that make its projector.
        tap: the TAP that it needs.
        llm: the LLM that it needs.
        lora: it has LoRA, not only a projector.
    """

    settings: dict[str, Any]
    tap: Base
    llm: Base
    lora: bool

    @classmethod
    def of(cls, model: Any, scale: float, lora: bool) -> Self:
        """The record of a model's adapter, whose projector has this scale."""
        config, parts = model.config, model.model
        return cls(
            settings={**{key: getattr(config, key) for key in SETTINGS}, "embedding_rms": scale},
            tap=Base(portable_name(config, "tap_name_or_path"), fingerprint_of_tap(parts.tap)),
            llm=Base(portable_name(config, "llm_name_or_path"), fingerprint(parts.language_model)),
            lora=lora,
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in a folder.

        Raises:
            MissingFileError: there is none.
            InputError: it is damaged, or of a later version of this package.
        """
        if not (folder / RECORD).is_file():
            raise MissingFileError(f"{folder} holds no adapter: it has no {RECORD}")
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            version = record["version"]
            settings = {key: record["settings"][key] for key in SETTINGS}
            tap, llm = (Base(record[kind]["name"], record[kind]["fingerprint"]) for kind in ("tap", "llm"))
            lora = bool(record["lora"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"the adapter {folder} is damaged: {RECORD}: {error!r}") from error
        if version != _VERSION:
            raise InputError(f"the adapter {folder} has version {version}, this package reads {_VERSION}: update it")
        return cls(settings, tap, llm, lora)

    def write(self, folder: Path) -> None:
        """Put the record into a folder."""
        text = json.dumps({"version": _VERSION, **asdict(self)}, indent=1, ensure_ascii=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder).expanduser() / RECORD).is_file()


def portable_name(config: Any, field: str = "_name_or_path") -> str:
    """What a model loads by, here and elsewhere: a bundled or official name, a hub id, else the whole path."""
    name = str(getattr(config, field, "") or "")
    path = Path(name).expanduser()
    if path.parent == ASSETS:
        return path.name
    official = next((known for known in OFFICIAL_MODELS if path.name.startswith(f"{known}-")), None)
    if official is not None and path.parent == home() / "converted":
        return official
    return str(path.resolve()) if name and path.is_dir() else name


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write copies of tensors, on the CPU."""
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path, {"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors.

    Raises:
        InputError: the file is not there, or damaged.
    """
    try:
        return load_file(path)
    except Exception as error:  # damaged files surface as nearly any exception type
        raise InputError(f"the adapter {path.parent} is damaged: {path.name}: {error}") from error


def write_lora(config: LoraConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write LoRA as PEFT does."""
    settings = deepcopy(config)
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    write_tensors({PEFT_PREFIX + key: value for key, value in tensors.items()}, folder / LORA)


def read_lora(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read LoRA as PEFT writes it.

    Raises:
        InputError: the files are not there, or damaged.
    """
    from peft import LoraConfig  # seconds, which nobody should wait for who asks whether a folder holds an adapter

    if not (folder / LORA_CONFIG).is_file():  # PEFT would ask the hub for it, taking the folder for a repository
        raise InputError(f"the adapter {folder} is damaged: it has no {LORA_CONFIG}")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except Exception as error:
        raise InputError(f"the adapter {folder} is damaged: {LORA_CONFIG}: {error}") from error
    return config, {key.removeprefix(PEFT_PREFIX): value for key, value in read_tensors(folder / LORA).items()}


__all__ = ["AdapterRecord", "Base", "is_adapter", "portable_name"]
