"""Pictures that commands write: checked before any work, there only when complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import InputError

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def check_target(target: Path, name: str, given: bool = True) -> None:
    """Raise [`InputError`] where no picture can be written.

    Args:
        target: the file to be.
        name: how messages call it.
        given: the user named it; else it lies beside a picture whose folder is checked elsewhere.
    """
    if target.suffix.lower() not in PICTURE_FORMATS:
        raise InputError(f"{name}: unknown picture format; use one of {', '.join(PICTURE_FORMATS)}")
    folder = target.parent
    if given and not folder.is_dir():
        raise InputError(f"{name}: there is no folder {folder}; create it first")
    if folder.is_dir() and not os.access(folder, os.W_OK):
        way_out = "another place" if name == str(target) else "another place with --out"
        raise InputError(f"cannot write {target}: no permission for {folder}; choose {way_out}")
    if target.is_dir():
        raise InputError(f"{name} is a folder; give the name of a picture in it")


def save_picture(picture: Any, target: Path, way_out: str = "choose another format") -> None:
    """Write beside the target and rename: a picture appears only when it is complete."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as stream:
            picture.save(stream, format=PICTURE_FORMATS[target.suffix.lower()])
        os.replace(part, target)
    except (OSError, ValueError) as error:  # the system's, or Pillow's where the format has no room for such a size
        reason = f"{picture.width}x{picture.height} pixels: {error}"
        raise InputError(f"cannot write the picture {target} ({reason}); {way_out}") from error
    finally:
        part.unlink(missing_ok=True)


def picture_path(image: Path, out: Path | None, as_json: bool, suffix: str) -> Path | None:
    """Where the picture goes, checked before any work; None for JSON without --out.

    Args:
        image: the picture that is asked about.
        out: the file that the user named.
        as_json: nothing is written where the user named none.
        suffix: such as ".tap.png", takes the place of the picture's own.

    Raises:
        InputError: nothing can be written there.
    """
    if out is None and as_json:
        return None
    target = out if out is not None else image.parent / f"{image.stem}{suffix}"
    check_target(target, f"--out {target}", given=out is not None)
    if target.exists() and image.exists() and target.samefile(image):
        raise InputError(f"--out {target} would overwrite the picture itself; choose another name")
    return target
