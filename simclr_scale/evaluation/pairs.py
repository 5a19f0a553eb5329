"""The labelled images of two sources, training and test, for evaluations with labels."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from simclr_scale.data.sources import Source
from simclr_scale.data.sources.base import targets_of
from simclr_scale.errors import InputError
from simclr_scale.evaluation.features import Transform
from simclr_scale.evaluation.few_labels import LabelBudget, LabelSelection, select_labels
from simclr_scale.evaluation.manifest import DatasetRecord, EncoderRecord, Manifest
from simclr_scale.evaluation.outcome import Outcome
from simclr_scale.evaluation.progress import show_progress
from simclr_scale.evaluation.shared_features import source_features


@dataclass(frozen=True)
class Chosen:
    """Which labels of the training images are used, once for each value of the manifest."""

    budget: LabelBudget
    selections: tuple[LabelSelection, ...]
    description: str

    @classmethod
    def of(cls, source: Source, labels: str | float, seeds: int | None, seed: int, description: str) -> "Chosen":
        """Raises InputError for a budget that is none, or that the labels of `source` do not meet."""
        budget = LabelBudget.parse(labels)
        draws = budget.seeds(seeds, seed)
        if not budget.is_all:
            labelled_images(source, "train")
        selections, selected = select_labels(source, budget, draws)
        return cls(budget, tuple(selections), description if budget.is_all else selected)

    @classmethod
    def all_of(cls, source: Source, seed: int) -> "Chosen":
        """Every image, for sources that have several labels an image."""
        return cls(LabelBudget(), (LabelSelection(np.arange(len(source)), seed),), "all")

    def union(self) -> np.ndarray | None:
        """The images whose features are needed, ascending; None for all that have a label."""
        if self.budget.is_all:
            return None
        return np.unique(np.concatenate([selection.indices for selection in self.selections]))


@dataclass(frozen=True)
class LabelledPair:
    """The labelled images of two sources, with labels that mean the same in both."""

    train_source: Source
    test_source: Source
    train_indices: np.ndarray
    test_indices: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray
    warnings: tuple[str, ...]
    train_unreadable: Mapping[int, str] = field(default_factory=dict)
    test_unreadable: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        train_source: Source,
        test_source: Source,
        train_indices: np.ndarray | None = None,
        allow_missing_classes: bool = False,
    ) -> "LabelledPair":
        """Of the training images only those at `train_indices`, where given, which have labels.

        Of several labels an image (`targets_of`), labels are the targets (N, C). Raises InputError where there is
        nothing to learn from or to be judged by, or a class is missing there.
        """
        if targets_of(train_source) is not None:
            return cls._of_targets(train_source, test_source)
        if train_indices is None:
            train_indices = labelled_images(train_source, "train")
        test_indices = labelled_images(test_source, "test")
        train_labels = train_source.labels[train_indices]
        test_labels = renumbered(test_source, train_source.classes)[test_indices]
        known = np.unique(train_labels)
        if len(known) < 2:
            raise InputError(
                f"{train_source.name}: its training labels are all of class {train_source.classes[known[0]]!r}; "
                "a classifier needs at least two classes"
            )
        unseen = ~np.isin(test_labels, known)
        if unseen.all():
            raise InputError(
                f"{test_source.name}: none of its classes ({_some(test_source.classes)}) has a training image "
                f"in {train_source.name} ({_some(train_source.classes)})"
            )
        warnings: tuple[str, ...] = ()
        if unseen.any():
            names = [test_source.classes[label] for label in np.unique(test_source.labels[test_indices][unseen])]
            warnings += (
                f"{int(unseen.sum()):,} of {len(test_labels):,} test images count as errors: "
                f"their classes have no training image ({_some(names)})",
            )
        untested = ~np.isin(train_labels, test_labels)
        if untested.any():
            names = [train_source.classes[label] for label in np.unique(train_labels[untested])]
            warnings += (
                f"{int(untested.sum()):,} of {len(train_labels):,} training images are of classes "
                f"that have no test image ({_some(names)})",
            )
        if warnings and not allow_missing_classes:
            raise InputError(
                f"{test_source.name}: {'; '.join(warnings)}; wanted the same classes in both parts, "
                "or allow_missing_classes to go on like that"
            )
        return cls(train_source, test_source, train_indices, test_indices, train_labels, test_labels, warnings)

    @classmethod
    def _of_targets(cls, train_source: Source, test_source: Source) -> "LabelledPair":
        train, test = targets_of(train_source), targets_of(test_source)
        assert train is not None
        if test is None or train_source.classes != test_source.classes:
            raise InputError(f"{test_source.name}: wanted several labels an image, of the classes in training")
        for index, name in enumerate(train_source.classes):
            if set(train[:, index].tolist()) < {0, 1}:
                raise InputError(
                    f"{train_source.name}: class {name!r} has not both training images with it and images without it"
                )
        train_rows, test_rows = (np.flatnonzero((part >= 0).any(axis=1)) for part in (train, test))
        return cls(train_source, test_source, train_rows, test_rows, train[train_rows], test[test_rows], ())

    def features(
        self,
        encoder: nn.Module,
        transform: Transform,
        batch_size: int,
        num_workers: int,
        device: torch.device | str | None,
        cache: str | os.PathLike[str] | None = None,
    ) -> tuple["LabelledPair", torch.Tensor, torch.Tensor]:
        """The pair of images that can be read, (N, D) of the training and (M, D) of the test images, as its labels."""

        def of(source: Source, indices: np.ndarray, part: str) -> tuple[torch.Tensor, dict[int, str]]:
            unreadable: dict[int, str] = {}
            with show_progress(f"features, {part}", len(indices), "images") as progress:
                features, _, _ = source_features(
                    encoder,
                    source,
                    transform,
                    indices=indices,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    device=device,
                    progress=progress,
                    unreadable=unreadable,
                    cache=cache,
                )
            return features, unreadable

        train, train_unreadable = of(self.train_source, self.train_indices, "train")
        test, test_unreadable = of(self.test_source, self.test_indices, "test")
        readable = self.without(train_unreadable, test_unreadable)
        return readable, train, test

    def without(
        self,
        train_unreadable: Mapping[int, str] = MappingProxyType({}),
        test_unreadable: Mapping[int, str] = MappingProxyType({}),
    ) -> "LabelledPair":
        """The pair of the images that can be read, given those that cannot by index and with the reason."""
        train_read = ~np.isin(self.train_indices, list(train_unreadable))
        test_read = ~np.isin(self.test_indices, list(test_unreadable))
        return replace(
            self,
            train_indices=self.train_indices[train_read],
            test_indices=self.test_indices[test_read],
            train_labels=self.train_labels[train_read],
            test_labels=self.test_labels[test_read],
            warnings=self.warnings
            + left_out(train_unreadable, len(train_read), "training")
            + left_out(test_unreadable, len(test_read), "test"),
            train_unreadable={**self.train_unreadable, **train_unreadable},
            test_unreadable={**self.test_unreadable, **test_unreadable},
        )

    def rows(self, selection: LabelSelection) -> np.ndarray:
        """Which rows of the training features are of the images of `selection`."""
        return np.flatnonzero(np.isin(self.train_indices, selection.indices))

    def manifest(
        self,
        *,
        task: str,
        values: tuple[float, ...],
        encoder: EncoderRecord,
        chosen: Chosen,
        settings: Mapping[str, Any],
        details: Mapping[str, Any],
        answers: Sequence[np.ndarray],
        metric: str = "top1",
        warnings: tuple[str, ...] = (),
    ) -> Manifest:
        """The record of `metric` on this pair, once for each choice of labels; `answers` are those of `Outcome`."""
        train = DatasetRecord.of(self.train_source, self.train_unreadable)
        if not chosen.budget.is_all:
            train = replace(train, images=max(len(self.rows(selection)) for selection in chosen.selections))
            selections = [selection.record(self.train_source) for selection in chosen.selections]
            settings = {
                **settings,
                "labels": str(chosen.budget),
                "seeds": [choice.seed for choice in chosen.selections],
            }
            details = {**details, "chosen": selections}
        return Manifest(
            task=task,
            metric=metric,
            values=values,
            train=train,
            test=DatasetRecord.of(self.test_source, self.test_unreadable),
            label_selection=chosen.description,
            encoder=encoder,
            settings=settings,
            details=details,
            warnings=self.warnings + warnings,
            outcome=Outcome(self.test_indices, self.test_labels, tuple(answers)),
        )


def left_out(unreadable: Mapping[int, str], images: int, part: str) -> tuple[str, ...]:
    """The warning of a manifest that some of so many images cannot be read; none where all can."""
    if not unreadable:
        return ()
    first = unreadable[min(unreadable)]
    return (f"{len(unreadable):,} of {images:,} {part} images cannot be read and are left out; the first: {first}",)


def labelled_images(source: Source, part: str) -> np.ndarray:
    """Indices of the images that have a label. Raises InputError where none has one."""
    indices = np.flatnonzero(source.labels >= 0)
    if not len(indices) and targets_of(source) is not None:
        raise InputError(f"{source.name}: its images have several labels each, which `simclr-scale transfer` evaluates")
    if not len(indices):
        raise InputError(f"{source.name}: no image of the {part} part has a label, and evaluation needs labels")
    return indices


def renumbered(source: Source, classes: tuple[str, ...]) -> np.ndarray:
    """Labels of `source` as positions in `classes`, by name; the names that `classes` lacks come after its end."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys((*classes, *source.classes)))}
    return np.array([numbers[name] for name in source.classes])[source.labels]


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
