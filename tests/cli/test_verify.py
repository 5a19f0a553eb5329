"""The command verify: processes of its own, those of a launcher, and a broken gather's exit status."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from simclr_scale.scaling.verify import launching
from tests.cli.commands import CHECKOUT, Outcome, start_command


@pytest.mark.slow
def test_two_new_processes(tmp_path: Path) -> None:
    outcome = start_command("verify", "--ranks", 2, "--output", "v.json", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith("2 ranks, gloo, ")
    assert outcome.out.count(" pass ") == 9
    verdict = json.loads((tmp_path / "v.json").read_text())
    assert verdict["passed"] is True
    assert len(verdict["checks"]) == 9


@pytest.mark.slow
def test_a_broken_gather_ends_with_status_1_on_every_rank(tmp_path: Path) -> None:
    """As torchrun starts them, with the loss replaced in each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "x",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CHECKOUT),
        "BREAKAGE": "without_gradient",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.scaling.breakage"],
            cwd=tmp_path,
            env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert said[0][0].count("FAIL") == 3
    assert said[0][1].startswith("simclr-scale verify: error: 3 of 9 checks failed: gradient of the ranks")
    assert said[1][0] == ""


def test_a_rank_that_dies_is_named(monkeypatch: pytest.MonkeyPatch, command: Callable[..., Outcome]) -> None:
    # Not importable where it starts, so that the process ends before it answers.
    monkeypatch.setattr(launching, "_run_rank", os._exit)
    outcome = command("verify")
    assert outcome.status == 1
    assert "ended without an answer" in outcome.err


MISTAKES = [
    ("--ranks 1", "--ranks must be at least 2, got 1: one process has nobody to agree with"),
    ("--ranks two", "ranks: expected int; got two"),
    ("--timeout 0", "--timeout must be above 0 seconds, got 0.0"),
    ("--rank 2", "there is no option rank; did you mean ranks?"),
    ("--output old.json", "old.json exists already"),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES)
def test_mistakes(options: str, line: str, refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("mine")
    assert line in refusal("verify", *options.split())


def test_under_a_launcher(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "GROUP_RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert refusal("verify", "--ranks", 2).startswith("--ranks is for one machine without a launcher")
    assert refusal("verify") == "verify needs 2 processes at least, and the launcher started 1"
