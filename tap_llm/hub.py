"""From a model's name to a folder: bundled models, official checkpoints (converted on first use), hub ids."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .download import download, is_hub_id
from .errors import InputError, MissingFileError
from .tap.tokenization import TOKENIZER_FILE_NAME, TOKENIZER_SHA256, is_official_tokenizer

logger = logging.getLogger(__name__)

OFFICIAL_REPO = "BAAI/tokenize-anything"
ASSETS = Path(__file__).parent / "assets"
_LAYOUT_VERSION = 1  # raise when converted folders change: old ones are then converted again


@dataclass(frozen=True)
class OfficialModel:
    """A released checkpoint.

    Args:
        name: what `--model` takes.
        size: bytes of the file, as published (rounded for some).
        md5_prefix: first digits of its MD5 sum, as published.
        sha256: of the file, where published.
        repo: hub repository that holds it.
        licence: of the weights.
    """

    name: str
    size: int
    md5_prefix: str
    sha256: str | None
    repo: str = OFFICIAL_REPO
    licence: str = "Apache-2.0"

    @property
    def file(self) -> str:
        """Path inside the repository."""
        return f"models/{self.name}.pkl"

    @property
    def url(self) -> str:
        """Page of the repository."""
        return f"https://huggingface.co/{self.repo}"


# fmt: off
OFFICIAL_MODELS: dict[str, OfficialModel] = {
    model.name: model for model in (
        OfficialModel("tap_vit_b_v1_1", 355_654_299, "707f80",
                      "6d156fb5bee6ca720f291a6b11f2bb7e51c49adc2034c540d171f1ce6b0e5e4b"),
        OfficialModel("tap_vit_l_v1_1", 811_637_487, "c1d41f",
                      "d7301f73267786bfafc7223931b3fd51baf111d1c24bcc1278ea6378139f1067"),
        OfficialModel("tap_vit_h_v1_1", 1_490_000_000, "4bdfb9",
                      "5d3caabfc826ad52f2c34f4fe6f575b70189d3effe837da9cf3264d080c40227"),
        OfficialModel("tap_vit_b_v1_0", 356_000_000, "b45cbf",
                      "3a5e75c796245f278fbd332d1c3299312c5bbd17299f25affbfe677caa663012"),
        OfficialModel("tap_vit_l_v1_0", 812_000_000, "03f8ec", None),
    )
}
# fmt: on
OFFICIAL_CONCEPTS = ("merged_2560", "lvis_1203", "coco_80")
DEFAULT_CONCEPTS = OFFICIAL_CONCEPTS[0]


def home() -> Path:
    """Folder of downloads and conversions: `$TAP_LLM_HOME`, else `tap_llm` in the user's cache folder."""
    explicit = os.environ.get("TAP_LLM_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(explicit).expanduser() if explicit else Path(cache) / "tap_llm"


def bundled_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def resolve_model(name: str | Path, *, concepts: str | Path | None = None, tokenizer: str | Path | None = None) -> str:
    """Find a model.

    Args:
        name: a bundled name (`tap-tiny`), a folder, an official name (`tap_vit_b_v1_1`: downloaded, checked,
            converted and cached on first use), or a hub id (`organisation/model`).
        concepts: for official names: `merged_2560` (default), `lvis_1203`, `coco_80`, a file or a folder.
        tokenizer: for official names: the SentencePiece model `tokenizer.model`. Without it, and without one
            in the download folder, the model gives masks and concepts but no captions.

    Returns:
        A folder, or the hub id as it is: what `from_pretrained` takes.

    Raises:
        InputError: unknown name, a folder without a model, a damaged or wrong file.
        MissingFileError: a file cannot be downloaded; says where to put it.
    """
    name = str(name)
    if name in OFFICIAL_MODELS:
        return str(_official_folder(OFFICIAL_MODELS[name], concepts, tokenizer))
    if concepts is not None or tokenizer is not None:
        raise InputError(
            f"concepts and tokenizer can be chosen for official names only ({', '.join(OFFICIAL_MODELS)}); "
            f"{name} has its own. Load other concepts with ConceptSpace.from_pretrained"
        )
    if name in bundled_models():
        return str(ASSETS / name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"the folder {name} holds no model: it has no config.json")
        return str(path)
    if path.is_file():
        raise InputError(f"{name} is a file; convert it first: tap-llm convert {name} FOLDER")
    if is_hub_id(name):
        return name
    raise InputError(_unknown_name(name))


def _unknown_name(name: str) -> str:
    known = [*bundled_models(), *OFFICIAL_MODELS]
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return (
        f"unknown model {name!r}{hint} Known names: {', '.join(known)}; "
        "or give a folder made by save_pretrained or tap-llm convert, or a hub id organisation/model"
    )


def _official_folder(model: OfficialModel, concepts: str | Path | None, tokenizer: str | Path | None) -> Path:
    """Converted folder of an official model; made on first use."""
    concepts_path = _concepts_path(concepts)
    tokenizer_path = _tokenizer_path(tokenizer)
    key = [model.name, str(concepts or DEFAULT_CONCEPTS), "no-captions"]
    if concepts_path is not None:
        key[1] = _fingerprint(concepts_path)
    if tokenizer_path is not None:
        key[2] = _fingerprint(tokenizer_path)
    folder = home() / "converted" / "-".join([*key, f"v{_LAYOUT_VERSION}"])
    if not (folder / "config.json").is_file():
        wanted = [model.file] if concepts_path is not None else [model.file, f"concepts/{key[1]}.pkl"]
        files = _official_files(wanted)
        _convert(model, folder, files[0], concepts_path or files[1], tokenizer_path)
    return folder


def _convert(model: OfficialModel, folder: Path, checkpoint: Path, concepts: Path, tokenizer: Path | None) -> None:
    from .tap.conversion import convert_checkpoint

    check_file(checkpoint, model)
    logger.info("converting %s once, to %s", checkpoint, folder)
    try:
        convert_checkpoint(checkpoint, folder, concepts=concepts, tokenizer=tokenizer)
    except InputError:
        # Another process may have finished the same conversion first: then its folder serves as well.
        if not (folder / "config.json").is_file():
            raise


def _concepts_path(concepts: str | Path | None) -> Path | None:
    """The user's own concept file or folder; None for official ones."""
    if concepts is None or str(concepts) in OFFICIAL_CONCEPTS:
        return None
    path = Path(concepts).expanduser()
    if not path.exists():
        raise MissingFileError(
            f"there are no concepts at {concepts}; give a file or one of {', '.join(OFFICIAL_CONCEPTS)}"
        )
    return path


def _tokenizer_path(tokenizer: str | Path | None) -> Path | None:
    """The given tokenizer, or one that the user has put into the download folder."""
    placed = home() / "downloads" / TOKENIZER_FILE_NAME
    path = Path(tokenizer).expanduser() if tokenizer is not None else placed
    if not path.exists():
        if tokenizer is not None:
            raise MissingFileError(f"there is no tokenizer at {tokenizer}")
        logger.info("no captions: put the tokenizer (sha256 %s) at %s", TOKENIZER_SHA256, placed)
        return None
    if not is_official_tokenizer(path):
        logger.warning(
            "%s is not the tokenizer that the official weights were trained with (sha256 %s): "
            "captions may be nonsense", path, TOKENIZER_SHA256,
        )  # fmt: skip
    return path


def _official_files(files: list[str]) -> list[Path]:
    """Files of the official repository: those in the download folder, others from the hub."""
    folder = home() / "downloads"
    try:
        return [folder / file if (folder / file).is_file() else download(OFFICIAL_REPO, file) for file in files]
    except MissingFileError as error:
        places = " and ".join(str(folder / file) for file in files if not (folder / file).is_file())
        raise MissingFileError(f"{error}. Or get the files by other means and put them at {places}") from None


def _blocks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(size):
            yield block


def check_file(path: Path, model: OfficialModel) -> None:
    """Compare a checkpoint with the published hashes.

    Args:
        path: the file.
        model: what it should be.

    Raises:
        InputError: it is another file, or damaged.
    """
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    for block in _blocks(path):
        md5.update(block)
        sha256.update(block)
    published = (
        ("MD5", model.md5_prefix, md5.hexdigest()),
        ("SHA-256", model.sha256 or "", sha256.hexdigest()),
    )
    for kind, expected, actual in published:
        if not actual.startswith(expected):
            raise InputError(
                f"{path} is not the published {model.name}: its {kind} is {actual}, not {expected}"
                f"{'' if len(expected) == len(actual) else '…'}; delete the file and download it again"
            )


def _fingerprint(path: Path) -> str:
    """Short hash of a file, or of the files of a folder, for the name of a cache folder."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode() if path.is_dir() else b"")
            for block in _blocks(file):
                digest.update(block)
    return digest.hexdigest()[:12]


__all__ = ["OFFICIAL_CONCEPTS", "OFFICIAL_MODELS", "OfficialModel", "resolve_model"]
