"""The processes of a search: each claims one trial after the other and trains it."""

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

from simclr_scale.cli.evaluate import EvaluationData, run_linear
from simclr_scale.cli.pretrain import PretrainCLI, quieten, train
from simclr_scale.errors import InputError, Preempted, RunFailed
from simclr_scale.pretraining.run_folder import CONFIG
from simclr_scale.pretraining.run_lock import RunLock
from simclr_scale.scaling.search.report import linear_manifest
from simclr_scale.scaling.search.score import Pruned, TrialScore, knn_top1, rank_of
from simclr_scale.scaling.search.space import Candidate, SearchSpace
from simclr_scale.scaling.search.study import Claim, SearchStudy

_EVALUATION_KEYS = (
    "source",
    "root",
    "train_split",
    "test_split",
    "image_key",
    "label_key",
    "channel_axis",
    "patch_size",
    "num_workers",
)


@dataclass(frozen=True)
class SearchWork:
    """All that a worker needs.

    Attributes:
        folder: of the search.
        settings: those that the folder keeps.
        trials: candidates to try.
        validate_labels: of the linear evaluations.
    """

    folder: str
    settings: Mapping[str, Any]
    trials: int
    validate_labels: str

    def space(self) -> SearchSpace:
        space = self.settings["space"]
        return SearchSpace.of([*space["encoders"].values()], space["widths"], space["heads"])

    def study(self) -> SearchStudy:
        settings = {key: self.settings[key] for key in ("seed", "pruner", "score_every")}
        return SearchStudy(Path(self.folder), self.space(), trials=self.trials, **settings)


def run_workers(work: SearchWork, workers: int, validate: bool) -> None:
    """Runs trials, then evaluations, until none is left, in this process or in several.

    Raises:
        RunFailed: a process ended otherwise than by having nothing left to do.
    """
    work.study()  # one process makes the database, before several open it
    if workers == 1:
        _work_on(work, validate)
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run_worker, args=(work, validate, number)) for number in range(workers)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
    statuses = [process.exitcode for process in processes]
    if any(statuses):
        raise RunFailed(
            f"workers ended with status {', '.join(map(str, statuses))}; the same command goes on with what is left"
        )


def _run_worker(work: SearchWork, validate: bool, number: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Small trials side by side: a thread each, unless the user says otherwise; and a GPU each, where there are several.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if (gpus := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]
    try:
        _work_on(work, validate)
    except InputError as error:
        print(f"simclr-scale search: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Preempted as error:
        print(f"simclr-scale search: {error}", file=sys.stderr)
        sys.exit(143)


def _end_with_parent() -> None:
    """Nobody would wait for what a worker finds after its search was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work_on(work: SearchWork, validate: bool) -> None:
    quieten()
    study = work.study()
    while (claim := study.claim()) is not None:
        _run_trial(work, study, claim)
    if validate:
        for label, trial in study.latest().items():
            if trial.state.name == "COMPLETE":
                _validate(work, label)


def _run_trial(work: SearchWork, study: SearchStudy, claim: Claim) -> None:
    candidate, say = claim.candidate, _Teller(claim)
    score = TrialScore(work.settings["score"], work.settings["score_every"], say.report)
    try:
        with _log_of(work, candidate.label):
            facts = _train(work, candidate, score)
    except Pruned:
        study.prune(claim)
        say.line("pruned")
        return
    except Preempted:
        # With its checkpoint: the next start goes on with it.
        claim.lock.release()
        raise
    except (InputError, RuntimeError) as error:
        # Of this candidate (torch raises RuntimeError where memory does not suffice): others may well do.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        study.fail(claim, reason)
        say.line(f"failed: {reason}")
        return
    assert score.last is not None
    study.finish(claim, score.last, facts)
    say.line(f"{score.kind} {score.last:.4g}")


class _Teller:
    """Notes the scores of a trial in the study and, at its end, a line for the user."""

    def __init__(self, claim: Claim) -> None:
        self.claim, self.out = claim, sys.stdout
        self.line("begins")

    def line(self, text: str) -> None:
        print(f"trial {self.claim.trial.number} {self.claim.candidate.label}: {text}", file=self.out, flush=True)

    def report(self, epoch: int, score: float) -> bool:
        trial = self.claim.trial
        # A trial that goes on from its checkpoint passes epochs again that it had reported before it was killed.
        if epoch not in trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values:
            trial.report(score, epoch)
        self.line(f"epoch {epoch}, {score:.4g}")
        return trial.should_prune()


def _train(work: SearchWork, candidate: Candidate, score: TrialScore) -> dict[str, Any]:
    """Trains a candidate from where its run stands; what there is to know of it beside the score."""
    folder = Path(work.folder)
    recipe = work.space().recipe_of(candidate, work.settings["recipe"])
    recipe["knn"] = {**(recipe.get("knn") or {}), "every_n_epochs": work.settings["score_every"]}
    recipe["trainer"] = {**(recipe.get("trainer") or {}), "devices": 1, "num_nodes": 1}
    file = folder / "configs" / f"{candidate.label}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    of_run = ["--runs_dir", str(folder / "runs"), "--name", candidate.label, "--resume", "auto"]
    facts = _FactsAtEnd()
    train(TrialCLI(["--config", str(file), *work.settings["options"], *of_run], [score, facts]))
    return facts.found


class TrialCLI(PretrainCLI):
    """`pretrain` with callbacks of a search."""

    program = "simclr-scale search"

    def __init__(self, argv: list[str], callbacks: list[pl.Callback]) -> None:
        self._further = callbacks
        super().__init__(argv)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        # Behind the checkpoint's: a trial that is ended early could go on.
        trainer.callbacks.extend(self._further)  # type: ignore[attr-defined]
        return trainer


class _FactsAtEnd(pl.Callback):
    """Size and scores of the trained encoder, for the table."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        parameters = sum(parameter.numel() for parameter in pl_module.encoder.parameters())
        self.found = {"params": parameters, "features": pl_module.encoder.num_features}
        self.found["rankme"] = rank_of(trainer, pl_module)
        if trainer.datamodule.test_source is not None:  # type: ignore[attr-defined]
            self.found["knn"] = knn_top1(trainer, pl_module)


def _validate(work: SearchWork, label: str) -> None:
    """A linear classifier on the encoder of a trial; its manifest stays in the search's folder."""
    folder = Path(work.folder)
    file = linear_manifest(folder, label)
    file.parent.mkdir(exist_ok=True)
    lock = RunLock(folder / "claims" / label)
    if not lock.acquire():
        return  # another worker is at it
    try:
        if file.exists():
            return
        run = folder / "runs" / label
        config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        data = {key: config["data"][key] for key in _EVALUATION_KEYS if config["data"].get(key) is not None}
        images = EvaluationData(**data, seed=config["seed_everything"])
        with _log_of(work, label):
            run_linear(str(run), images, labels=work.validate_labels, output=str(file))
    finally:
        lock.release()
    print(f"linear {label}: done", flush=True)


@contextmanager
def _log_of(work: SearchWork, label: str) -> Iterator[None]:
    """What a trial prints goes to a file of its own, an unforeseen error with its trace too."""
    file = Path(work.folder) / "logs" / f"{label}.txt"
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            yield
        except Pruned:
            raise
        except Exception:
            traceback.print_exc()
            raise
