"""Files of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .errors import MissingFileError


class NotInRepositoryError(MissingFileError):
    """The repository was reached and has no such file."""


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `organisation/model` of the Hugging Face hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def download(repo: str, file: str, **options: Any) -> Path:
    """Get a file of a hub repository, from the hub's local cache if it is there.

    Args:
        repo: the repository.
        file: path inside it.
        options: `revision`, `cache_dir`, `token`, `local_files_only` …

    Returns:
        Path of the local copy.

    Raises:
        NotInRepositoryError: there is no such file; a `MissingFileError`.
        MissingFileError: it cannot be downloaded.
    """
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, **options))
    except (OSError, errors.EntryNotFoundError, errors.HTTPError, errors.XetDownloadError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        absent = isinstance(error, errors.RemoteEntryNotFoundError)
        raise (NotInRepositoryError if absent else MissingFileError)(
            f"cannot download {file} from https://huggingface.co/{repo} ({reason}); "
            "a mirror can be set with the environment variable HF_ENDPOINT"
        ) from None


__all__ = ["NotInRepositoryError", "download", "is_hub_id"]
