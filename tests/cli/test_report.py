"""The command report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import Outcome, TrainedRun

Command = Callable[..., Outcome]
TABLE = "name,devices,batch,seconds_per_step\none,1,64,1.0\ntwo,2,64,0.6\nfour,4,64,0.4\n"


def test_runs_side_by_side(trained: TrainedRun, command: Command, tmp_path: Path) -> None:
    other = tmp_path / "faster"
    shutil.copytree(trained.folder, other, symlinks=True)
    summary = json.loads((other / "summary.json").read_text())
    summary["scaling"]["devices"] = 2
    for key in summary["scaling"]["step_seconds"]:
        summary["scaling"]["step_seconds"][key] /= 1.6
    (other / "summary.json").write_text(json.dumps(summary))
    outcome = command("report", trained.folder, other, "--output", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    assert (outcome.status, outcome.err) == (0, "")
    assert "80.0%" in outcome.out
    assert "strong scaling, global batch 16: efficiency 80.0% from 1 to 2 devices" in outcome.out
    report = json.loads((tmp_path / "r.json").read_text())
    assert [run["strong_efficiency"] for run in report["runs"]] == pytest.approx([1, 0.8])
    assert report["series"][0]["serial_fraction"] == pytest.approx(0.25, rel=1e-5)
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_the_table_that_ships(command: Command) -> None:
    outcome = command("report", "imagenet_large_batch")
    assert outcome.status == 0
    rows = [line for line in outcome.out.splitlines() if " et al." in line]
    assert len(rows) == 8
    assert "1,638,400" in rows[-1]
    assert "800.0" in rows[-1]


def test_a_table_of_stated_runs(command: Command, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TABLE)
    outcome = command("report", tmp_path / "t.csv", "--mode", "strong")
    assert outcome.status == 0
    assert "serial fraction (Amdahl) 20.00% +- " in outcome.out
    assert "more than 5 times as fast as one" in outcome.out


MISTAKES = [
    ("", "the following arguments are required: runs"),
    ("nowhere", "there is no run or table 'nowhere'; tables that ship are imagenet_large_batch"),
    ("t.csv --epochs 0", "--epochs must be above 0, got 0.0"),
    ("t.csv --mode linear", "mode: expected one of 'auto', 'strong', 'weak'; got linear"),
    ("t.csv --mode weak", "--mode weak needs two runs of one batch a device"),
    ("t.csv --output old.json", "old.json exists already"),
    ("t.csv --plot old.json", "old.json exists already"),
    ("t.csv --plot new.doc", "--plot new.doc: the name of a picture ends in .png"),
    ("t.csv --output no/r.json", "no/r.json: there is no folder no"),
    ("t.csv --plots x.png", "there is no option plots; did you mean plot?"),
    ("bad.csv", "bad.csv, run 1: there is no column 'gpus'"),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES)
def test_mistakes(options: str, line: str, refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TABLE)
    (tmp_path / "bad.csv").write_text("name,gpus\na,1\n")
    (tmp_path / "old.json").write_text("mine")
    assert line in refusal("report", *options.split())
