"""Continuing a run: from where, and only as the same one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace

from simclr_scale.cli.resume import config_differences, config_of_resumed_run, find_start, settings_of_result
from simclr_scale.errors import InputError
from tests.cli.commands import SHORT, Outcome, files_below

Command = Callable[..., Outcome]
Refusal = Callable[..., str]
RESUME = ("--resume", "auto", "--name", "x")


def steps(run: Path) -> list[str]:
    return [line.partition(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]]


# --- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "difference"),
    [
        ("--model.temperature=0.3", "model.temperature = "),
        ("--data.global_batch_size=8", "data.global_batch_size = 16, not 8"),
        ("--data.augmentation.hue=0.1", "data.augmentation.hue = "),
        ("--seed_everything=1", "seed_everything = 0, not 1"),
        ("--trainer.max_epochs=3", "trainer.max_epochs = 2, not 3"),
        ("--trainer.gradient_clip_val=1", "trainer.gradient_clip_val = None, not 1"),
        ("--model.encoder.channels=[8,8,8]", "model.encoder.init_args.channels = [16, 32, 96], not [8, 8, 8]"),
        ("--trainer.strategy=ddp_bf16", "trainer.strategy = float32 gradients, not ddp_bf16"),
        ("--model.optimizer=LARS", "model.optimizer.class_path = torch.optim.AdamW, not simclr_scale.LARS"),
    ],
)
def test_a_changed_key_is_refused_by_its_name(option: str, difference: str, refusal: Refusal, run: Path) -> None:
    message = refusal(*SHORT, *RESUME, option)
    assert message.startswith(f"run runs/x was started with {difference}")
    assert message.endswith("; start a new run, or add --override true")
    assert run.is_dir()


def test_what_cannot_change_the_result_may_change(run: Path, command: Command) -> None:
    harmless = (
        "--threads=1",
        "--data.num_workers=1",
        "--trainer.devices=1",
        "--trainer.strategy=ddp",
        "--knn.batch_size=5",
        "--checkpoint.keep=1",
    )
    outcome = command(*SHORT, *RESUME, *harmless)
    assert (outcome.status, outcome.err) == (0, "")
    assert "continuing from runs/x/checkpoints/step=6.ckpt" in outcome.out
    assert steps(run) == list("012345")


def test_an_override_goes_on_with_the_new_configuration(run: Path, command: Command) -> None:
    before = files_below(run)
    outcome = command(*SHORT, *RESUME, "--trainer.max_epochs=3", "--override=true")
    assert (outcome.status, outcome.err) == (0, "")
    assert json.loads((run / "summary.json").read_text())["steps"] == 9
    assert steps(run) == list("012345678")
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step=6.ckpt", "step=6.ckpt.sha256", "step=9.ckpt", "step=9.ckpt.sha256", "last.ckpt"}
    assert files_below(run)["config.yaml"] == before["config.yaml"]


def test_a_run_brings_its_own_configuration(run: Path, command: Command) -> None:
    weights = (run / "encoder" / "model.safetensors").read_bytes()
    (run / "checkpoints" / "step=6.ckpt").unlink()
    outcome = command("pretrain", *RESUME)
    assert (outcome.status, outcome.err) == (0, "")
    assert "continuing from runs/x/checkpoints/step=3.ckpt" in outcome.out
    assert steps(run) == list("012345")
    assert (run / "encoder" / "model.safetensors").read_bytes() == weights


def test_a_run_that_is_not_there_is_started(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command(*SHORT, *RESUME, "--trainer.max_epochs=1")
    assert (outcome.status, outcome.err) == (0, "")
    assert "there is no run runs/x yet: starting it" in outcome.out
    assert steps(Path("runs/x")) == list("012")


def test_differences_are_found_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "a: {b: 1, c: [1, 2]}\nd: null\nknn: {batch_size: 3}\ndata: {num_workers: 1}\n"
    )
    now = {"a": {"b": 2, "c": [1, 2]}, "e": 5, "knn": {"batch_size": 4}, "data": {"num_workers": 2}}
    assert config_differences(tmp_path / "config.yaml", yaml.safe_dump(now)) == [("a.b", 1, 2), ("e", None, 5)]


@pytest.mark.parametrize(
    ("strategy", "rounds"),
    [
        ("auto", False),
        ("model_parallel", False),
        ("ddp_bf16", True),
        ({"class_path": "simclr_scale.pretraining.strategies.CompressedDDPStrategy", "init_args": {}}, True),
        ({"class_path": "pytorch_lightning.strategies.DDPStrategy"}, False),
    ],
)
def test_only_a_strategy_that_rounds_gradients_changes_the_result(strategy: object, rounds: bool) -> None:
    ddp = yaml.safe_dump({"trainer": {"strategy": "ddp"}})
    same = settings_of_result(ddp) == settings_of_result(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    assert same != rounds


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ("--resume auto --name x", "runs/x/config.yaml"),
        ("--name x --resume=auto --model.temperature 3", "runs/x/config.yaml"),
        ("--resume runs/x/checkpoints/last.ckpt", "runs/x/config.yaml"),
        ("--resume auto --name x --runs_dir elsewhere", None),
        ("--resume auto --name x --config quickstart", None),
        ("--resume auto --name x -c quickstart", None),
        ("--resume auto --name y", None),
        ("--resume auto", None),
        ("--resume", None),
        ("--name x", None),
    ],
)
def test_whose_configuration_is_read(arguments: str, config: str | None, run: Path) -> None:
    found = config_of_resumed_run(arguments.split())
    assert [Path(word).resolve() for word in found[1:]] == ([Path(config).resolve()] if config else [])
    assert found[:1] == (["--config"] if config else [])
    assert run.is_dir()


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def start(resume: str | None = "auto", name: str | None = "x") -> Namespace:
    return Namespace(runs_dir="runs", name=name, resume=resume)


def no_name() -> str:
    raise AssertionError("a run that is resumed has a name")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    os.unlink(path)  # last.ckpt may be the same file
    path.write_bytes(content)


def test_the_newest_checkpoint_that_is_whole(run: Path) -> None:
    checkpoints = run / "checkpoints"
    assert find_start(start(), no_name) == (run, checkpoints / "step=6.ckpt", True, [
        "continuing from runs/x/checkpoints/step=6.ckpt"
    ])  # fmt: skip
    damage(checkpoints / "step=6.ckpt")
    found = find_start(start(), no_name)
    assert found.checkpoint == checkpoints / "step=3.ckpt"
    assert found.notes[0] == "runs/x/checkpoints/step=6.ckpt is damaged (its checksum differs) and is passed over"
    os.truncate(checkpoints / "step=3.ckpt", 100)
    with pytest.raises(InputError, match=r"no checkpoint of run runs/x is intact; .*step=6\.ckpt is damaged"):
        find_start(start(), no_name)


def test_before_the_first_checkpoint_a_run_starts_again(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    found = find_start(start(), no_name)
    assert (found.checkpoint, found.resumes) == (None, True)
    assert found.notes == ["run runs/x has no checkpoint yet: starting from its beginning"]


def test_a_checkpoint_by_its_path_belongs_to_the_run_around_it(run: Path) -> None:
    path = run / "checkpoints" / "step=3.ckpt"
    found = find_start(start(str(path), None), no_name)
    assert (found.folder.resolve(), found.checkpoint, found.resumes) == (run.resolve(), path, True)


def test_a_spoilt_checkpoint_by_its_path(refusal: Refusal, run: Path) -> None:
    path = run / "checkpoints" / "step=3.ckpt"
    os.truncate(path, path.stat().st_size // 2)
    assert refusal(*SHORT, "--resume", path).startswith(f"{path} is truncated, or ")
    torch.save({"state_dict": {}}, path)
    assert refusal(*SHORT, "--resume", path).startswith(f"{path} was not written by simclr_scale")


def test_a_checkpoint_outside_of_a_run(refusal: Refusal, run: Path) -> None:
    Path("stray.ckpt").write_bytes((run / "checkpoints" / "last.ckpt").read_bytes())
    assert "is not a run, it has no config.yaml" in refusal(*SHORT, "--resume", "stray.ckpt")
