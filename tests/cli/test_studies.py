"""The commands that train many short runs: lr-sweep and critical-batch."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from simclr_scale.cli import critical_batch
from simclr_scale.cli.lr_sweep import SweepCLI
from tests.cli.commands import CHECKOUT, Outcome, TrainedRun
from tests.pretraining.runs import QUIET

Command = Callable[..., Outcome]
SWEEP = (
    *("lr-sweep", "--config=quickstart", "--output=study", "--seeds=2", "--batch_sizes=8,16"),
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--data.subset=64", "--data.image_size=16"),
    *("--train_images=40", "--test_images=40", "--model.warmup_epochs=0", "--reference_batch=16"),
    *("--reference_rate=0.01", "--model.encoder.channels=[4,4,6]"),
)
BRANCH = (
    *("critical-batch", "--output=study", "--batch_sizes=8,16,32", "--negatives=8,16", "--images=64", "--seeds=1"),
    *("--evaluate_every=16", "--held_out=32", "--fixed_negatives=16", "--train_images=40", "--test_images=40"),
)


def cells_of(study: Path) -> dict[str, Any]:
    return {file.name: json.loads(file.read_text()) for file in (study / "cells").glob("*.json")}


@pytest.mark.slow
def test_a_sweep_is_run_once_and_may_grow(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = command(*SWEEP)
    assert first.status == 0, first.err
    kept = cells_of(Path("study"))
    assert len(kept) == 8
    by_setting = {(c["batch"], c["rule"], c["seed"]): c for c in kept.values()}
    assert by_setting[8, "linear", 0]["rate"] == pytest.approx(0.005)
    assert by_setting[8, "sqrt", 0]["rate"] == pytest.approx(0.01 / 2**0.5)
    assert all(c["steps"] == 2 and 0 < c["linear_top1"] < 1 for c in kept.values())
    # where both rules agree so do their trainings
    assert by_setting[16, "linear", 1]["linear_top1"] == by_setting[16, "sqrt", 1]["linear_top1"]
    assert by_setting[16, "linear", 0]["linear_top1"] != by_setting[16, "linear", 1]["linear_top1"]
    results = json.loads(Path("study/results.json").read_text())
    assert [row["batch"] for row in results["rows"]] == [8, 16]
    assert results["rows"][1]["sqrt_less_linear"]["mean"] == 0
    assert Path("study/lr_rules.png").stat().st_size > 10_000
    times = {file: file.stat().st_mtime_ns for file in Path("study/cells").iterdir()}
    grown = command(*SWEEP, "--seeds=3", "--workers=2")
    assert grown.status == 0, grown.err
    assert "8 of 12 trainings done" in grown.err
    assert all(file.stat().st_mtime_ns == then for file, then in times.items())
    assert len(cells_of(Path("study"))) == 12
    other = command(*SWEEP, "--model.temperature=0.3")
    assert other.status == 2
    assert "study study was started with model.temperature = 0.15, not 0.3" in other.err


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "simclr_scale", *SWEEP, "--workers=2"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(line, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 300
    while len(cells_of(tmp_path / "study")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "study" / "cells").glob("[!.]*.json")}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(cells_of(tmp_path / "study")) == 8
    for name, then in before.items():
        assert (tmp_path / "study" / "cells" / name).stat().st_mtime_ns == then


def test_a_checkpoint_is_branched(
    trained: TrainedRun, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = trained.folder / "checkpoints" / "step=3.ckpt"
    outcome = command(*BRANCH, "--checkpoint", checkpoint)
    assert outcome.status == 0, outcome.err
    kept = cells_of(Path("study")).values()
    # groups of 16 images leave no batch of 8
    assert sorted((c["batch"], c["negatives"]) for c in kept) == [(8, 8), (16, 8), (16, 16), (32, 8), (32, 16)]
    starts = {c["curve"][0]["loss"] for c in kept}
    assert len(starts) == 1  # one checkpoint, one task
    for cell in kept:
        assert cell["images"] == 64
        assert [point["images"] for point in cell["curve"]] == list(range(0, 65, max(16, cell["batch"])))
        assert cell["rate"] == pytest.approx(
            next(c for c in kept if c["batch"] == 16)["rate"] * (cell["batch"] / 16) ** 0.5
        )
    tasks = json.loads(Path("study/results.json").read_text())["tasks"]
    assert [task["negatives"] for task in tasks] == [8, 16]
    assert {row["negatives_per_view"] for row in tasks[1]["rows"]} == {30}
    assert Path("study/critical_batch.png").stat().st_size > 10_000
    assert "study/results.json" in command(*BRANCH, "--checkpoint", checkpoint, "--workers", 2).out


@QUIET
def test_a_branch_goes_on_as_the_run_would(trained: TrainedRun, tmp_path: Path) -> None:
    """The first step from the checkpoint is Adam's with the moments of the run, at the rate asked for."""
    import torch

    from simclr_scale.scaling.studies.branches import BranchFrom
    from simclr_scale.scaling.studies.training import CellTraining

    checkpoint = trained.folder / "checkpoints" / "step=3.ckpt"
    arguments = critical_batch._parser().parse_args([*BRANCH[1:], "--checkpoint", str(checkpoint)])
    branching = critical_batch.Branching(arguments)
    branching.open_data()
    cell = next(cell for cell in branching.cells() if (cell.batch, cell.negatives) == (16, 16))
    training = CellTraining(branching.cli.datamodule, branching.build, {"accelerator": "cpu"})
    model, facts = training.train(cell, BranchFrom(branching.optimizer_state, cell.rate), max_steps=1, max_epochs=-1)
    assert facts["steps"] == 1

    reference = branching.build(cell)
    data = branching.cli.datamodule.varied(seed=cell.seed, global_batch_size=16)
    (keys, *_) = iter(data._sampler)
    views = data.batch_of(0, 0, [key.image for key in keys])["inputs"]
    saved = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]
    optimizer = torch.optim.AdamW([{"params": []}])
    from simclr_scale.optim import param_groups

    groups = param_groups(torch.nn.ModuleDict({"encoder": reference.encoder, "head": reference.head}), 1e-4)
    optimizer = torch.optim.AdamW(groups, lr=cell.rate)
    optimizer.load_state_dict(saved)
    for group in optimizer.param_groups:
        group["lr"] = cell.rate
    reference.train()
    reference.loss(reference.head(reference(views))).backward()
    optimizer.step()
    for (name, mine), theirs in zip(model.encoder.named_parameters(), reference.encoder.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


SWEEP_MISTAKES = [
    ("--batch_sizes=many", "--batch_sizes many: wanted whole numbers, such as 64 or 64,256,1024"),
    ("--batch_sizes=1,8", "--batch_sizes: a batch needs 2 images at least, got 1"),
    ("--batch_sizes=8,99", "--batch_sizes: 99 is larger than the training set of 64 images"),
    ("--rules=cubic", "--rules: there is no rule 'cubic'; there are linear, sqrt"),
    ("--negatives=6", "--batch_sizes: 8 does not divide into groups of 6 images (--negatives)"),
    ("--seeds=0", "--seeds must be at least 1, got 0"),
    ("--workers=0", "--workers must be at least 1, got 0"),
    ("--reference_rate=0", "--reference_rate must be above 0, got 0.0"),
    ("--trainer.devices=2", "trainer.devices: each training of a study has one device"),
    ("--output=taken", "taken exists already and is no study: it has no study.yaml"),
    ("--output=no/study", "no/study: there is no folder no"),
    ("--config=lr_rules", "there is no configuration file or recipe 'lr_rules'"),
    ("--model.temprature=1", "there is no option model.temprature; did you mean model.temperature?"),
]


@pytest.mark.parametrize(("options", "line"), SWEEP_MISTAKES)
def test_mistakes_in_a_sweep(options: str, line: str, refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    assert line in refusal(*SWEEP, options)


def test_what_a_sweep_needs(refusal: Callable[..., str]) -> None:
    without = [part for part in SWEEP if not part.startswith("--output")]
    assert refusal(*without).startswith("give --output: the folder of the study")
    without = [part for part in SWEEP if not part.startswith("--batch_sizes")]
    assert refusal(*without) == "give --batch_sizes, such as 64,256,1024"


BRANCH_MISTAKES = [
    ("", "give --checkpoint"),
    ("--checkpoint no.ckpt", "--checkpoint no.ckpt: there is no such checkpoint"),
    ("--checkpoint C --batch_sizes 8,12 --negatives 8", "12 does not divide into groups of 8 images (--negatives)"),
    ("--checkpoint C --batch_sizes 8,16 --negatives 16", "groups of 16 images leave 1 of the batch sizes"),
    ("--checkpoint C --batch_sizes 8,16,80000", "80000 is larger than the training set of"),
    ("--checkpoint C --negatives 1", "--negatives: 2 images at least have negatives, got 1"),
    ("--checkpoint C --rule cubic", "--rule: there is no rule 'cubic'; there are linear, sqrt"),
    ("--checkpoint C --rate 0", "--rate must be above 0, got 0.0"),
    ("--checkpoint C --images 0", "--images must be at least 1, got 0"),
    ("--checkpoint C --held_out 8", "--held_out 8 is less than a group of --fixed_negatives images"),
    ("--checkpoint C --output taken", "taken exists already and is no study"),
]


@pytest.mark.parametrize(("options", "line"), BRANCH_MISTAKES)
def test_mistakes_in_branching(options: str, line: str, run: Path, refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    assert line in refusal(*BRANCH, *options.replace("C", str(run / "checkpoints" / "step=3.ckpt"), 1).split())


def test_a_rate_that_has_come_down_to_0(run: Path, refusal: Callable[..., str]) -> None:
    import torch

    checkpoint = run / "checkpoints" / "step=3.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    for group in content["optimizer_states"][0]["param_groups"]:
        group["lr"] = 0.0
    torch.save(content, checkpoint)
    assert "the learning rate had come down to 0 there" in refusal(*BRANCH, "--checkpoint", checkpoint)


STUDIES = sorted((CHECKOUT / "configs" / "studies").glob("*.yaml"))


def test_studies_come_in_two_sizes() -> None:
    assert [path.stem for path in STUDIES] == [
        f"{study}_{size}" for study in ("critical_batch", "lr_rules") for size in ("full", "tiny")
    ]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_is_read_as_it_is_written(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load(path.read_text())
    if path.stem.startswith("critical"):
        read = critical_batch._parser().parse_args(["--config", path.stem, "--checkpoint=x", "--output=y"])
        critical_batch._check(read)
        assert all(read[key] == value for key, value in written.items())
        return
    here = ("--trainer.accelerator=cpu", "--trainer.precision=32-true")
    cli = SweepCLI(["--config", path.stem, "--data.source=textures", "--output=y", *here])
    assert len(cli.cells()) == len(cli.batches) * 2 * written["seeds"]
    assert cli.config.model.temperature == written["model"]["temperature"]
    assert cli.config.trainer.max_epochs == written["trainer"]["max_epochs"]
