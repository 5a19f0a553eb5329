"""How good an encoder is with few labels: a fraction of them, k of every class, or those of a list.

All selections of one seed are beginnings of one order of the labelled images (`data.subsets.balanced_order`), the
fractions of the whole order and k-shot of each class within it. So they nest: 1% lies inside 10%, 1-shot inside
5-shot. Scores of few shots differ by many points from draw to draw (with ten shots by 3 to 17; Cherti and Jitsev 2021,
"Effect of Pre-Training Scale on Intra- and Inter-Domain Full and Few-Shot Transfer Learning"), so there are always
several draws.

N training images, M test images, D features, n images chosen.
"""

import hashlib
import math
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from simclr_scale.data.sources import Source
from simclr_scale.data.sources.base import file_name
from simclr_scale.data.subsets import balanced_order, listed_images
from simclr_scale.errors import InputError
from simclr_scale.evaluation.arrays import Array, as_classes
from simclr_scale.evaluation.knn import knn_classify
from simclr_scale.evaluation.linear import linear_probe
from simclr_scale.evaluation.metrics import top1

LEAST_SHOT_SEEDS = 5
"""Draws of a k-shot score: its spread is part of the result."""

OFFICIAL_LISTS = {
    "b61c91b8ddb75fabdb02a9bb2ae3bd74": "Google's list of 1% of ImageNet",
    "b0d861160cc9531910d069ff547fc1b6": "Google's list of 10% of ImageNet",
}
"""By the md5 of the file: `imagenet_subsets/1percent.txt` and `10percent.txt` of google-research/simclr, by which the
papers report 1% and 10%."""

_WANTED = "wanted a fraction such as 0.1, k of every class such as 5-shot, or a file that lists images"


@dataclass(frozen=True)
class LabelBudget:
    """How many labels are used. At most one of `shots` and `file` is set; without them `fraction` counts."""

    fraction: float = 1.0
    shots: int | None = None
    file: str | None = None

    @classmethod
    def parse(cls, labels: str | float) -> "LabelBudget":
        """From what users write: a fraction above 0 and up to 1, "5-shot", or the path of a list file.

        A list names one image a line, by its number among the training images (from 0) or by its name: the path within
        the data set, or the last part of it where only one image has that.

        Raises:
            InputError: it is none of these.
        """
        text = str(labels).strip()
        if match := re.fullmatch(r"(\d+)-shot", text):
            shots = int(match[1])
            if shots < 1:
                raise InputError(f"labels: {text}, wanted at least 1-shot")
            return cls(shots=shots)
        try:
            fraction = float(text)
        except ValueError:
            file = os.path.expanduser(text)
            if not os.path.isfile(file):
                raise InputError(f"labels: there is no list file {text!r}; {_WANTED}") from None
            return cls(file=file)
        if not 0 < fraction <= 1:
            hint = f"; {text} of every class are {text}-shot" if re.fullmatch(r"[1-9]\d*", text) else ""
            raise InputError(f"labels: {text}, a fraction lies above 0 and is at most 1{hint}")
        return cls(fraction=fraction)

    @property
    def is_all(self) -> bool:
        """Whether every label is used."""
        return self.shots is None and self.file is None and self.fraction == 1

    @property
    def is_drawn(self) -> bool:
        """Whether a seed decides which labels are used."""
        return self.file is None and not self.is_all

    def __str__(self) -> str:
        if self.shots is not None:
            return f"{self.shots}-shot"
        return f"{self.fraction:g}" if self.file is None else os.path.basename(self.file)

    def seeds(self, count: int | None = None, first: int = 0) -> tuple[int, ...]:
        """The seeds of `count` draws: `first` and those after it. By default 5 of k-shot, else 1.

        Raises:
            InputError: there is nothing to draw more than once, `count` is below 1 or below the 5 that k-shot takes, or
                `first` is negative.
        """
        least = LEAST_SHOT_SEEDS if self.shots is not None else 1
        count = least if count is None else count
        if first < 0:
            raise InputError(f"seed: {first}, must not be negative")
        if count < least:
            why = "" if least == 1 else f" of {self}: its scores differ by many points from draw to draw"
            raise InputError(f"seeds: {count}, wanted at least {least}{why}")
        if count > 1 and not self.is_drawn:
            what = "all labels are used" if self.file is None else f"{self} lists the images"
            raise InputError(f"seeds: {count}, but {what}, so there is nothing to draw; wanted 1")
        return tuple(range(first, first + count))

    def choose(self, labels: np.ndarray, seed: int, classes: Sequence[str] = ()) -> np.ndarray:
        """The images whose labels are used, of a budget without `file`.

        Args:
            labels: (N,) integers; images below 0 are unlabelled and never chosen.
            seed: of the draw; >= 0.
            classes: names of the classes by label, for messages.

        Returns:
            (n,) int64, ascending. Of a fraction f, n is f times the labelled images, rounded, and each class has its
            share to less than one image.

        Raises:
            InputError: there are no labels, a class has fewer images than shots, or the fraction does not reach one
                image of every class.
        """
        if self.file is not None:
            raise InputError(f"labels: {self} lists images, which only a source can name; use `select_labels`")
        labels = np.asarray(labels)
        labelled = np.flatnonzero(labels >= 0)
        if not labelled.size:
            raise InputError(f"labels: {self} of them wanted, but no training image has a label")
        members, counts = np.unique(labels[labelled], return_counts=True)
        if self.is_all:
            return labelled
        order = labelled[balanced_order(labels[labelled], seed)]
        if self.shots is None:
            count = math.floor(self.fraction * labelled.size + 0.5)
            if count < members.size:
                raise InputError(
                    f"labels: {self} of {labelled.size} images are {count}, fewer than the {members.size} classes; "
                    f"wanted at least {members.size / labelled.size:.2g}, or 1-shot"
                )
            return np.sort(order[:count])
        if counts.min() < self.shots:
            scarce = int(members[counts.argmin()])
            name = repr(classes[scarce]) if scarce < len(classes) else str(scarce)
            raise InputError(
                f"labels: {self}, but class {name} has {counts.min()} labelled training images; "
                f"wanted at most {counts.min()}-shot"
            )
        return np.sort(np.concatenate([order[labels[order] == member][: self.shots] for member in members]))


@dataclass(frozen=True)
class LabelSelection:
    """The training images whose labels one evaluation uses."""

    indices: np.ndarray
    """(n,) int64, ascending: into the training source or the rows of the features."""
    seed: int
    """Of the draw, where there is one."""

    def record(self, source: Source) -> dict[str, Any]:
        """For a manifest: seed, number, a sha256 of the ids, and the ids: names where images have them, or numbers."""
        ids = [file_name(source, int(index)) or int(index) for index in self.indices]
        checksum = hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()
        return {"seed": self.seed, "images": len(ids), "ids_sha256": checksum, "ids": ids}


def select_labels(source: Source, budget: LabelBudget, seeds: Sequence[int]) -> tuple[list[LabelSelection], str]:
    """The selections of `budget` among the images of `source`, one a seed, and a line that describes them.

    Raises:
        InputError: as `LabelBudget.choose`; or the list cannot be read, names an image that is not there or has no
            label, or one twice.
    """
    if budget.is_all:
        return [LabelSelection(np.flatnonzero(source.labels >= 0), seeds[0])], "all"
    if budget.file is not None:
        listed, content = listed_images(source, budget.file, "labels")
        indices = np.sort(listed)
        unlabelled = indices[source.labels[indices] < 0]
        if unlabelled.size:
            raise InputError(
                f"labels: {unlabelled.size} of the {indices.size} images that {budget} lists have no label in "
                f"{source.name}; the first is {source.describe(int(unlabelled[0]))}"
            )
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        official = f", {OFFICIAL_LISTS[md5]}" if md5 in OFFICIAL_LISTS else ""
        return [LabelSelection(indices, seeds[0])], f"listed in {budget} ({indices.size:,} images, md5 {md5}{official})"
    try:
        selections = [LabelSelection(budget.choose(source.labels, seed, source.classes), seed) for seed in seeds]
    except InputError as error:
        raise InputError(f"{source.name}: {error}") from error
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    return selections, f"{budget} (class-balanced, {which})"


def check_choice(selections: Sequence[LabelSelection], labels: np.ndarray, what: str) -> None:
    """Raises InputError where no class has the two images that choosing `what` on a validation part takes."""
    for selection in selections:
        if np.unique(labels[selection.indices], return_counts=True)[1].max(initial=0) < 2:
            raise InputError(f"labels: one image in each class, none left to choose {what} by; give {what} itself")


@dataclass(frozen=True)
class FewLabelScore:
    """Top-1 on all test images, once for each selection of labels."""

    accuracies: tuple[float, ...]
    selections: tuple[LabelSelection, ...]

    @property
    def mean(self) -> float:
        """Mean over the selections."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the selections (n - 1 in the denominator); None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


def few_label_knn(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    labels: str | float,
    *,
    seeds: int | None = None,
    seed: int = 0,
    k: int = 200,
    temperature: float = 0.07,
) -> FewLabelScore:
    """Top-1 of `knn_classify` with only some of the training images as neighbours.

    Args:
        train_features: (N, D).
        train_labels: (N,) integers; those below 0 are unlabelled.
        test_features: (M, D).
        test_labels: (M,).
        labels: a fraction such as 0.1, or "5-shot".
        seeds: draws; 5 by default, and no fewer, of k-shot, else 1.
        seed: of the first draw; the others follow.
        k: see `knn_classify`.
        temperature: see `knn_classify`.

    Raises:
        InputError: as `LabelBudget.choose`, `LabelBudget.seeds` and `knn_classify`.
    """
    features, targets, selections = _on_features(train_features, train_labels, labels, seeds, seed)
    accuracies = []
    for chosen in selections:
        rows = chosen.indices
        predicted = knn_classify(features[rows], targets[rows], test_features, k, temperature)
        accuracies.append(top1(predicted, test_labels))
    return FewLabelScore(tuple(accuracies), selections)


def few_label_linear(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    labels: str | float,
    *,
    seeds: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> FewLabelScore:
    """Top-1 of `linear_probe` fitted to only some of the training images.

    The strength of the penalty is chosen within the selection too, on a part of it that the same seed draws; so 1-shot
    takes `l2`. The arguments up to `seed` are those of `few_label_knn`, `settings` those of `linear_probe`.

    Raises:
        InputError: as `LabelBudget.choose`, `LabelBudget.seeds` and `linear_probe`.
    """
    features, targets, selections = _on_features(train_features, train_labels, labels, seeds, seed)
    if settings.get("l2") is None:
        check_choice(selections, targets, "l2")
    accuracies = []
    for chosen in selections:
        rows = chosen.indices
        probe = linear_probe(features[rows], targets[rows], seed=chosen.seed, **settings)
        accuracies.append(probe.accuracy(test_features, test_labels))
    return FewLabelScore(tuple(accuracies), selections)


def _on_features(
    train_features: Array, train_labels: Array, labels: str | float, seeds: int | None, seed: int
) -> tuple[torch.Tensor, np.ndarray, tuple[LabelSelection, ...]]:
    budget = LabelBudget.parse(labels)
    draws = budget.seeds(seeds, seed)
    features, targets = torch.as_tensor(train_features), as_classes(train_labels, "train_labels").numpy()
    if len(features) != len(targets):
        raise InputError(f"train_labels: {len(targets)} labels for {len(features)} rows of features")
    return features, targets, tuple(LabelSelection(budget.choose(targets, draw), draw) for draw in draws)
