"""The study behind a search: an Optuna study in a folder, worked on by any number of processes.

Each candidate that is under way is claimed by a lock of the system, which is gone when its process is: a trial that the
study calls running and that nobody holds was interrupted. It counts as failed, and its candidate is tried again, from
the run's last checkpoint.
"""

import json
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simclr_scale.errors import InputError
from simclr_scale.evaluation.manifest import write_json
from simclr_scale.pretraining.run_lock import RunLock
from simclr_scale.scaling.search.space import Candidate, SearchSpace

try:
    import optuna
except ImportError:
    optuna = None  # type: ignore[assignment]

PRUNERS = ("median", "halving", "none")
_SETTINGS, _STUDY = "search.json", "study.db"
_MOST_ATTEMPTS = 3
_MOST_REPEATS = 5
_PATIENCE_SECONDS = 60
# Of the sampler and of the median: until then, chance chooses and nothing is pruned.
_UNPRUNED_TRIALS = 4


def require_optuna() -> None:
    """Raises InputError where the extra is not installed."""
    if optuna is None:
        raise InputError('search needs Optuna: pip install "simclr_scale[search]"')


@dataclass
class Claim:
    """A trial to be run by this process, and by no other."""

    trial: Any
    candidate: Candidate
    lock: RunLock


class SearchStudy:
    """A search in its folder.

    Args:
        folder: made by `create`, or by an earlier start.
        space: the candidates.
        trials: how many of them to try.
        seed: of the choice.
        pruner: "median", "halving" or "none".
        score_every: epochs between scores.
    """

    def __init__(
        self, folder: Path, space: SearchSpace, *, trials: int, seed: int, pruner: str, score_every: int
    ) -> None:
        require_optuna()
        self.folder, self.space, self.trials, self.seed = folder, space, trials, seed
        self.by_label = {candidate.label: candidate for candidate in space.candidates()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self._locked():
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{(folder / _STUDY).absolute()}",
                engine_kwargs={"connect_args": {"timeout": _PATIENCE_SECONDS}},
            )
            self.study = optuna.create_study(
                storage=storage,
                study_name="search",
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(seed=seed),
                pruner=_pruner(pruner, score_every),
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time: what it finds in the study is so until it has changed it."""
        lock = RunLock(self.folder)
        while not lock.acquire():
            time.sleep(0.02)
        try:
            yield
        finally:
            lock.release()

    def claim(self) -> Claim | None:
        """The next trial for this process; None where as many were tried as were asked for."""
        with self._locked():
            self._fail_interrupted()
            trial = self._ask()
            if trial is None:
                return None
            candidate = self.by_label[trial.user_attrs["label"]]
            lock = RunLock(self._claims(candidate.label))
            assert lock.acquire(), "only who holds the study's lock takes one"
            return Claim(trial, candidate, lock)

    def _claims(self, label: str) -> Path:
        folder = self.folder / "claims" / label
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _fail_interrupted(self) -> None:
        for trial in self._all():
            if trial.state.name != "RUNNING":
                continue
            label = trial.user_attrs.get("label")
            lock = RunLock(self._claims(label)) if label else None
            if lock is None or lock.acquire():
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                if lock is not None:
                    lock.release()

    def _ask(self) -> Any:
        by_label: dict[str, list[Any]] = {}
        for trial in self._all():
            if (label := trial.user_attrs.get("label")) is not None:
                by_label.setdefault(label, []).append(trial)
        for label, attempts in by_label.items():
            latest = attempts[-1]
            was_interrupted = latest.state.name == "FAIL" and "reason" not in latest.user_attrs
            if was_interrupted and len(attempts) < _MOST_ATTEMPTS:
                trial = self._enqueued(self.by_label[label])
                for step, value in sorted(latest.intermediate_values.items()):
                    trial.report(value, step)
                return trial
        untried = [candidate for label, candidate in self.by_label.items() if label not in by_label]
        if not untried or len(by_label) >= self.trials:
            return None
        if len(untried) > self.trials - len(by_label):
            for _ in range(_MOST_REPEATS):
                trial, candidate = self._suggested()
                if candidate.label not in by_label:
                    trial.set_user_attr("label", candidate.label)
                    return trial
                # No label: a proposal that was tried before is not a trial.
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return self._enqueued(random.Random(f"{self.seed} {len(by_label)}").choice(untried))

    def _suggested(self) -> tuple[Any, Candidate]:
        trial = self.study.ask()
        encoder = trial.suggest_categorical("encoder", list(self.space.encoders))
        head = trial.suggest_categorical("head", list(self.space.heads))
        widths = self.space.widths_of(encoder)
        width = None if widths == (None,) else trial.suggest_categorical("width", list(self.space.widths))
        return trial, Candidate(encoder, width, head)

    def _enqueued(self, candidate: Candidate) -> Any:
        self.study.enqueue_trial(candidate.params)
        trial, found = self._suggested()
        assert found == candidate, "the study's lock keeps others from what was enqueued"
        trial.set_user_attr("label", candidate.label)
        return trial

    def _all(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def latest(self) -> dict[str, Any]:
        """The last trial of each candidate that was tried, by label."""
        trials: dict[str, Any] = {}
        for trial in self._all():
            if (label := trial.user_attrs.get("label")) is not None:
                trials[label] = trial
        return trials

    def attempts(self, label: str) -> int:
        """How often a candidate was begun."""
        return sum(trial.user_attrs.get("label") == label for trial in self._all())

    def finish(self, claim: Claim, score: float, facts: Mapping[str, Any]) -> None:
        """The trial is complete."""
        for name, value in facts.items():
            claim.trial.set_user_attr(name, value)
        self.study.tell(claim.trial, score)
        claim.lock.release()

    def prune(self, claim: Claim) -> None:
        """The trial was ended early."""
        self.study.tell(claim.trial, state=optuna.trial.TrialState.PRUNED)
        claim.lock.release()

    def fail(self, claim: Claim, reason: str) -> None:
        """The trial cannot be run: it is not tried again."""
        claim.trial.set_user_attr("reason", reason)
        self.study.tell(claim.trial, state=optuna.trial.TrialState.FAIL)
        claim.lock.release()


def open_folder(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Makes the folder of a search, or finds it: then of the same settings. Says whether it was there.

    Raises:
        InputError: something else is there, or a search of other settings.
    """
    file = folder / _SETTINGS
    wanted = json.loads(json.dumps(settings))
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        for key in sorted({*before, *wanted}):
            if before.get(key) != wanted.get(key):
                raise InputError(
                    f"{folder} is a search with another {key} ({_short(before.get(key))}, not "
                    f"{_short(wanted.get(key))}); give another --folder"
                )
        return True
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and no search (it has no {_SETTINGS}); give another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(wanted, file)
    return False


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 90 else f"{text[:87]}..."


def _pruner(name: str, score_every: int) -> Any:
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED_TRIALS)
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=score_every, reduction_factor=2)
    return optuna.pruners.NopPruner()
