"""Every file under configs/ is read by what it is for: recipes by their dataclass, the others by Accelerate."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tap_llm import TapForConditionalGeneration
from tap_llm.concepts import ConceptSpace
from tap_llm.tap.configuration_tap import TapConfig
from training.align import AlignConfig
from training.caption import CaptionConfig
from training.captioning import CaptionLossConfig, CaptionObjective
from training.chat import ChatConfig
from training.clip import ClipTrainConfig
from training.config import load_config
from training.language import LanguageConfig
from training.models import random_concepts
from training.objective import LossConfig, PromptConfig, RegionObjective
from training.optimization import schedule_factor
from training.pretrain import PretrainConfig
from training.tell import TellConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
LAUNCHERS = sorted((CONFIGS / "accelerate").glob("*.yaml"))
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "accelerate")
CLASSES = {
    "pretrain": PretrainConfig,
    "clip": ClipTrainConfig,
    "caption": CaptionConfig,
    "language": LanguageConfig,
    "tell": TellConfig,
    "align": AlignConfig,
    "chat": ChatConfig,
}


def named(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def recipe_of(path: Path) -> Any:
    """The dataclass that the first line of a configuration names."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# recipe: ")
    return CLASSES[first.removeprefix("# recipe: ")]


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipe(path: Path) -> None:
    config = load_config(recipe_of(path), path)
    assert config.run.output_dir.startswith("runs/")
    assert 0 < schedule_factor(0, config.run.steps, config.optimizer) <= 1
    assert config.optimizer.warmup < config.run.steps
    if isinstance(config, PretrainConfig | CaptionConfig):
        fresh = config.model.start is None
        assert fresh or config.model.overrides == {}
        TapConfig.from_variant(config.model.variant, **config.model.overrides)


def test_each_size_has_the_same_files() -> None:
    folders = [CONFIGS / f"tap_vit_{size}" for size in "blh"]
    assert [sorted(file.name for file in folder.iterdir()) for folder in folders] == [
        ["caption.yaml", "masks.yaml", "pretrain.yaml"]
    ] * 3


def launch_arguments(path: Path, *options: str) -> Namespace:
    parsed = launch_command_parser().parse_args(["--config_file", str(path), *options, "script.py"])
    return _validate_launch_command(parsed)[0]


@pytest.mark.parametrize("path", LAUNCHERS, ids=named)
def test_launcher(path: Path) -> None:
    """Accelerate's loader refuses unknown keys at the top; those below become its command line's arguments."""
    load_config_from_file(str(path))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for group in ("fsdp_config", "deepspeed_config"):
        assert content.get(group, {}).keys() <= known.keys()
    assert launch_arguments(path).num_processes == content["num_processes"]


def tiny_tap() -> TapForConditionalGeneration:
    parts = {
        "vision_config": {"image_size": 64, "window_size": 4, "hidden_size": 32, "output_channels": 32},
        "prompt_config": {"image_size": 64, "hidden_size": 32},
        "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 32, "semantic_embed_dim": 16},
        "text_config": {"vocab_size": 50, "semantic_size": 32, "hidden_size": 32, "intermediate_size": 32},
    }
    return TapForConditionalGeneration(TapConfig.from_variant("tiny", **parts))


def trainees() -> dict[str, Any]:
    tap, concepts = tiny_tap(), random_concepts(["a", "b"], 16, 30.0)
    assert isinstance(concepts, ConceptSpace)
    return {
        "pretrain": RegionObjective(tap.model, concepts, False, PromptConfig(), LossConfig()),
        "caption": CaptionObjective(tap, CaptionLossConfig()),
    }


@pytest.mark.parametrize(
    ("recipe", "options", "wrapped"),
    [
        ("pretrain", [], {"TapVisionLayer"}),
        ("caption", [], {"TapVisionLayer"}),
        (
            "caption",
            ["--fsdp_transformer_layer_cls_to_wrap", "TapVisionLayer,TapTextLayer"],
            {"TapVisionLayer", "TapTextLayer"},
        ),
    ],
)
def test_fsdp_wraps_the_layers(recipe: str, options: list[str], wrapped: set[str]) -> None:
    arguments = launch_arguments(CONFIGS / "accelerate" / "fsdp.yaml", *options)
    with patch_environment(**prepare_multi_gpu_env(arguments)):
        plugin = FullyShardedDataParallelPlugin()
    model = trainees()[recipe]
    assert (plugin.fsdp_version, plugin.cpu_ram_efficient_loading) == (2, False)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert {type(module).__name__ for module in model.modules() if wraps(module)} == wrapped


def test_deepspeed_leaves_accumulation_to_the_recipe() -> None:
    arguments = launch_arguments(CONFIGS / "accelerate" / "deepspeed_zero2.yaml")
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment


SCRIPT = """
from pathlib import Path
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
Path(f"{accelerator.process_index} of {accelerator.num_processes}").touch()
"""


@pytest.mark.slow
def test_two_cpu_processes_really_start(tmp_path: Path) -> None:
    script = tmp_path / "who.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    config = ["--config_file", str(CONFIGS / "accelerate" / "cpu_two_processes.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *config, str(script)], check=True, capture_output=True, cwd=tmp_path, env=environment)
    assert sorted(path.name for path in tmp_path.glob("* of *")) == ["0 of 2", "1 of 2"]
