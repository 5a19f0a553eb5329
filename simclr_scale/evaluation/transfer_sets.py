"""The data sets of a suite, opened and checked before any image is read."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from simclr_scale.data.pixels import channels_of
from simclr_scale.data.sources import Source, SubsetSource, open_source
from simclr_scale.data.sources.base import NotOnDisk, targets_of
from simclr_scale.data.sources.grey import PICTURE_CHANNELS
from simclr_scale.data.sources.joined import JoinedSource
from simclr_scale.data.sources.named_splits import NoSuchPart
from simclr_scale.data.sources.opening import open_parts
from simclr_scale.data.sources.packed import ALL
from simclr_scale.errors import InputError
from simclr_scale.evaluation.few_labels import LabelBudget
from simclr_scale.evaluation.multilabel import check_several_labels
from simclr_scale.evaluation.pairs import Chosen, LabelledPair
from simclr_scale.evaluation.suites import Suite, SuiteEntry


@dataclass(frozen=True)
class Task:
    """One set with one budget of labels."""

    labels: str
    chosen: Chosen | None
    """None where it cannot be evaluated."""
    skipped: str = ""
    """Why not."""


@dataclass(frozen=True)
class TransferSet:
    """One data set of a suite, and what is to be evaluated on it.

    Attributes:
        pair: the training images, those of the validation split at their end, and the test images; None where the set
            is not on disk.
        train_images: how many of the training images come before those of the validation split.
    """

    entry: SuiteEntry
    tasks: tuple[Task, ...]
    pair: LabelledPair | None = None
    train_images: int = 0

    @property
    def validation_rows(self) -> np.ndarray | None:
        """Which rows of the training features are of the validation split; None without one."""
        assert self.pair is not None
        rows = np.flatnonzero(self.pair.train_indices >= self.train_images)
        return rows if len(rows) else None


def open_suite(
    suite: Suite,
    *,
    root: str | os.PathLike[str] | None,
    labels: Sequence[str | float],
    seeds: int | None,
    seed: int,
    channels: int,
    arrays: bool,
    allow_missing_classes: bool,
) -> tuple[TransferSet, ...]:
    """The sets of a suite, those that are not on disk with the reason.

    Arguments as of `evaluate_transfer`; `channels` and `arrays` as of `open_source`. Raises InputError, naming the set,
    for anything that the user has to mend, and where no set is on disk.
    """
    budgets = [LabelBudget.parse(budget) for budget in labels]
    for budget in budgets:
        budget.seeds(seeds if budget.is_drawn else None, seed)
        if budget.file is not None:
            raise InputError(f"labels: {budget} lists images of one set; wanted fractions and k-shot, for all sets")
    if not budgets:
        raise InputError("labels: none given; wanted such as 1.0, 0.1 or 5-shot")
    opened = []
    for entry in suite.entries:
        try:
            opened.append(_open_set(entry, root, budgets, seeds, seed, channels, arrays, allow_missing_classes))
        except NotOnDisk as error:
            reason = f"not on disk: {error}"
            opened.append(TransferSet(entry, tuple(Task(str(budget), None, reason) for budget in budgets)))
        except InputError as error:
            raise InputError(f"{entry.name}: {error}") from error
    if all(one.pair is None for one in opened):
        raise InputError(f"{suite.name}: none of its {len(opened)} sets can be evaluated; {opened[0].tasks[0].skipped}")
    return tuple(opened)


def _open_set(
    entry: SuiteEntry,
    root: str | os.PathLike[str] | None,
    budgets: Sequence[LabelBudget],
    seeds: int | None,
    seed: int,
    channels: int,
    arrays: bool,
    allow_missing_classes: bool,
) -> TransferSet:
    place = os.path.join(os.fspath(root) if root is not None else "", entry.root or "")
    train, validation, test = _parts(entry, place, seed, channels, arrays)
    if channels_of(train) != channels:
        raise InputError(f"its images have {channels_of(train)} channels, and the encoder takes {channels}")
    has_targets = targets_of(train) is not None
    if has_targets:
        check_several_labels(entry.metric)
    tasks = []
    for budget in budgets:
        if has_targets and not budget.is_all:
            reason = f"labels {budget} are drawn class by class, and its images have several classes each"
            tasks.append(Task(str(budget), None, reason))
            continue
        # Of a budget of labels, those of a validation split would be no part.
        tasks.append(Task(str(budget), _choose(train, budget, seeds, seed)))
    joined = train if validation is None else JoinedSource([train, validation])
    needed = [task.chosen.union() for task in tasks if task.chosen is not None and not has_targets]
    drawn = [rows for rows in needed if rows is not None]
    indices = np.unique(np.concatenate(drawn)) if drawn and len(drawn) == len(needed) else None
    if not any(task.chosen for task in tasks):
        return TransferSet(entry, tuple(tasks))
    pair = LabelledPair.of(joined, test, indices, allow_missing_classes)
    return TransferSet(entry, tuple(tasks), pair, len(train))


def _choose(train: Source, budget: LabelBudget, seeds: int | None, seed: int) -> Chosen:
    if targets_of(train) is not None:
        return Chosen.all_of(train, seed)
    return Chosen.of(train, str(budget), seeds if budget.is_drawn else None, seed, "all")


def _parts(
    entry: SuiteEntry, root: str, seed: int, channels: int, arrays: bool
) -> tuple[Source, Source | None, Source]:
    names = {f"{part}_split": entry.splits.get(part) for part in ("train", "test")}
    arrays = arrays or channels not in PICTURE_CHANNELS
    if entry.shots is not None:
        parts = open_parts(entry.source, root=root or None, channels=channels, arrays=arrays, **names)
        if ALL in parts:
            return _shots_and_rest(parts[ALL], entry.shots, seed)
        return _shots_and_rest(parts["train"], entry.shots, seed)[0], None, parts["test"]

    def part(split: str, train_split: str | None) -> Source:
        return open_source(
            entry.source,
            root=root or None,
            split=split,  # type: ignore[arg-type]
            train_split=train_split,
            test_split=names["test_split"],
            seed=seed,
            channels=channels,
            arrays=arrays,
        )

    train, test = part("train", names["train_split"]), part("test", names["train_split"])
    if "val" in entry.splits:
        return train, part("train", entry.splits["val"]), test
    validation: Source | None = None
    with suppress(NoSuchPart):
        validation = part("val", names["train_split"])
    if validation is not None and not (validation.labels >= 0).any() and targets_of(validation) is None:
        validation = None
    return train, validation, test


def _shots_and_rest(source: Source, shots: int, seed: int) -> tuple[Source, None, Source]:
    chosen = LabelBudget(shots=shots).choose(source.labels, seed, source.classes)
    rest = np.setdiff1d(np.flatnonzero(source.labels >= 0), chosen)
    described = f"images of every class (seed {seed}) of {source.split_description}"
    return (
        SubsetSource(source, chosen, f"{shots} {described}"),
        None,
        SubsetSource(source, rest, f"all but {shots} {described}"),
    )
