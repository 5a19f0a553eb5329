"""Running the evaluations of a scorecard: all checked before the first, each kept as soon as it is done."""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from simclr_scale.bundle import ImageTransform
from simclr_scale.data.sources import Source
from simclr_scale.distributed import world
from simclr_scale.errors import InputError
from simclr_scale.evaluation.augmented_images import check_crops
from simclr_scale.evaluation.few_labels import check_choice
from simclr_scale.evaluation.finetune import Choices, evaluate_finetune
from simclr_scale.evaluation.manifest import Manifest, encoder_fingerprint, library_versions, write_json
from simclr_scale.evaluation.outcome import Outcome
from simclr_scale.evaluation.pairs import Chosen, LabelledPair
from simclr_scale.evaluation.scorecard import Contestant, Evaluated, Task
from simclr_scale.evaluation.tasks import evaluate_knn, evaluate_linear


@dataclass(frozen=True)
class Entrant:
    """An encoder, with the images as it takes them."""

    spec: str
    encoder: nn.Module
    transform: ImageTransform
    train: Source
    test: Source

    @cached_property
    def fingerprint(self) -> str:
        """Of the encoder. Once for all tasks: it reads every weight."""
        return encoder_fingerprint(self.encoder)

    @cached_property
    def images(self) -> tuple[str, str]:
        """Fingerprints of both parts."""
        return self.train.fingerprint(), self.test.fingerprint()

    def contestant(self) -> Contestant:
        return Contestant(
            spec=self.spec,
            fingerprint=self.fingerprint,
            parameters=sum(parameter.numel() for parameter in self.encoder.parameters()),
            num_features=int(getattr(self.encoder, "num_features", 0)),
        )


@dataclass(frozen=True)
class Protocol:
    """What all evaluations of a scorecard have in common."""

    k: int = 200
    """Neighbours that vote; with few labels as many as there are, at most."""
    temperature: float = 0.07
    seeds: int | None = None
    """Draws of few labels; None: 5 of k-shot, else 1."""
    seed: int = 0
    """Of the first draw, and of the parts that choices are made on."""
    finetune_epochs: int | None = None
    """None: those of SimCLR's protocol, by the share of the labels."""
    finetune_learning_rate: float | None = None
    """Base rate, times batch / 256. None: SimCLR's."""
    finetune_batch_size: int | None = None
    """None: 256, or the labelled images where they are fewer."""
    allow_missing_classes: bool = False


@dataclass(frozen=True)
class Work:
    """How the work is done, which changes no digit but by `batch_size` and `device`."""

    batch_size: int = 256
    num_workers: int = 0
    device: torch.device | str | None = None
    cache: str | os.PathLike[str] | None = None


def doable(
    entrants: Sequence[Entrant], tasks: Sequence[Task], protocol: Protocol, *, skip: bool = False
) -> tuple[list[Task], dict[str, str]]:
    """The tasks that the labels of the images allow, and with `skip` the others, each with the reason.

    No image is read.

    Raises:
        InputError: no task is left; or without `skip`, one cannot be done.
    """
    left: list[Task] = []
    skipped: dict[str, str] = {}
    for task in dict.fromkeys(tasks):
        try:
            for entrant in entrants:
                _check(entrant, task, protocol)
        except InputError as error:
            if not skip:
                raise InputError(f"{task}: {error}") from error
            skipped[str(task)] = str(error)
        else:
            left.append(task)
    if not left:
        raise InputError(next(iter(skipped.values()), "tasks: none given"))
    return left, skipped


def evaluate(entrant: Entrant, task: Task, protocol: Protocol, work: Work, folder: Path) -> Evaluated:
    """One evaluation; found in `folder` where it was made before of the same encoder, images, settings and versions.

    On several ranks every one must call this; rank 0 reads and writes.

    Raises:
        InputError: as `evaluate_knn`, `evaluate_linear` and `evaluate_finetune` do.
    """
    kept = _Kept(folder / f"{task.kind}-{_key(entrant, task, protocol, work)}")
    found = _told_by_first(kept.read)
    if found is not None:
        return found
    manifest = _EVALUATIONS[task.kind](entrant, task, protocol, work)
    assert manifest.outcome is not None  # these evaluations hand out their answers
    if world().rank == 0:
        kept.write(manifest, manifest.outcome)
    # As it is read back, so that a scorecard does not depend on what was made when.
    return Evaluated(json.loads(json.dumps(manifest.as_dict())), manifest.outcome)


def _check(entrant: Entrant, task: Task, protocol: Protocol) -> None:
    chosen = Chosen.of(entrant.train, task.labels, _seeds(task, protocol), protocol.seed, "all")
    pair = LabelledPair.of(entrant.train, entrant.test, chosen.union(), protocol.allow_missing_classes)
    if task.kind == "knn" and task.budget.is_all and protocol.k > len(pair.train_indices):
        raise InputError(
            f"k: {protocol.k}, wanted at most {len(pair.train_indices)}, the labelled training images of "
            f"{entrant.train.name}"
        )
    if task.kind == "finetune":
        check_crops(entrant.transform)
        Choices(
            epochs=protocol.finetune_epochs,
            learning_rate=protocol.finetune_learning_rate,
            batch_size=protocol.finetune_batch_size,
        ).settled()
    if task.kind == "linear":
        check_choice(chosen.selections, entrant.train.labels, "l2")


def _seeds(task: Task, protocol: Protocol) -> int | None:
    return protocol.seeds if task.budget.is_drawn else None


def _common(entrant: Entrant, task: Task, protocol: Protocol, work: Work) -> dict[str, Any]:
    return {
        "labels": task.labels,
        "seeds": _seeds(task, protocol),
        "seed": protocol.seed,
        "allow_missing_classes": protocol.allow_missing_classes,
        "batch_size": work.batch_size,
        "num_workers": work.num_workers,
        "device": work.device,
        "cache": work.cache,
        "spec": entrant.spec,
    }


def _knn(entrant: Entrant, task: Task, protocol: Protocol, work: Work) -> Manifest:
    k = protocol.k
    if not task.budget.is_all:
        chosen = Chosen.of(entrant.train, task.labels, _seeds(task, protocol), protocol.seed, "")
        k = min(k, *(len(selection.indices) for selection in chosen.selections))
    return evaluate_knn(
        entrant.encoder,
        entrant.transform,
        entrant.train,
        entrant.test,
        k=k,
        temperature=protocol.temperature,
        **_common(entrant, task, protocol, work),
    )


def _linear(entrant: Entrant, task: Task, protocol: Protocol, work: Work) -> Manifest:
    return evaluate_linear(
        entrant.encoder, entrant.transform, entrant.train, entrant.test, **_common(entrant, task, protocol, work)
    )


def _finetune(entrant: Entrant, task: Task, protocol: Protocol, work: Work) -> Manifest:
    settings = _common(entrant, task, protocol, work)
    del settings["cache"]  # there are no features to keep of a network that changes
    return evaluate_finetune(
        entrant.encoder,
        entrant.transform,
        entrant.train,
        entrant.test,
        epochs=protocol.finetune_epochs,
        learning_rate=protocol.finetune_learning_rate,
        finetune_batch_size=protocol.finetune_batch_size,
        **settings,
    )


_EVALUATIONS: Mapping[str, Callable[[Entrant, Task, Protocol, Work], Manifest]] = {
    "knn": _knn,
    "linear": _linear,
    "finetune": _finetune,
}


def _key(entrant: Entrant, task: Task, protocol: Protocol, work: Work) -> str:
    """sha256, shortened, of all that the result depends on."""
    facts = {
        "task": [task.kind, task.labels, task.budget.is_all],
        # What another kind of task alone looks at is no reason to make this one again.
        "protocol": {name: value for name, value in vars(protocol).items() if _counts_for(name, task.kind)},
        "encoder": [entrant.spec, entrant.fingerprint, repr(entrant.transform)],
        "images": list(entrant.images),
        "work": [work.batch_size, str(work.device)],
        "versions": library_versions(),
    }
    if task.budget.file is not None:
        facts["list"] = hashlib.sha256(Path(task.budget.file).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _counts_for(setting: str, kind: str) -> bool:
    if setting in ("k", "temperature"):
        return kind == "knn"
    return kind == "finetune" or not setting.startswith("finetune_")


class _Kept:
    """An evaluation on disk: its manifest (JSON), written last, and its answers (NumPy's npz)."""

    def __init__(self, stem: Path) -> None:
        self._manifest = stem.with_suffix(".json")
        self._answers = stem.with_suffix(".npz")

    def read(self) -> Evaluated | None:
        if not self._manifest.is_file():
            return None
        try:
            record = json.loads(self._manifest.read_text(encoding="utf-8"))
            with self._answers.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                answers = tuple(arrays["answers"])
                return Evaluated(record, Outcome(arrays["indices"], arrays["targets"], answers))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{self._manifest} or its .npz cannot be read ({error}): delete both") from error

    def write(self, manifest: Manifest, outcome: Outcome) -> None:
        draft = self._answers.with_name(f".{self._answers.name}.{os.getpid()}")
        with draft.open("wb") as file:
            np.savez_compressed(
                file, indices=outcome.indices, targets=outcome.targets, answers=np.stack(outcome.answers)
            )
        os.replace(draft, self._answers)
        write_json(manifest.as_dict(), self._manifest)


def _told_by_first(read: Callable[[], Evaluated | None]) -> Evaluated | None:
    """What rank 0 reads, on every rank: they must agree on what is still to be done."""
    ranks = world()
    if ranks.size == 1:
        return read()
    told: list[Any] = [None]
    if ranks.rank == 0:
        try:
            told = [read()]
        except InputError as error:
            told = [error]
    torch.distributed.broadcast_object_list(told)
    if isinstance(told[0], InputError):
        raise told[0]
    return told[0]
