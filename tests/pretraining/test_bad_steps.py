"""NaN and infinity, put into a real step: nothing of the model changes, on any rank, and too many end the run."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from simclr_scale.errors import InputError, RunFailed
from simclr_scale.losses import NTXentLoss
from simclr_scale.models import create_encoder
from simclr_scale.pretraining import SimCLR
from simclr_scale.pretraining.agreement import Agreement
from simclr_scale.pretraining.bad_steps import BAD_STEPS, BadSteps
from simclr_scale.pretraining.replay import replay_batch
from tests.pretraining.runs import (
    CLASSES,
    QUIET,
    KillAt,
    Killed,
    Pairs,
    arguments,
    assert_same_run,
    differences,
    fit,
    pretrain,
)
from tests.pretraining.test_ranks import Pool

pytestmark = QUIET


class BadInput(pl.Callback):
    """Makes one pixel NaN at some steps; keeps what the batches were before."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.batches: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, *args: Any) -> None:
        if trainer.global_step in self.steps:
            self.batches[trainer.global_step] = {key: value.clone() for key, value in batch.items()}
            batch["inputs"][1, 0, 3, 2] = torch.nan


class Watch(pl.Callback):
    """All that training carries from a step to the next, before each step and after the last one."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        optimizer = trainer.optimizers[0].state_dict()
        self.rates.append(optimizer["param_groups"][0]["lr"])
        state = [pl_module.state_dict(), optimizer["state"], pl_module.probe.optimizer.state_dict()["state"]]
        self.states.append(torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, state))

    on_train_end = on_train_batch_start


class LossAt(nn.Module):
    """NT-Xent whose value or gradient is not finite, or large, at one call."""

    def __init__(self, bad: int, how: str) -> None:
        super().__init__()
        self.bad, self.how, self.calls, self.loss = bad, how, 0, NTXentLoss(0.5)

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        if self.calls - 1 != self.bad:
            return self.loss(z)
        if self.how == "loss":
            return self.loss(z) + torch.inf
        factor = 1e15 if self.how == "steep" else torch.inf
        z.register_hook(lambda gradient: gradient * factor)
        return self.loss(z)


class Labelled(Pairs):
    """As the data module gives them: dicts of whole batches."""

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"inputs": self.views[:, rows].flatten(0, 1), "label": self.labels[rows], "index": torch.tensor(rows)}


def loader(rows: Any = range(24), share: int = 8) -> DataLoader[Any]:
    class Part(Subset[Any]):
        def __getitems__(self, indices: list[int]) -> Any:
            return self.dataset.__getitems__([self.indices[index] for index in indices])

    return DataLoader(Part(Labelled(), rows), batch_size=share, collate_fn=lambda batch: batch)


def model(**options: Any) -> SimCLR:
    torch.manual_seed(0)
    encoder = create_encoder("simclr_resnet_tiny", channels=(2, 3, 4))
    return SimCLR(encoder, probe_classes=CLASSES, **{"warmup_epochs": 1, "learning_rate": 0.1, **options})


OPTIMIZERS: dict[str, Any] = {
    "LARS": None,
    "AdamW": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
    "SGD": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
}


@pytest.mark.parametrize("how", ["input", "loss", "gradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_changes_nothing_but_the_schedule(tmp_path: Path, optimizer: str, how: str) -> None:
    """The fourth of six steps, so that there is momentum and there are running statistics to spoil."""
    watch = Watch()
    loss = {} if how == "input" else {"loss": LossAt(3, how)}
    bad = [BadInput(3)] if how == "input" else []
    trainer = fit(
        model(optimizer=OPTIMIZERS[optimizer], **loss),
        *(*bad, watch, Agreement(), BadSteps(folder=tmp_path)),
        data=loader(),
        max_epochs=2,
    )
    assert differences(watch.states[3], watch.states[4]) == []
    for step in (0, 1, 2, 4, 5):
        assert differences(watch.states[step], watch.states[step + 1]) != [], "every other step is one"
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert trainer.global_step == 6
    # (step + 1) / 3 of the warm-up has another learning rate at every step: the bad one's is used up.
    assert len(set(watch.rates[:4])) == 4
    assert watch.rates[4] != watch.rates[3]

    [record] = [json.loads(line) for line in (tmp_path / BAD_STEPS).read_text().splitlines()]
    assert (record["epoch"], record["step"], record["batch"]) == (1, 3, 0)
    assert record["indices"] == list(range(8))
    assert record["learning_rate"] == watch.rates[3]
    encoder_and_head = [value for key, value in watch.states[3][0].items() if "running" not in key]
    names = {key for key, _ in trainer.model.named_parameters() if not key.startswith("probe")}
    weights = [value for key, value in watch.states[3][0].items() if key in names]
    assert len(weights) < len(encoder_and_head)
    squares = sum(float(np.square(value.double().numpy()).sum()) for value in weights)
    assert record["weight_norm"] == pytest.approx(squares**0.5, rel=1e-5)
    assert record["scale"] is None
    if how == "loss":
        assert record["loss"] == "inf"
    else:
        assert record["gradient_norm"] in ("nan", "inf")
        assert record["not_finite_count"] >= len(record["not_finite"]) > 0
        assert set(record["not_finite"]) <= names
    assert record["loss"] == "nan" if how == "input" else True


def test_without_it_the_weights_are_lost() -> None:
    trainer = fit(model(), BadInput(3), data=loader(), max_epochs=2)
    assert not all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_resumed_as_the_unbroken_run(images: Path, tmp_path: Path) -> None:
    """One bad step before the checkpoint that a run resumes from, one between it and the end, one after it."""

    def command(name: str) -> list[str]:
        return [*arguments(images, tmp_path, name, "--trainer.max_epochs", "3"), "--checkpoint.every_n_steps", "4"]

    pretrain(command("unbroken"), BadInput(3, 9, 12))
    with pytest.raises(Killed):
        pretrain(command("broken"), BadInput(3, 9, 12), KillAt(11))
    with open(tmp_path / "broken" / BAD_STEPS, "a") as file:
        file.write('{"epoch": 2, "st')
    pretrain([*command("broken"), "--resume", "auto"], BadInput(3, 9, 12))
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")
    texts = [(tmp_path / name / BAD_STEPS).read_text() for name in ("unbroken", "broken")]
    assert texts[0] == texts[1]
    assert [json.loads(line)["step"] for line in texts[0].splitlines()] == [3, 9, 12]
    assert json.loads((tmp_path / "broken" / "summary.json").read_text())["bad_steps"] == 3
    with open(tmp_path / "broken" / "metrics.csv", newline="") as file:
        counts = {int(row["step"]): row["bad_steps"] for row in csv.DictReader(file)}
    assert (counts[1], counts[3], counts[9], counts[13]) == ("", "1.0", "2.0", "3.0")


@pytest.mark.parametrize("in_memory", ["true", "false"])
def test_too_many_in_a_row_end_the_run_and_can_be_replayed(images: Path, tmp_path: Path, in_memory: str) -> None:
    options = ("--max_bad_steps", "3", "--data.in_memory", in_memory, "--data.num_workers", "0")
    bad = BadInput(1, 2, 6, 7, 8)
    with pytest.raises(RunFailed, match=r"^3 steps in a row were not finite, the last one step 8 with loss nan and "):
        pretrain(arguments(images, tmp_path, "x", "--trainer.max_epochs", "3", *options), bad)
    run = tmp_path / "x"
    records = [json.loads(line) for line in (run / BAD_STEPS).read_text().splitlines()]
    assert [(record["epoch"], record["step"], record["batch"]) for record in records] == [
        *((0, 1, 1), (0, 2, 2)),
        *((1, 6, 1), (1, 7, 2), (1, 8, 3)),
    ]
    for record in records:
        seen, again = bad.batches[record["step"]], replay_batch(run, record["step"])
        assert record["indices"] == seen["index"].tolist()
        assert differences(seen, again) == []
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())
    with pytest.raises(InputError, match=r"has no step 5; it has 1, 2, 6, 7, 8$"):
        replay_batch(run, 5)
    with pytest.raises(InputError, match="is not a run"):
        replay_batch(tmp_path, 5)


@pytest.mark.parametrize("value", [0, -1])
def test_argument_out_of_range(value: int) -> None:
    with pytest.raises(InputError, match=f"max_bad_steps must be at least 1, got {value}"):
        BadSteps(value)


def bad_on_the_second_rank(rank: int, world_size: int, folder: str) -> tuple[list[bool], list[Any], str]:
    """Which steps changed anything, the records, and how it ended. Two epochs of three steps, two of them bad."""
    module, watch, bad = model(), Watch(), BadSteps(2, Path(folder))
    rows = [row for first in (0, 8, 16) for row in range(first + 4 * rank, first + 4 * rank + 4)]
    damage = [BadInput(1, 4, 5)] if rank == 1 else []
    strategy = DDPStrategy(cluster_environment=Pool(rank, world_size), process_group_backend="gloo")
    options = {"devices": world_size, "strategy": strategy, "use_distributed_sampler": False, "max_epochs": 2}
    end = "done"
    try:
        fit(module, *damage, watch, Agreement(), bad, data=loader(rows, 4), **options)
    except RunFailed as error:
        end = str(error)
    changed = [bool(differences(a, b)) for a, b in zip(watch.states, watch.states[1:], strict=False)]
    records = [json.loads(line) for line in (Path(folder) / BAD_STEPS).read_text().splitlines()] if rank == 0 else []
    return changed, records, end


def test_ranks_agree(gloo, tmp_path: Path) -> None:
    results = gloo(2, bad_on_the_second_rank, str(tmp_path))
    assert [changed for changed, *_ in results] == [[True, False, True, True, False]] * 2
    assert all(end.startswith("2 steps in a row were not finite, the last one step 5") for *_, end in results)
    records = results[0][1]
    assert [record["indices"] for record in records] == [list(range(first, first + 8)) for first in (8, 8, 16)]


@pytest.mark.parametrize(
    ("scale", "how", "skipped", "counted"),
    [
        (2.0**100, "steep", True, 0),
        (2.0**10, "steep", False, 0),
        (1.0, "gradient", True, 1),
        (2.0**10, "loss", True, 1),
    ],
)
def test_a_gradient_scaler_finds_its_scale(scale: float, how: str, skipped: bool, counted: int) -> None:
    """Overflows of a scaled gradient are its way; at a scale of 1, and of the loss itself, it cannot help."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    watch, bad, module = Watch(), BadSteps(), model(loss=LossAt(1, how), warmup_epochs=0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    # In float32, so that the scale alone is what overflows.
    plugin.forward_context = lambda: torch.autocast("cpu", enabled=False)
    fit(module, watch, Agreement(), bad, data=loader(), max_steps=2, max_epochs=-1, plugins=[plugin])
    assert (differences(watch.states[1], watch.states[2]) == []) == skipped
    assert (bad.total, bad.in_a_row) == (counted, counted)
    assert (scaler.get_scale() < scale) == (how != "loss" and skipped)
