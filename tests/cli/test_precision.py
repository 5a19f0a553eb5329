from pathlib import Path

import pytest
import torch
import yaml

from simclr_scale.cli.precision import Trainer, fastest_precision
from simclr_scale.cli.pretrain import PretrainCLI


def pretend(monkeypatch: pytest.MonkeyPatch, *, cpu: bool, gpu: bool | None = None) -> None:
    """Whether the CPU and a GPU (None: there is no GPU) compute in bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    # Older GPUs run bfloat16 in software, which torch counts unless told otherwise.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or gpu)


@pytest.mark.parametrize(
    ("accelerator", "cpu", "gpu", "precision"),
    [
        ("cpu", True, None, "bf16-mixed"),
        ("cpu", False, None, "32-true"),
        ("cpu", False, True, "32-true"),
        ("auto", False, True, "bf16-mixed"),
        ("auto", True, False, "32-true"),
        ("auto", True, None, "bf16-mixed"),
        ("gpu", False, True, "bf16-mixed"),
        ("cuda", True, False, "32-true"),
        ("mps", True, None, "32-true"),
    ],
)
def test_bfloat16_where_the_device_computes_in_it(
    accelerator: str, cpu: bool, gpu: bool | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, cpu=cpu, gpu=gpu)
    assert fastest_precision(accelerator) == precision


@pytest.mark.parametrize(("bfloat16", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_run_keeps_the_precision_that_it_began_with(
    bfloat16: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, cpu=bfloat16)
    cli = PretrainCLI(["--config", "quickstart"])
    assert cli.trainer.precision == precision
    assert yaml.safe_load(cli.saved_config())["trainer"]["precision"] == precision
    given = PretrainCLI(["--config", "quickstart", "--trainer.precision", "64-true"])
    assert given.trainer.precision == "64-true"


def test_the_trainer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cpu=True)
    assert Trainer(precision="auto", accelerator="cpu", logger=False).precision == "bf16-mixed"
    assert Trainer(accelerator="cpu", logger=False).precision == "32-true"
