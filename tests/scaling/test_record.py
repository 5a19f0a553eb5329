"""What a run records of its speed."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from simclr_scale.scaling.energy import EnergyMeter
from simclr_scale.scaling.hardware import device_name, memory_of, peak_memory
from simclr_scale.scaling.runs import read_runs
from tests.pretraining.runs import QUIET, arguments, pretrain

pytestmark = QUIET


def scaling(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())["scaling"]


class Clock:
    """Time that passes only when a step says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Steps(pl.Callback):
    """Each step takes as long as its list says; what lies between epochs takes very long."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self.clock, self.seconds = clock, list(seconds)

    def on_train_batch_start(self, *args: Any) -> None:
        self.clock.now += self.seconds.pop(0)

    def on_train_epoch_end(self, *args: Any) -> None:
        self.clock.now += 5000.0


def test_times_of_all_steps_but_the_first_and_nothing_between_epochs(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [99.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 30.0]
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    pretrain(arguments(images, tmp_path, "x", "--trainer.max_epochs", "2"), Steps(clock, seconds))
    record, timed = scaling(tmp_path / "x"), np.array(seconds[1:])
    assert record["steps_timed"] == 9
    steps = record["step_seconds"]
    assert steps == pytest.approx({"mean": timed.mean(), "median": 5.0, "p95": np.quantile(timed, 0.95)})
    assert record["images_per_second"] == pytest.approx(8 / timed.mean())
    assert record["views_per_second"] == pytest.approx(16 / timed.mean())
    assert record["images_per_second_per_device"] == record["images_per_second"]
    assert record["data_wait"] == 0


def test_a_run_states_where_it_ran_and_is_a_run_for_the_report(images: Path, tmp_path: Path) -> None:
    pretrain(arguments(images, tmp_path, "x", "--trainer.max_epochs", "1"))
    record = scaling(tmp_path / "x")
    facts = {"devices": 1, "nodes": 1, "precision": "32-true", "encoder": "simclr_resnet_tiny", "image_size": 16}
    facts |= {"global_batch_size": 8, "chunk_size": None, "joules": None, "joules_per_image": None}
    assert record.items() >= facts.items()
    assert record["sent_bytes_per_step"] == 0
    assert record["peak_memory_of"] == "the process"
    assert 50e6 < record["peak_memory_bytes"] <= peak_memory(torch.device("cpu"))
    [run] = read_runs(str(tmp_path / "x"))
    assert run.images_per_second == pytest.approx(record["images_per_second"])
    assert (run.devices, run.batch, run.steps, run.train_images) == (1, 8, 5, 42)


def test_one_step_is_no_measurement(images: Path, tmp_path: Path) -> None:
    pretrain(arguments(images, tmp_path, "x", "--trainer.max_steps", "1", "--model.warmup_epochs", "0"))
    record = scaling(tmp_path / "x")
    assert record["steps_timed"] == 0
    assert record["images_per_second"] is None
    with pytest.raises(ValueError, match="no step of this run was timed"):
        read_runs(str(tmp_path / "x"))


def fake_nvml(counters: list[float] | None) -> Any:
    """NVIDIA's library with one GPU: its counter in mJ gives these values in turn; None: the driver refuses."""

    class NVMLError(Exception):
        pass

    def consumption(handle: str) -> float:
        assert handle == "handle of GPU-1234"
        if not counters:
            raise NVMLError
        return counters.pop(0)

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda identity: f"handle of {identity}",
        nvmlDeviceGetTotalEnergyConsumption=consumption,
    )


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return torch.device("cuda", 0)


def test_energy_by_the_gpus_own_counter(one_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([1.0, 5000.0, 8500.0]))
    meter = EnergyMeter(one_gpu)
    assert meter.joules() == 5.0
    assert meter.joules() == 8.5
    assert meter.joules() is None  # the driver refuses now
    assert meter.joules() is None


@pytest.mark.parametrize("library", [None, fake_nvml(None)])
def test_no_energy_without_a_library_or_a_counter(
    library: Any, one_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert EnergyMeter(one_gpu).joules() is None
    assert EnergyMeter(torch.device("cpu")).joules() is None


def test_the_energy_of_a_run_is_that_of_its_steps(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Meter:
        # Read at the start of training and of each epoch, and after its last step; 100 J pass between epochs.
        readings = iter([0.0, 10.0, 50.0, 150.0, 190.0])

        def __init__(self, device: torch.device) -> None:
            pass

        def joules(self) -> float:
            return next(self.readings)

    monkeypatch.setattr("simclr_scale.scaling.record.EnergyMeter", Meter)
    monkeypatch.setattr("simclr_scale.scaling.record._ENERGY_EVERY_SECONDS", 1e9)
    pretrain(arguments(images, tmp_path, "x", "--trainer.max_epochs", "2"))
    record = scaling(tmp_path / "x")
    assert record["joules"] == 80
    assert record["joules_per_image"] == pytest.approx(80 / (10 * 8))


def test_the_machine() -> None:
    cpu = torch.device("cpu")
    assert len(device_name(cpu)) > 2
    assert 2**28 < memory_of(cpu) < 2**50
