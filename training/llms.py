"""Region language models for the recipes: joined of a TAP and an LLM, or gone on with from an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tap_llm.errors import InputError
from tap_llm.loading import load_tap
from tap_llm.region_llm.adapters import load_adapter, save_adapter
from tap_llm.region_llm.left_out import leave_out_tap
from tap_llm.region_llm.llm_loading import load_llm, load_llm_tokenizer
from tap_llm.region_llm.modeling_tap_llm import TapLlmForConditionalGeneration
from tap_llm.region_llm.processing_tap_llm import TapLlmProcessor
from tap_llm.region_llm.projectors import find_projector
from tap_llm.region_llm.token_cache import TokenCache
from tap_llm.tap.processing_tap import TapProcessor

from .chat_objective import ChatObjective
from .config import OptimizerConfig, RunConfig, to_dict
from .dialogues import DialogueBatches, DialogueConfig, Dialogues, scene_composer
from .loop import fit
from .recipe import VALIDATION_BATCHES, Recipe
from .stored_scenes import ScenePictures, StoredScenes, open_stored_scenes, store_scenes

_OF_SCENES = ("sprites", "backgrounds", "shape_share", "scene_size")


@dataclass
class LlmConfig:
    """Which model is trained."""

    start: str | None = None
    """Adapter of an earlier stage (its `final/`), to go on with; it says which TAP and LLM it needs."""
    tap: str | None = None
    """TAP: a folder, a hub id, a bundled or an official name; `tap-tiny` by default. With `start` only where it lies
    elsewhere now."""
    llm: str | None = None
    """LLM: a folder or a hub id of any causal LM; with `start` only where it lies elsewhere now."""
    projector: str | None = None
    """Preset of a new projector: `lite`, `base` (the default) or `full`."""
    projector_hidden: int | None = None
    """Width between the layers of a new projector; that of the LLM's embeddings if null."""
    chat_template: str | None = None
    """`plain`, `chatml` or a file, for LLMs without a chat template, or in place of theirs."""
    region_token: str | None = None
    """Token of the LLM that keeps the place of regions; chosen by itself if null."""
    dtype: str = "bfloat16"
    """Of the frozen parts; what is trained is kept in float32."""
    four_bit: bool = False
    """Load the LLM in 4 bits (QLoRA; needs bitsandbytes)."""
    attention: str | None = None
    """Attention implementation of the LLM."""


@dataclass
class ChatRecipeConfig:
    """What the configurations of both stages have."""

    model: LlmConfig = field(default_factory=LlmConfig)
    data: DialogueConfig = field(default_factory=DialogueConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def build_llm(config: LlmConfig) -> tuple[TapLlmForConditionalGeneration, TapLlmProcessor]:
    """A model to train, with nothing frozen yet, and its processor.

    Raises:
        InputError: no LLM is named, or a part cannot be used.
    """
    if config.start is not None:
        _check_start(config)
        model, processor = load_adapter(
            config.start, config.tap, config.llm, dtype=config.dtype, four_bit=config.four_bit
        )
    elif config.llm is not None:
        tap, tap_processor, _ = load_tap(config.tap or "tap-tiny", dtype=config.dtype)
        llm = load_llm(config.llm, config.four_bit, config.dtype)
        model = TapLlmForConditionalGeneration.from_tap_and_llm(
            tap, llm, config.projector or "base", projector_hidden_size=config.projector_hidden
        )
        tokenizer = load_llm_tokenizer(config.llm)
        processor = TapLlmProcessor.for_model(
            model, tap_processor, tokenizer, config.chat_template, config.region_token
        )
    else:
        raise InputError("model.llm: name a causal language model (a folder or a hub id), or model.start an adapter")
    if config.attention:
        model.model.language_model.set_attn_implementation(config.attention)
    return model, processor


def _check_start(config: LlmConfig) -> None:
    """Raise InputError for settings that the adapter to go on with has decided already."""
    for name in ("projector", "projector_hidden", "chat_template", "region_token"):
        if getattr(config, name) is not None:
            raise InputError(f"model.{name} is for new models: the adapter model.start brings its own; leave it out")


def open_tokens(
    config: DialogueConfig, model: TapLlmForConditionalGeneration, processor: TapLlmProcessor
) -> tuple[list[TokenCache], StoredScenes | None]:
    """What TAP knows already of files and scenes. With it, TAP is left out of the model: no image encoder stays in
    memory.

    Raises:
        InputError: it was made by another TAP, of other data, or lacks what the projector reads.
    """
    caches, stored = _open_caches(config, model), _open_scenes(config, model, processor)
    if caches or stored:
        leave_out_tap(model)
    return caches, stored


def _open_caches(config: DialogueConfig, model: TapLlmForConditionalGeneration) -> list[TokenCache]:
    """Region tokens of the files."""
    reads = find_projector(model.config.projector)
    caches = [TokenCache.open(folder, reads.uses_roi, reads.uses_global) for folder in config.tokens]
    for cache in caches:
        cache.check_model(model.model.tap)
        cache.check_config(model.config)
    return caches


def _open_scenes(
    config: DialogueConfig, model: TapLlmForConditionalGeneration, processor: TapLlmProcessor
) -> StoredScenes | None:
    """Scenes that TAP has read, made now if need be; None if each conversation is to have a new one."""
    if not config.store.folder:
        return None
    reads, size = find_projector(model.config.projector), (config.scene_size[0], config.scene_size[1])
    roi_grid, global_grid = model.config.roi_grid * reads.uses_roi, model.config.global_grid * reads.uses_global
    about = to_dict(config.store) | {name: getattr(config, name) for name in _OF_SCENES}
    del about["folder"]  # it may move
    pictures = ScenePictures(scene_composer(config), config.store, size)
    tap_processor = TapProcessor(processor.image_processor)
    store_scenes(pictures, model.model.tap, tap_processor, roi_grid, global_grid, about)
    stored = open_stored_scenes(config.store.folder, config.kinds or None)
    stored.tokens.check_config(model.config)
    return stored


def adapter_saver(
    model: TapLlmForConditionalGeneration, processor: TapLlmProcessor
) -> Callable[[dict[str, Tensor], Path], None]:
    """What writes the adapter of a trainee that holds the model as `model`; see [`Recipe`]."""

    def save(state: dict[str, Tensor], folder: Path) -> None:
        ours = {key.removeprefix("model."): value for key, value in state.items()}
        save_adapter(model, folder, processor, state_dict=ours)

    return save


def train_dialogues(config: Any, model: TapLlmForConditionalGeneration, processor: TapLlmProcessor) -> Path:
    """Train what of the model is not frozen on conversations; returns the folder of the adapter.

    Args:
        config: a [`ChatRecipeConfig`].
        model: frozen but for what is trained.
        processor: of the model.
    """
    run: RunConfig = config.run
    caches, stored = open_tokens(config.data, model, processor)
    if run.gradient_checkpointing:
        model.model.language_model.activation_checkpointing_enable()

    def batches(dialogues: Dialogues, length: int | None = None) -> DialogueBatches:
        return DialogueBatches(dialogues, processor, run.batch_size, length)

    recipe = Recipe(
        trainee=ChatObjective(model),
        batches=batches(Dialogues(config.data, run.seed, caches=caches, stored=stored)),
        validation=batches(Dialogues(config.data, validation=True, caches=caches, stored=stored), VALIDATION_BATCHES),
        save=adapter_saver(model, processor),
        better="accuracy",
    )
    return fit(recipe, run, config.optimizer, to_dict(config))
