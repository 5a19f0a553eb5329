"""The study behind a search: every candidate once, whatever processes come and go."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from simclr_scale.errors import InputError
from simclr_scale.scaling.search.report import SearchReport
from simclr_scale.scaling.search.space import SearchSpace
from simclr_scale.scaling.search.study import SearchStudy, open_folder

SPACE = SearchSpace.of(["simclr_resnet_tiny", "resnet10t"], [0.5, 1], ["128x2", "64x2"])


def study(folder: Path, trials: int = 100, pruner: str = "none") -> SearchStudy:
    folder.mkdir(exist_ok=True)
    return SearchStudy(folder, SPACE, trials=trials, seed=0, pruner=pruner, score_every=1)


def run_all(of: SearchStudy) -> list[str]:
    labels = []
    while (claim := of.claim()) is not None:
        labels.append(claim.candidate.label)
        of.finish(claim, 0.1 * len(labels), {"params": 10 * len(labels), "knn": 0.1 * len(labels)})
    return labels


def test_all_candidates_once(tmp_path: Path) -> None:
    labels = run_all(study(tmp_path))
    assert sorted(labels) == sorted(candidate.label for candidate in SPACE.candidates())
    assert study(tmp_path).claim() is None


def test_some_of_them_and_then_more(tmp_path: Path) -> None:
    some = run_all(study(tmp_path, trials=3))
    assert len(set(some)) == len(some) == 3
    more = run_all(study(tmp_path, trials=5))
    assert len(set(some + more)) == 5
    report = SearchReport.of(study(tmp_path), "knn")
    assert [row.score for row in report.rows] == pytest.approx([0.3, 0.2, 0.2, 0.1, 0.1])
    assert report.best is not None
    assert report.best.label == some[2]


def test_what_fails_by_itself_is_not_tried_again(tmp_path: Path) -> None:
    first = study(tmp_path)
    claim = first.claim()
    assert claim is not None
    first.fail(claim, "no memory")
    assert claim.candidate.label not in run_all(study(tmp_path))
    row = next(row for row in SearchReport.of(study(tmp_path), "knn").rows if row.label == claim.candidate.label)
    assert (row.outcome, row.facts["reason"], row.attempts) == ("failed", "no memory", 1)


def _claim_and_wait(folder: Path, connection: Connection) -> None:
    claim = study(folder).claim()
    assert claim is not None
    claim.trial.report(0.25, 2)
    connection.send((claim.candidate.label, claim.trial.number))
    connection.recv()


def _process(folder: Path) -> tuple[multiprocessing.Process, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_claim_and_wait, args=(folder, there))
    process.start()
    return process, here  # type: ignore[return-value]


@pytest.mark.slow
def test_trials_of_other_processes_are_left_to_them_until_they_are_killed(tmp_path: Path) -> None:
    study(tmp_path)
    process, connection = _process(tmp_path)
    try:
        theirs, number = connection.recv()
        mine = study(tmp_path).claim()
        assert mine is not None
        assert mine.candidate.label != theirs
        states = {trial.number: trial.state.name for trial in study(tmp_path).study.get_trials()}
        assert states == {number: "RUNNING", mine.trial.number: "RUNNING"}
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.join()
    # Its candidate comes first, and goes on with the scores that it had.
    again = study(tmp_path).claim()
    assert again is not None
    assert again.candidate.label == theirs
    trials = {trial.number: trial for trial in study(tmp_path).study.get_trials()}
    assert trials[number].state.name == "FAIL"
    assert trials[again.trial.number].intermediate_values == {2: 0.25}
    assert trials[mine.trial.number].state.name == "RUNNING"
    assert study(tmp_path).attempts(theirs) == 2


def test_a_candidate_that_kills_its_process_is_given_up(tmp_path: Path) -> None:
    labels = []
    for _ in range(4):
        claim = study(tmp_path).claim()
        assert claim is not None
        labels.append(claim.candidate.label)
        claim.lock.release()  # as the end of its process does
    assert labels[0] == labels[1] == labels[2] != labels[3]


def test_the_median_prunes(tmp_path: Path) -> None:
    of = study(tmp_path, pruner="median")
    for _ in range(4):
        claim = of.claim()
        assert claim is not None
        claim.trial.report(0.5, 1)
        assert not claim.trial.should_prune()
        of.finish(claim, 0.5, {})
    claim = of.claim()
    assert claim is not None
    claim.trial.report(0.2, 1)
    assert claim.trial.should_prune()
    of.prune(claim)
    row = next(row for row in SearchReport.of(of, "knn").rows if row.outcome == "pruned")
    assert (row.score, row.epoch, row.label) == (0.2, 1, claim.candidate.label)


def test_folders(tmp_path: Path) -> None:
    settings = {"space": SPACE.as_json(), "seed": 0}
    assert open_folder(tmp_path / "one", settings) is False
    assert open_folder(tmp_path / "one", settings) is True
    with pytest.raises(InputError, match=r"one is a search with another seed \(0, not 1\); give another --folder"):
        open_folder(tmp_path / "one", settings | {"seed": 1})
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="two is not empty and no search"):
        open_folder(tmp_path / "two", settings)
