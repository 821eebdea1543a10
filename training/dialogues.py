"""Conversations about regions as batches: from files, with the pictures or with cached region tokens, and from scenes.

Conversation n is a function of its number and the seed alone, whatever process or worker makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tap_llm.data.broken import BrokenCount, with_place
from tap_llm.data.instructions import InstructionSamples
from tap_llm.data.messages import Message, question_messages
from tap_llm.data.readers import open_samples
from tap_llm.data.samples import RegionSample
from tap_llm.data.scenes import SceneComposer
from tap_llm.errors import InputError
from tap_llm.region_llm.features import RegionFeatures
from tap_llm.region_llm.processing_tap_llm import TapLlmProcessor
from tap_llm.region_llm.token_cache import TokenCache

from .sources import VALIDATION_SEED, DataConfig, make_composers
from .stored_scenes import StoreConfig, StoredScenes

CHARACTERS_PER_TOKEN = 4  # roughly, to sort conversations by length
ATTEMPTS = 20  # batches drawn for one, where all conversations of a batch are broken
AHEAD = 1_000_003  # batches from one attempt to the next


@dataclass
class DialogueConfig:
    """What is talked about."""

    samples: list[str] = field(default_factory=list)
    """Files of samples with conversations, in any form that `open_samples` reads."""
    tokens: list[str] = field(default_factory=list)
    """Their region tokens (`tap-llm tokenize`), one folder per file; none: pictures are encoded as they come."""
    sample_hold_out: int = 0
    """Every so many-th sample of each file, starting with the first, is kept for validation; 0 validates on all."""
    scene_share: float = 0.0
    """Share of conversations about composed scenes; with 1 no files are needed."""
    sprites: list[str] = field(default_factory=list)
    """Folders of named cut-outs for the scenes; none: drawn shapes only."""
    backgrounds: list[str] = field(default_factory=list)
    """Folders of pictures behind their objects; none: drawn backgrounds."""
    shape_share: float = 0.4
    """Share of drawn shapes among their objects."""
    scene_size: list[int] = field(default_factory=lambda: [400, 300])
    store: StoreConfig = field(default_factory=StoreConfig)
    """Scenes that are drawn, and read by TAP, once and for all."""
    kinds: list[str] = field(default_factory=list)
    """Kinds of questions about scenes (see `instructions.KINDS`); none: all."""
    max_length: int = 1024
    """Longest conversation in tokens; longer ones count as broken."""
    group: int = 8
    """So many batches at a time are sorted by length, so that little is padding; 1 sorts nothing."""
    broken_share: float = 0.01
    """Share of broken conversations above which the run stops; fewer are skipped and named."""

    def check(self) -> None:
        """Raise InputError for settings that cannot be."""
        if not 0 <= self.scene_share <= 1:
            raise InputError(f"data.scene_share must lie between 0 and 1, got {self.scene_share}")
        if not self.samples and self.scene_share < 1:
            raise InputError("data.samples names no files; name some, or set data.scene_share=1 for composed scenes")
        if self.tokens and len(self.tokens) != len(self.samples):
            raise InputError(f"data.tokens names {len(self.tokens)} folders for {len(self.samples)} files of samples")
        self.store.check()
        if self.store.folder and not self.scene_share:
            raise InputError("data.store.folder is for composed scenes: set data.scene_share too")
        if self.scene_share and self.samples and bool(self.tokens) != bool(self.store.folder):
            raise InputError("data.tokens and data.store.folder go together: both files and scenes are cached, or none")
        if self.sample_hold_out == 1 or self.sample_hold_out < 0:
            raise InputError(f"data.sample_hold_out must be 0 or at least 2, got {self.sample_hold_out}")
        if self.group < 1 or self.max_length < 2:
            raise InputError("data.group must be at least 1 and data.max_length at least 2")
        if len(self.scene_size) != 2 or min(self.scene_size) < 1:
            raise InputError(f"data.scene_size must be width and height, got {self.scene_size}")


class Dialogue(NamedTuple):
    """One conversation, before the processor."""

    messages: list[Message]
    sample: RegionSample | None
    """None for stored scenes, which have no picture any more."""
    place: str
    """File and record, for messages."""
    cache: TokenCache | None = None
    """Region tokens of the sample's file, where there are any."""
    record: int = 0
    """Number of the sample in its file."""

    def features(self) -> RegionFeatures:
        """Read the sample's region tokens; only those who need them should."""
        assert self.cache is not None
        return self.cache[self.record]

    def length(self, per_region: int, per_image: int) -> int:
        """Rough length in tokens, the same however the regions are given."""
        costs = {"region": per_region, "image": per_image}
        parts = (part for message in self.messages for part in _parts(message))
        return sum(costs.get(part["type"], len(part.get("text", "")) // CHARACTERS_PER_TOKEN) for part in parts)


class Dialogues:
    """Conversation n of an endless stream: all of the files in random order, again and again, and scenes in between.

    Args:
        config: where they come from.
        seed: another seed, another order and other scenes.
        validation: the held-out samples only.
        caches: region tokens of the files, opened; none: pictures are read.
        stored: scenes to talk about; none: each conversation has a new one.

    Raises:
        InputError: settings or files that cannot be used, or tokens of other data.
    """

    def __init__(
        self,
        config: DialogueConfig,
        seed: int = 0,
        validation: bool = False,
        caches: Sequence[TokenCache] = (),
        stored: StoredScenes | None = None,
    ) -> None:
        config.check()
        self.config, self.seed, self.validation = config, VALIDATION_SEED if validation else seed, validation
        self.stored = stored
        self.files = [open_samples(path) for path in config.samples]
        self.caches = caches
        for file, cache in zip(self.files, self.caches, strict=False):
            cache.check_data(file)
        self._last_order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))
        self.places = _places([len(file) for file in self.files], config.sample_hold_out, validation)
        if config.scene_share < 1 and not len(self.places):
            raise InputError("data.samples: the files hold no sample to use")
        self.scenes = InstructionSamples(
            scene_composer(config), 2**40, self.seed, (config.scene_size[0], config.scene_size[1]),
            kinds=config.kinds or None,
        ) if config.scene_share and stored is None else None  # fmt: skip

    def __getitem__(self, number: int) -> Dialogue:
        """A conversation; raises InputError for a broken one, with file and record in front."""
        rng = np.random.default_rng((self.seed, number))
        is_scene = bool(self.config.scene_share) and rng.random() < self.config.scene_share
        if is_scene and self.stored is not None:
            index, talk = self.stored.talk(rng, self.validation)
            return Dialogue(talk.messages, None, f"scene {index}", self.stored.tokens, index)
        if is_scene and self.scenes is not None:
            sample = self.scenes[number]
            return Dialogue(sample.conversations, sample, f"scene {number}")
        epoch, position = divmod(number, len(self.places))
        which, index = self.places[self._order(epoch)[position]].tolist()
        file = self.files[which]
        try:
            sample = file[index]
            messages = _one_conversation(sample, rng)
        except (InputError, OSError, LookupError, TypeError, AttributeError) as error:  # they break in many ways
            raise InputError(f"{file.path}, {with_place(file, index, error)}") from error
        cache = self.caches[which] if self.caches else None
        return Dialogue(messages, sample, f"{file.path}, {file.where(index)}", cache, index)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch; the last one is kept."""
        if self._last_order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch, 3)).permutation(len(self.places))
            self._last_order = epoch, order
        return self._last_order[1]


class DialogueBatches:
    """Micro-batch n of conversations.

    Args:
        dialogues: conversation n.
        processor: of the model.
        batch_size: B.
        length: number of batches; None for an endless run.
    """

    def __init__(
        self, dialogues: Dialogues, processor: TapLlmProcessor, batch_size: int, length: int | None = None
    ) -> None:
        self.dialogues, self.processor, self.batch_size, self.length = dialogues, processor, batch_size, length
        self._count = BrokenCount(dialogues.config.broken_share)
        self._problems: list[str] = []
        self._last_group: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.length if self.length is not None else 2**40

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A batch: what [`TapLlmProcessor`] returns, with `labels`; fewer rows where conversations were broken.

        A batch without any good one gives way to one from far ahead in the stream.

        Raises:
            InputError: too many are broken.
        """
        for attempt in range(ATTEMPTS):
            drawn = map(self._draw, self._numbers(number + attempt * AHEAD))
            batch = self._process_good([dialogue for dialogue in drawn if dialogue is not None])
            if batch is not None:
                return batch
        raise InputError(f"all conversations of {ATTEMPTS} batches are broken; the last: {self._problems[-1]}")

    def _process_good(self, dialogues: list[Dialogue]) -> dict[str, Any] | None:
        """A batch of those that are not broken; None if all are."""
        try:
            return self._process(dialogues)
        except InputError:
            good = [dialogue for dialogue in dialogues if self._is_good(dialogue)]
        return self._process(good) if good else None

    def take_problems(self) -> list[str]:
        """Messages about broken conversations that were met since the last call."""
        problems, self._problems = self._problems, []
        return problems

    def _numbers(self, batch: int) -> Sequence[int]:
        """Numbers of the conversations of a batch. Of a group of batches each gets those of like length."""
        config = self.dialogues.config
        if config.group == 1 or config.scene_share:  # all scenes are talked about briefly
            return range(batch * self.batch_size, (batch + 1) * self.batch_size)
        group, place = divmod(batch, config.group)
        numbers = self._sorted_group(group)
        order = np.random.default_rng((self.dialogues.seed, group, 4)).permutation(config.group)
        first = int(order[place]) * self.batch_size
        return numbers[first : first + self.batch_size]

    def _sorted_group(self, group: int) -> list[int]:
        """Numbers of the conversations of a group of batches, short ones first; the last group is kept."""
        if self._last_group[0] != group:
            size = self.batch_size * self.dialogues.config.group
            numbers = sorted(range(group * size, (group + 1) * size), key=self._length_of)
            self._last_group = group, numbers
        return self._last_group[1]

    def _length_of(self, number: int) -> int:
        try:
            dialogue = self.dialogues[number]
            return dialogue.length(self.processor.tokens_per_region, self.processor.tokens_per_image)
        except (InputError, LookupError, TypeError, AttributeError):  # told when it is drawn
            return 0

    def _draw(self, number: int) -> Dialogue | None:
        try:
            dialogue = self.dialogues[number]
        except InputError as error:
            self._tell(str(error))
            return None
        self._count.add()
        return dialogue

    def _is_good(self, dialogue: Dialogue) -> bool:
        try:
            self._process([dialogue])
        except (InputError, OSError) as error:
            self._tell(f"{dialogue.place}: {error}")
            return False
        return True

    def _tell(self, problem: str) -> None:
        self._problems.append(problem)
        self._count.add(problem)

    def _process(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        messages = [dialogue.messages for dialogue in dialogues]
        samples = [dialogue.sample for dialogue in dialogues if dialogue.cache is None and dialogue.sample is not None]
        if samples:
            images, regions = [[sample.load_image()] for sample in samples], [sample.prompts() for sample in samples]
            sources: dict[str, Any] = {"images": images, "regions": regions}
        else:
            sources = {"region_features": [dialogue.features() for dialogue in dialogues]}
        config = self.dialogues.config
        inputs = self.processor(
            messages, **sources, return_labels=True, allow_unused_regions=True, max_length=config.max_length
        )
        return dict(inputs)


def _places(lengths: Sequence[int], hold_out: int, held_out: bool) -> NDArray[np.int64]:
    """(M, 2) file and index of the samples that may be shown."""
    pairs = [(which, index) for which, length in enumerate(lengths) for index in range(length)]
    places = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    if not hold_out:
        return places
    return places[(places[:, 1] % hold_out == 0) == held_out]


def scene_composer(config: DialogueConfig) -> SceneComposer:
    """What draws the scenes."""
    shared = DataConfig(sprites=config.sprites, backgrounds=config.backgrounds, shape_share=config.shape_share)
    return make_composers(shared)[0]


def _one_conversation(sample: RegionSample, rng: np.random.Generator) -> list[Message]:
    """Its chat messages; of question and answer records one at random."""
    turns = sample.conversations
    if not turns:
        raise InputError(f"{sample.id or 'a sample'}: has no conversation")
    if "role" in turns[0]:
        return turns
    record = turns[int(rng.integers(len(turns)))]
    if not {"question", "answer"} <= record.keys():
        raise InputError(f'expected messages or {{"question", "answer"}}, got keys {", ".join(map(str, record))}')
    return question_messages(record)


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
