"""The command export."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simclr_scale.bundle import load_encoder
from tests.cli.commands import Outcome, TrainedRun, files_below

Command = Callable[..., Outcome]


def test_a_run_for_torch_export(trained: TrainedRun, command: Command, tmp_path: Path) -> None:
    before, output = files_below(trained.folder), tmp_path / "encoder.pt2"
    what = ("export", "--encoder", trained.folder, "--format", "torch-export", "--output", output)
    outcome = command(*what)
    assert outcome.status == 0, outcome.err
    assert f'torch.export.load("{output}")' in outcome.out
    encoder, transform = load_encoder(trained.folder)
    images = torch.rand(5, *transform.config["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(output).module()(images), encoder(images), rtol=1e-4, atol=1e-5)
    again = command(*what)
    assert (again.status, "exists already" in again.err) == (2, True)
    assert files_below(trained.folder) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "tflite"), "tflite"),
        (("--format", "torchvision"), "torchvision cannot hold 'simclr_resnet_tiny'"),
        (("--format", "onnx", "--encoder", "nothing"), "there is no encoder"),
        (("--format", "timm", "--output", "no/out"), "there is no folder no"),
        (("--format", "torch-export"), "name it out.pt2"),
        ((), "format"),
    ],
)
def test_mistakes_are_one_line(refusal: Callable[..., str], options: tuple[str, ...], says: str) -> None:
    assert says in refusal("export", "--encoder", "random:simclr_resnet_tiny", "--output", "out", *options)
