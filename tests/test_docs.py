"""Every command of docs/finetune.md runs, in order, in a folder that looks like a clone.

A comment before a block says how it is run: `<!-- test: key=value … -->` appends settings that make a training command
short; `parsed` only reads a command and its configuration; `interrupted` first undoes the last step, as a kill would;
`tensorboard` looks at what the command would show; `not run` leaves a block out.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from recipes import launched, train

from tap_llm import cli
from training.caption import CaptionConfig
from training.config import load_config
from training.pretrain import PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
FINETUNE = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:<!-- test: (.*?) -->\n)?```(bash|python)\n(.*?)```", re.S)
CONFIGS = {"training.caption": CaptionConfig, "training.pretrain": PretrainConfig}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the clone's examples and configurations, without a network and without a cache."""
    for name in ("examples", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TAP_LLM_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def read_configuration(module: str, arguments: list[str]) -> Any:
    """The dataclass that a training command would run with."""
    settings = [text for text in arguments if "=" in text]
    path = arguments[arguments.index("--config") + 1]
    return load_config(CONFIGS[module], path, settings)


def undo_last_step(folder: Path) -> None:
    """What a kill before the last step leaves behind."""
    *_, last = sorted((folder / "checkpoints").iterdir())
    shutil.rmtree(last)
    shutil.rmtree(folder / "final")


def run_training(command: list[str], marker: str) -> None:
    words = marker.split()
    module, arguments = launched(command)
    arguments += [word for word in words if "=" in word]  # the last one wins
    config = read_configuration(module, arguments)
    if "parsed" in words:
        return
    if "interrupted" in words:
        undo_last_step(Path(config.run.output_dir))
    train(module, arguments)
    assert (Path(config.run.output_dir) / "final" / "model.safetensors").is_file()


def check_tensorboard(command: list[str]) -> None:
    """The folder that TensorBoard is started on holds curves and pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(command[command.index("--logdir") + 1]) / "tensorboard")).Reload()
    assert {"loss/caption", "validation/accuracy"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["captions"]


def run_command(line: str, marker: str) -> None:
    command = shlex.split(line, comments=True)
    if command[0] == "tap-llm":
        assert cli.main(command[1:]) == 0
    elif command[0] == "tensorboard":
        check_tensorboard(command)
    else:
        run_training(command, marker)


def test_tutorial(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variables: dict[str, str] = {}
    for marker, language, text in BLOCK.findall(FINETUNE):
        if marker == "not run":
            continue
        if language == "python":
            scope: dict[str, Any] = {}
            exec(compile(text, "docs/finetune.md", "exec"), scope)
            assert len(scope["results"]) == 2
        elif "<<" in text:
            subprocess.run(["bash", "-e", "-c", text], check=True)
        else:
            for line in text.replace("\\\n", " ").splitlines():
                if assignment := re.match(r"(\w+)=(\S+)", line):
                    variables[assignment[1]] = assignment[2]
                    continue
                for name, value in variables.items():
                    line = line.replace(f"${name}", value)
                run_command(line, marker)
    assert "1 broken" not in capsys.readouterr().err
    steps = [line for line in (clone / "runs/mine/log.jsonl").read_text().splitlines() if "loss/caption" in line]
    assert len(steps) >= 1
    assert (clone / "described.png").stat().st_size > 10_000


MESSAGES = [
    ("there is no configuration nowhere.yaml", ["--config", "nowhere.yaml"]),
    ("settings are given as key=value, got '[x.jsonl]'", ["[x.jsonl]"]),
    ("unknown key 'step'; known are output_dir, steps", ["run.step=3"]),
    ("data.sample_share is set, but data.samples names no files", ["data.samples=[]"]),
    ("samples: there is no file or folder x.jsonl", ["data.samples=[x.jsonl]"]),
    ("data.samples: found no region with a caption in 1000 draws", ["data.samples=[bare.jsonl]"]),
    ("100 of 100 samples are broken: broken.jsonl, line ", ["data.samples=[broken.jsonl]"]),
    ("good.jsonl has no sample to train on that data.sample_hold_out leaves to it", ["data.sample_hold_out=20"]),
    ("stopped at step 2: not finite: loss/caption", ["run.steps=2", "optimizer.learning_rate=1e30"]),
    (
        "runs/old holds a run that reached step 5: go on with --resume, or choose another run.output_dir",
        ["run.output_dir=runs/old"],
    ),
    ("there is no run to resume in runs/new", ["run.output_dir=runs/new", "resume=true"]),
    ("the run in runs/old was started with another", ["run.output_dir=runs/old", "resume=true"]),
]


@pytest.fixture
def broken_things(clone: Path) -> Path:
    """What the messages of the tutorial are about: files without captions or pictures, and an older run."""
    Image.new("RGB", (8, 8)).save(clone / "small.png")
    (clone / "good.jsonl").write_text(
        '{"image": "examples/scene.jpg", "regions": [{"box": [9, 9, 99, 99], "caption": "a cross"}]}\n'
    )
    (clone / "bare.jsonl").write_text('{"image": "small.png", "regions": [{"box": [1, 1, 7, 7]}]}\n')
    (clone / "broken.jsonl").write_text('{"image": "nowhere.jpg"}\n' * 100)
    old = clone / "runs" / "old"
    (old / "checkpoints" / "step_00000005").mkdir(parents=True)
    (old / "settings.json").write_text("{}")
    return clone


@pytest.mark.parametrize(("message", "arguments"), MESSAGES, ids=[message[:30] for message, _ in MESSAGES])
def test_messages(broken_things: Path, capsys: pytest.CaptureFixture[str], message: str, arguments: list[str]) -> None:
    config = [] if "--config" in arguments else ["--config", "configs/tap_vit_b/caption.yaml"]
    short = ["model.start=tap-tiny", "run.steps=1", "run.batch_size=1", "run.workers=0", "run.evaluate_every=0"]
    samples = ["data.samples=[good.jsonl]"]  # unless the arguments, which win, say something else
    with pytest.raises(SystemExit) as stopped:
        train("training.caption", [*config, *short, *samples, *arguments] if config else arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err.removesuffix("\n").split("\n")[-1]
    assert message in printed and "\r" not in printed  # a line of its own, not behind the progress bar
    quoted = re.findall(r"^\| `(.*?)` \|", FINETUNE, re.M)
    patterns = [".*".join(re.escape(part) for part in text.split("…")) for text in quoted]
    assert any(re.search(pattern, printed) for pattern in patterns), "the tutorial does not speak of this message"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("folder", ["docs", "configs", "training", "eval", "benchmarks"])
def test_files_that_texts_name_are_there(folder: str) -> None:
    texts = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py", ".yaml")]
    pattern = re.compile(r"(?<![\w/.])(?:configs|docs|training|eval|benchmarks|tap_llm)/[\w/]+\.(?:yaml|py|md)\b")
    named = {(path.name, file) for path in texts for file in pattern.findall(path.read_text(encoding="utf-8"))}
    assert [pair for pair in sorted(named) if not (ROOT / pair[1]).exists()] == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_training_commands_fit_their_recipes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?:accelerate launch|torchrun) .*-m training\.(?:pretrain|caption) .*", text, re.M):
        module, *arguments = shlex.split(line.split(" -m ")[1], comments=True)
        read_configuration(module, arguments)
