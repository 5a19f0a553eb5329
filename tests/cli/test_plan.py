"""The command plan."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import Outcome, files_below

Command = Callable[..., Outcome]
QUICK = ("plan", "--config", "quickstart", "--data.global_batch_size", 16, "--measure_steps", 1)


def test_a_recipe_is_planned_and_nothing_else_happens(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command(*QUICK, "--output", "p.json")
    assert outcome.status == 0, outcome.err
    plan = json.loads((tmp_path / "p.json").read_text())
    assert list(files_below(tmp_path)) == ["p.json"]
    assert (plan["steps_an_epoch"], plan["steps"], plan["negatives"]) == (256, 3072, 30)
    assert plan["learning_rate"] == pytest.approx(0.005)
    assert plan["measured_images"] == 16
    for text in (
        "23,726 images/s on 128 TPU v3 cores, 185.4 a core",
        "32 of 32 views: all views at once",
        "3,072, 256",
    ):
        assert text in outcome.out


def test_devices_that_are_not_in_this_machine(command: Command, tmp_path: Path) -> None:
    what = (
        "plan",
        "--config",
        "imagenet_resnet50",
        "--data.source",
        "textures",
        "--data.image_size",
        32,
        "--model.encoder.init_args.width",
        0.25,
    )
    where = ("--devices", 4, "--num_nodes", 8, "--device_memory", 40, "--measure_steps", 0)
    outcome = command(
        *what, *where, "--model.encoder.init_args.name", "simclr_resnet18", "--output", tmp_path / "p.json"
    )
    assert outcome.status == 0, outcome.err
    plan = json.loads((tmp_path / "p.json").read_text())
    assert (plan["ranks"], plan["images_of_a_rank"], plan["device_bytes"]) == (32, 128, 40 * 2**30)
    assert plan["learning_rate"] == 4.8
    assert plan["seconds"] is None
    assert plan["sent_bytes_per_step"] > 2 * 31 / 32 * 4 * plan["parameters"]


MISTAKES = [
    (
        "--trainer.strategy model_parallel",
        "trainer.strategy model_parallel: plan does not model weights that are sharded",
    ),
    ("--devices 3", "data.global_batch_size 16 does not divide by the 3 ranks; use 15"),
    ("--trainer.devices 3", "data.global_batch_size 16 does not divide by the 3 ranks; use 15"),
    (
        "--devices 2 --model.loss NTXentLoss --model.loss.gather false",
        "model.loss has gather: false, so each row sees 14 negatives of its own rank and not the 30 of all 2",
    ),
    ("--model.learning_rate 4.8 --data.global_batch_size 64", "model.learning_rate comes to 1.2 at this batch"),
    ("--model.learning_rate null", "comes to 0.01875 at this batch (the default of LARS)"),
    ("--model.warmup_epochs 13", "warm-up must have at least 0 steps and at most the 3072 of training, got 3328"),
    ("--data.global_batch_size 5000", "is larger than the training set of 4096 images"),
    ("--trainer.accumulate_grad_batches 2", "would not add negatives"),
    ("--measure_steps=-1", "--measure_steps must be at least 0, got -1"),
    ("--devices 0", "--devices must be at least 1, got 0"),
    ("--device_memory 0", "--device_memory must be above 0 GiB, got 0.0"),
    ("--trainer.devices some", "trainer.devices some: plan takes a number of devices"),
    ("--output old.json", "old.json exists already"),
    ("--num_node 3", "there is no option num_node; did you mean num_nodes?"),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES)
def test_mistakes(options: str, line: str, refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("mine")
    assert line in refusal(*QUICK, *options.split())
