"""Studies: cells that are kept and resumed, and what is concluded from them."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr_scale.errors import InputError, RunFailed
from simclr_scale.scaling.studies.cells import Cell, CellRunner, StudyFolder, run_cells
from simclr_scale.scaling.studies.critical import Criterion, compare_branches, fit_hyperbola, smoothed, steps_to
from simclr_scale.scaling.studies.lr_rules import compare_rules, rate_of, sweep_cells
from simclr_scale.scaling.studies.plots import draw_branches, draw_rules
from tests.cli.commands import CHECKOUT

SETTINGS = {"model.temperature": 0.5, "images": [1, 2]}


class Recorder(CellRunner):
    """Writes down which cells it runs; waits, ends its process or fails where told to."""

    def __init__(self, log: Path, seconds: float = 0.0, fatal: int = -1, wrong: int = -1) -> None:
        self.log, self.seconds, self.fatal, self.wrong = log, seconds, fatal, wrong

    def run(self, cell: Cell) -> dict[str, Any]:
        with open(self.log, "a") as file:
            file.write(f"{cell.name}\n")
        time.sleep(self.seconds)
        if cell.seed == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.seed == self.wrong:
            raise InputError("nonsense")
        return {"value": cell.seed}


class Slow(Recorder):
    """The cell that is wrong takes longer than every other."""

    def run(self, cell: Cell) -> dict[str, Any]:
        time.sleep(2.0 if cell.seed == self.wrong else 0.0)
        return super().run(cell)


def cells(count: int) -> list[Cell]:
    return [Cell(16, 16, 0.1, seed, "sqrt") for seed in range(count)]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_finished_cell_is_never_run_again(workers: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    make = partial(Recorder, log)
    study = StudyFolder(tmp_path / "study", SETTINGS)
    with study.taken():
        told: list[int] = []
        results = run_cells(cells(3), study, make, workers=workers, done=told.append)
    assert [r["value"] for r in results] == [0, 1, 2]
    assert told == [0, 1, 2, 3]
    # later, with more seeds
    again = StudyFolder(tmp_path / "study", SETTINGS)
    with again.taken():
        assert len(run_cells(cells(5), again, make, workers=workers)) == 5
    assert sorted(log.read_text().split()) == sorted(cell.name for cell in cells(5))


@pytest.mark.slow
def test_a_worker_that_fails_keeps_what_is_done(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "study", SETTINGS)
    with study.taken():
        with pytest.raises(RunFailed, match=r"trained .*seed=2 was ended \(exit status -9\)"):
            run_cells(cells(6), study, partial(Recorder, tmp_path / "log", 0.05, fatal=2), workers=2)
        with pytest.raises(InputError, match="nonsense"):
            # a cell that the first pass cannot have finished before it noticed the loss
            run_cells(cells(7), study, partial(Recorder, tmp_path / "log", 0.05, wrong=6), workers=2)
        # Whoever came to the third cell had ended another before.
        assert any(study.result(cell) is not None for cell in cells(7))
        assert study.result(cells(7)[6]) is None


@pytest.mark.slow
def test_a_mistake_in_the_last_cell_ends_the_study(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "study", SETTINGS)
    with study.taken(), pytest.raises(InputError, match="nonsense"):
        # the one worker that is still busy is the one that fails
        run_cells(cells(2), study, partial(Slow, tmp_path / "log", wrong=1), workers=2)


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
from tests.scaling.test_studies import SETTINGS, Recorder, cells
from simclr_scale.scaling.studies.cells import StudyFolder, run_cells
if __name__ == "__main__":
    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    study = StudyFolder(folder / "study", SETTINGS)
    with study.taken():
        run_cells(cells(6), study, partial(Recorder, folder / "log", 0.4), workers=workers)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_and_start_again(workers: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    process = subprocess.Popen(command, env=environment)
    kept = tmp_path / "study" / "cells"
    deadline = time.monotonic() + 120
    while len(list(kept.glob("[!.]*.json"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    with (
        pytest.raises(InputError, match="is being run by another process"),
        StudyFolder(tmp_path / "study", SETTINGS).taken(),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {file.name for file in kept.glob("[!.]*.json")}
    assert 2 <= len(done) < 6
    # Workers end with the process that started them, so nobody runs or writes any more.
    time.sleep(1.0)
    assert {file.name for file in kept.glob("[!.]*.json")} == done
    started = (tmp_path / "log").read_text().split()
    assert subprocess.run(command, env=environment).returncode == 0
    assert len(list(kept.glob("[!.]*.json"))) == 6
    later = (tmp_path / "log").read_text().split()[len(started) :]
    assert not {f"{name}.json" for name in later} & done
    assert sorted(f"{name}.json" for name in later) == sorted({f"{c.name}.json" for c in cells(6)} - done)


def test_folders_that_are_no_such_study(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "study", SETTINGS)
    with study.taken():
        pass
    with pytest.raises(InputError, match=r"started with model.temperature = 0.5, not 0.2; name another folder"):
        StudyFolder(tmp_path / "study", SETTINGS | {"model.temperature": 0.2})
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="exists already and is no study"):
        StudyFolder(tmp_path / "other", SETTINGS)
    with pytest.raises(InputError, match="there is no folder"):
        StudyFolder(tmp_path / "no" / "study", SETTINGS)
    study.file(cells(1)[0]).write_text("{")
    with pytest.raises(InputError, match="is damaged; delete it"):
        study.result(cells(1)[0])


def test_rules_meet_at_the_reference() -> None:
    assert rate_of("linear", 256, 4096, 4.8) == pytest.approx(0.3)
    assert rate_of("sqrt", 256, 4096, 4.8) == pytest.approx(0.075 * 16)
    assert rate_of("sqrt", 4096, 4096, 4.8) == rate_of("linear", 4096, 4096, 4.8) == 4.8
    made = sweep_cells([64, 128], ["linear", "sqrt"], range(2), (128, 1.0), 32)
    assert [(c.batch, c.seed, c.rate, c.negatives) for c in made[:3]] == [
        (64, 0, 0.5, 32),
        (64, 0, pytest.approx(0.5**0.5), 32),
        (128, 0, 1.0, 32),
    ]


def outcome(batch: int, rule: str, seed: int, value: float | None) -> dict[str, Any]:
    facts = {"batch": batch, "negatives": batch, "rate": 0.1, "steps": 5, "diverged": value is None}
    return facts | {"rule": rule, "seed": seed, "linear_top1": value}


def test_rules_are_compared_seed_by_seed(tmp_path: Path) -> None:
    results = []
    for seed, base in enumerate((0.3, 0.5, 0.4)):
        results += [outcome(32, "linear", seed, base), outcome(32, "sqrt", seed, base + 0.05 + 0.001 * seed)]
        results += [outcome(64, "linear", seed, base), outcome(64, "sqrt", seed, base + (0.1, -0.1, 0)[seed])]
    results += [outcome(128, "linear", 0, None), outcome(128, "sqrt", 0, 0.4)]
    small, large, alone = rows = compare_rules(results)
    # the spread over seeds is far larger than the difference, which is the same for each
    assert small["better"] == "sqrt"
    mean, std = 0.051, 0.001
    half = 4.302653 * std / 3**0.5
    assert small["sqrt_less_linear"]["low"] == pytest.approx(mean - half, rel=1e-5)
    assert small["sqrt_less_linear"]["high"] == pytest.approx(mean + half, rel=1e-5)
    assert large["better"] is None
    assert alone["linear"]["diverged"] == 1
    assert alone["linear"]["linear_top1"] is None
    assert alone["sqrt_less_linear"] is None
    draw_rules(rows, "linear_top1", "linear top-1", tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="no training of this study is done"):
        compare_rules([])


def test_a_hyperbola_is_recovered_within_its_interval() -> None:
    rng = np.random.default_rng(0)
    batches = np.repeat([16.0, 32, 64, 128, 256, 512, 1024], 2)
    held = 0
    for _ in range(100):
        steps = (40 + 40 * 200 / batches) * np.exp(0.05 * rng.normal(size=len(batches)))
        fit = fit_hyperbola(batches.tolist(), steps.tolist())
        assert fit.interval is not None
        held += fit.interval[0] <= 200 <= fit.interval[1]
    assert 0.88 <= held / 100 <= 1
    exact = fit_hyperbola(batches.tolist(), (40 + 8000 / batches).tolist())
    assert exact.least_steps == pytest.approx(40, rel=1e-5)
    assert exact.critical_batch == pytest.approx(200, rel=1e-5)
    steps = exact.steps(batches)
    assert (steps / exact.least_steps - 1) * (batches * steps / exact.least_images - 1) == pytest.approx(1, rel=1e-6)
    with pytest.raises(InputError, match="needs three batch sizes"):
        fit_hyperbola([16, 32], [10, 8])


def curve(batch: int, images: int = 4096) -> list[dict[str, float]]:
    """Loss that falls with steps / (1 + 100 / batch), so that the hyperbola holds with a critical batch of 100."""
    return [
        {"step": step, "images": step * batch, "loss": 4 * float(np.exp(-step / (20 * (1 + 100 / batch))))}
        for step in range(images // batch + 1)
    ]


def test_branches_give_the_critical_batch_behind_them(tmp_path: Path) -> None:
    results = [
        {"batch": batch, "negatives": m, "rate": 0.1, "seed": seed, "diverged": False, "linear_top1": 0.4}
        | {"curve": curve(batch)}
        for m in (16, 32)
        for batch in (32, 64, 128, 256)
        for seed in (0, 1)
    ]
    results.append(results[0] | {"batch": 512, "diverged": True, "linear_top1": None, "curve": curve(512)[:1]})
    tasks = compare_branches(results, Criterion())
    assert [task["negatives"] for task in tasks] == [16, 32]
    assert tasks[0]["hyperbola"]["critical_batch"] == pytest.approx(100, rel=0.02)
    assert tasks[0]["largest_without_loss"] == 32  # at once slower, in this toy
    assert tasks[0]["rows"][-1]["diverged"] == 1
    assert tasks[0]["rows"][-1]["steps_to_target"] is None
    assert tasks[0]["rows"][0]["negatives_per_view"] == 30
    assert compare_branches(results, Criterion(tolerance=10.0))[0]["largest_without_loss"] == 256
    unreached = compare_branches(results, Criterion(target=-1.0))[0]
    assert unreached["hyperbola"] is None
    assert unreached["why_no_hyperbola"] == "no branch reaches the target"
    draw_branches(tasks, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 10_000
    json.dumps(tasks, allow_nan=False)


def test_steps_between_two_points() -> None:
    points = [{"step": s, "images": s, "loss": 10.0 - s} for s in range(0, 9, 2)]
    assert smoothed(points)[1].tolist() == [10, 8, 6, 4, 2]
    assert steps_to(points, 5.0) == pytest.approx(5)
    assert steps_to(points, 10.0) == 0
    assert steps_to(points, 1.0) is None
