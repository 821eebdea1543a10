"""Composed scenes that TAP has read once: conversations about them are new each time, pictures are not.

Drawing a scene and encoding its picture take several times as long as a step of a small LLM. What is said about a
scene needs its words alone, what is known of its regions lies in a token cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tap_llm.data.instructions import Conversation, converse
from tap_llm.data.samples import RegionSample
from tap_llm.data.scenes import Scene, SceneComposer, Size
from tap_llm.data.wording import Thing
from tap_llm.errors import InputError
from tap_llm.masks import mask_to_points
from tap_llm.region_llm.token_builder import build_token_cache
from tap_llm.region_llm.token_cache import TokenCache
from tap_llm.tap.processing_tap import TapProcessor

from .distributed import process_state
from .files import write_text

VALIDATION_EVERY = 20  # every so many-th scene is kept for validation
_WORDS, _TOKENS, _SETTINGS = "scenes.jsonl", "tokens", "settings.json"
_ATTEMPTS = 20  # scenes drawn for one conversation, until one has something to ask about
_NO_PIXELS = np.zeros((0, 0, 3), dtype=np.uint8)


@dataclass
class StoreConfig:
    """Scenes that TAP reads once, before training."""

    folder: str = ""
    """Where they are kept; several stages may share it. None: every conversation has a new scene."""
    scenes: int = 6000
    click_share: float = 0.2
    """Share of the regions that TAP is shown by a click in their middle; the others by their box."""
    dtype: str = "float16"
    """Of the stored tokens."""
    seed: int = 0

    def check(self) -> None:
        """Raise InputError for settings that cannot be."""
        if self.scenes < VALIDATION_EVERY or not 0 <= self.click_share <= 1:
            raise InputError(
                f"data.store: at least {VALIDATION_EVERY} scenes and a click_share between 0 and 1 are needed, got "
                f"{self.scenes} and {self.click_share}"
            )


class ScenePictures(Sequence[RegionSample]):
    """The scenes of a store with their pictures, prompted as the store says; scene i is a function of seed and i.

    Args:
        composer: makes the scenes.
        config: how many, and how regions are prompted.
        size: (width, height) in pixels.
    """

    def __init__(self, composer: SceneComposer, config: StoreConfig, size: Size) -> None:
        self.composer, self.config, self.size = composer, config, size

    def __len__(self) -> int:
        return self.config.scenes

    def scene(self, index: int) -> Scene:
        """A scene."""
        return self.composer.scene(int(np.random.default_rng((self.config.seed, index)).integers(2**31)), self.size)

    def __getitem__(self, index: int) -> RegionSample:  # type: ignore[override]
        sample = self.scene(index).to_sample()
        rng = np.random.default_rng((self.config.seed, index, 1))
        for region, click in zip(sample.regions, rng.random(len(sample.regions)), strict=True):
            if click < self.config.click_share:
                region["points"] = mask_to_points(region.pop("mask"), 1).tolist()
        return sample


@dataclass
class StoredScenes:
    """Scenes without pixels, and the features of their regions.

    Attributes:
        scenes: words only; `image` and `masks` are empty.
        tokens: features of the regions of each.
        kinds: kinds of questions (see `instructions.KINDS`); None: all.
    """

    scenes: list[Scene]
    tokens: TokenCache
    kinds: list[str] | None = field(default=None)

    def indices(self, validation: bool) -> list[int]:
        """Of the scenes kept for validation, or of the others."""
        return [index for index in range(len(self.scenes)) if (index % VALIDATION_EVERY == 0) == validation]

    def talk(self, rng: np.random.Generator, validation: bool) -> tuple[int, Conversation]:
        """A scene, of those kept for validation or of the others, and a new conversation about it."""
        for _ in range(_ATTEMPTS):
            index = VALIDATION_EVERY * int(rng.integers(len(self.scenes) // VALIDATION_EVERY))
            index += 0 if validation else int(rng.integers(1, VALIDATION_EVERY))
            conversation = converse(self.scenes[index], int(rng.integers(2**31)), kinds=self.kinds)
            if conversation.questions:
                return index, conversation
        raise InputError(f"{_ATTEMPTS} stored scenes in turn have nothing to ask about; allow more kinds of questions")


def store_scenes(
    pictures: ScenePictures, tap: Any, processor: TapProcessor, roi_grid: int, global_grid: int, about: dict[str, Any]
) -> None:
    """Make a store, or go on where an earlier call stopped; a complete one is left as it is.

    Args:
        pictures: the scenes.
        tap: reads them.
        processor: of the TAP.
        roi_grid: of the tokens, see [`extract_features`].
        global_grid: of the tokens.
        about: settings that decide scenes and tokens.

    Raises:
        InputError: the folder holds other scenes, or scenes read by another TAP.
    """
    folder, config = Path(pictures.config.folder), pictures.config
    state = process_state()
    if state.is_main_process:
        _claim(folder, about)
    state.wait_for_everyone()
    if (folder / _WORDS).is_file():  # written last
        TokenCache.open(folder / _TOKENS).check_model(tap)
        return
    build_token_cache(
        pictures, tap, processor, folder / _TOKENS, roi_grid, global_grid, config.dtype, batch_size=16,
        rank=state.process_index, world_size=state.num_processes, data_name="the composed scenes",
        progress=state.is_main_process,
    )  # fmt: skip
    state.wait_for_everyone()
    if state.is_main_process:
        lines = (json.dumps(_to_json(pictures.scene(index))) for index in range(len(pictures)))
        write_text(folder / _WORDS, "".join(f"{line}\n" for line in tqdm(lines, "words", len(pictures))))
    state.wait_for_everyone()


def open_stored_scenes(folder: str, kinds: list[str] | None) -> StoredScenes:
    """A complete store.

    Raises:
        InputError: it is damaged.
    """
    tokens = TokenCache.open(Path(folder) / _TOKENS)
    try:
        scenes = list(_read_scenes(Path(folder) / _WORDS))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder}: {_WORDS} is damaged ({error!r}); delete that file to have it made again") from None
    if len(scenes) != len(tokens):
        raise InputError(f"{folder}: {len(scenes)} scenes in {_WORDS}, tokens of {len(tokens)}; delete {_WORDS}")
    return StoredScenes(scenes, tokens, kinds)


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """The folder is for these scenes, or else is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / _SETTINGS, json.dumps(about, indent=1)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{folder} holds scenes of other settings (see {_SETTINGS}): name another data.store.folder")
    write_text(path, text)


def _to_json(scene: Scene) -> dict[str, Any]:
    names = ("captions", "kinds", "attributes", "visible")
    return {"things": [asdict(thing) for thing in scene.things], **{name: getattr(scene, name) for name in names}}


def _read_scenes(path: Path) -> Iterator[Scene]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            things = [_thing(thing) for thing in record.pop("things")]
            yield Scene(_NO_PIXELS, np.zeros((len(things), 0, 0), dtype=bool), things, **record)


def _thing(record: dict[str, Any]) -> Thing:
    """JSON has lists where a thing has tuples."""
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}
    return Thing(**values)


__all__ = ["ScenePictures", "StoreConfig", "StoredScenes", "open_stored_scenes", "store_scenes"]
