"""What is shown while a run trains."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from rich.console import Console

from simclr_scale.models import create_encoder
from simclr_scale.pretraining import SimCLR, progress
from simclr_scale.pretraining.progress import RunProgress
from tests.pretraining.runs import QUIET, KillAt, Killed, fit

pytestmark = QUIET


def show(monkeypatch: pytest.MonkeyPatch, *callbacks: pl.Callback, terminal: bool, seconds_a_look: float) -> str:
    """The output of a run of 2 epochs with 3 steps, on a clock that moves on each time it is read."""
    looks = iter(range(10**6))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: seconds_a_look * next(looks)))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150, color_system=None)
    bar = RunProgress(console)
    model = SimCLR(create_encoder("simclr_resnet_tiny", channels=(2, 3, 4)), warmup_epochs=0)
    options: dict[str, Any] = {"enable_progress_bar": True, "log_every_n_steps": 1, "max_epochs": 2}
    try:
        fit(model, *callbacks, bar, **options)
    finally:
        assert bar._bar is None, "a bar left running hides the cursor"
    return console.file.getvalue()


def test_a_file_is_given_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = show(monkeypatch, terminal=False, seconds_a_look=16).splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("epoch 1/2  step 3/6  loss ")
    assert "accuracy 0." in lines[2]
    assert lines[2].endswith("images/s  0:00:48 left"), "3 steps of 16 seconds"
    assert lines[-1].endswith("0:00:00 left")


def test_a_file_is_not_flooded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert show(monkeypatch, terminal=False, seconds_a_look=0.6) == ""


def test_a_terminal_is_shown_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at the clock a step: 8 images in .6 seconds."""
    output = show(monkeypatch, terminal=True, seconds_a_look=0.6)
    assert "epoch 2/2" in output
    assert "13 images/s  0:00:00 left" in output
    assert "step 3/6" not in output


def test_an_exception_closes_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        show(monkeypatch, KillAt(4), terminal=True, seconds_a_look=1)


def test_other_ranks_are_silent() -> None:
    console = Console(file=io.StringIO())
    bar = RunProgress(console)
    bar.disable()
    bar.say("hello")
    assert console.file.getvalue() == ""
    bar.enable()
    bar.print("hello", 2)
    assert console.file.getvalue() == "hello 2\n"
