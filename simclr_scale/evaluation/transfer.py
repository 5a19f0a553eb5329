"""Transfer: a linear classifier on the frozen features of each of many data sets, each judged by its own metric.

Chen et al. 2020, appendix B.8: logistic regression by L-BFGS, the strength of the penalty chosen among 45 by the metric
of the set, on its validation split or on a drawn share of its training images, and fitted again to all of them; images
resized to the encoder's size (shorter side, bicubic) and centre-cropped, not augmented.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from simclr_scale.bundle import ImageTransform
from simclr_scale.data.pixels import measure_value_range
from simclr_scale.errors import InputError
from simclr_scale.evaluation.few_labels import LabelSelection
from simclr_scale.evaluation.kept_fits import FitRecord, kept_fit
from simclr_scale.evaluation.linear import linear_probe
from simclr_scale.evaluation.manifest import EncoderRecord, Manifest
from simclr_scale.evaluation.metrics import METRICS, OF_SCORES
from simclr_scale.evaluation.multilabel import multilabel_probe
from simclr_scale.evaluation.pairs import LabelledPair
from simclr_scale.evaluation.progress import show_progress
from simclr_scale.evaluation.ranking import classes_counted
from simclr_scale.evaluation.strength import L2_VALUES, check_linear_settings
from simclr_scale.evaluation.suites import Suite, SuiteEntry, load_suite
from simclr_scale.evaluation.transfer_sets import Task, TransferSet, open_suite

ONE_SHOT_STRENGTH = 0.01
"""The penalty, as a share of the features' variance, where there is one image a class and nothing to choose by.

Ours: no source says one. As a share it does not depend on the scale of the features."""


@dataclass(frozen=True)
class TransferResult:
    """One encoder on one data set with one budget of labels."""

    entry: SuiteEntry
    labels: str
    encoder: str
    """As the user named it."""
    manifest: Manifest | None
    skipped: str = ""
    """Why there is no manifest."""


@dataclass(frozen=True)
class Transfer:
    """A suite whose sets are opened and checked for one encoder. `plan_transfer` makes it; `run` does the work."""

    transform: ImageTransform
    sets: tuple[TransferSet, ...]
    seed: int

    def run(
        self,
        encoder: nn.Module,
        *,
        l2_values: tuple[float, ...] = L2_VALUES,
        validation_fraction: float = 0.2,
        max_iterations: int = 5000,
        batch_size: int = 256,
        num_workers: int = 0,
        device: torch.device | str | None = None,
        spec: str = "",
        cache: str | os.PathLike[str] | None = None,
    ) -> tuple[TransferResult, ...]:
        """The results, set by set, each with every budget. Arguments and errors as of `evaluate_transfer`."""
        check_linear_settings(None, l2_values, validation_fraction, max_iterations)
        settings: dict[str, Any] = {
            "method": "lbfgs",
            "l2_values": list(l2_values),
            "validation_fraction": validation_fraction,
            "max_iterations": max_iterations,
            "seed": self.seed,
        }
        results: list[TransferResult] = []
        for one in self.sets:
            if one.pair is None:
                results += [TransferResult(one.entry, task.labels, spec, None, task.skipped) for task in one.tasks]
                continue
            _say(one.entry.name)
            transform = self.transform
            if transform.value_range is None:
                transform = transform.with_value_range(measure_value_range(one.pair.train_source, self.seed))
            workers = 0 if hasattr(one.pair.train_source, "pixels") else num_workers
            try:
                pair, train, test = one.pair.features(encoder, transform, batch_size, workers, device, cache)
            except InputError as error:
                raise InputError(f"{one.entry.name}: {error}") from error
            record = EncoderRecord.of(encoder, transform, spec)
            work = _Work(TransferSet(one.entry, one.tasks, pair, one.train_images), train, test, settings, cache)
            results += [work.result(task, record) for task in one.tasks]
        return tuple(results)


def plan_transfer(
    transform: ImageTransform,
    suite: Suite | str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    labels: Sequence[str | float] = (1.0,),
    seeds: int | None = None,
    seed: int = 0,
    allow_missing_classes: bool = False,
) -> Transfer:
    """Opens and checks the sets of a suite for an encoder of this transform. Arguments as of `evaluate_transfer`."""
    transform = ImageTransform(
        **{**transform.config, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"},
        value_range=transform.value_range,
    )
    sets = open_suite(
        suite if isinstance(suite, Suite) else load_suite(suite),
        root=root,
        labels=labels,
        seeds=seeds,
        seed=seed,
        channels=transform.channels,
        arrays=transform.value_range is not None,
        allow_missing_classes=allow_missing_classes,
    )
    return Transfer(transform, sets, seed)


def evaluate_transfer(
    encoder: nn.Module,
    transform: ImageTransform,
    suite: Suite | str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    labels: Sequence[str | float] = (1.0,),
    seeds: int | None = None,
    seed: int = 0,
    allow_missing_classes: bool = False,
    **settings: Any,
) -> tuple[TransferResult, ...]:
    """A linear classifier on the frozen features of every data set of a suite, each by its own metric.

    Where a set has a validation split of its own, the strength of the penalty is chosen there, else on a drawn share of
    the training images, and the classifier is fitted again to both. Of a budget of labels (a fraction, k-shot), the
    labels of a validation split are no part: it is then chosen within the draw. With one image of every class nothing
    is left to choose by, and the penalty is `ONE_SHOT_STRENGTH` of the features' variance.

    Args:
        encoder: images (B, C, H, W) in, features (B, D) out; left in the mode and on the device it is found.
        transform: the encoder's own; its size, mean and std are used, and the crop of the paper.
        suite: one, or its file, or the name of one that is shipped.
        root: where the data sets lie; the working directory where None.
        labels: budgets of labels, each a row for every set: fractions, "5-shot".
        seeds: draws of each budget that is drawn; 5 by default, and no fewer, of k-shot, else 1.
        seed: of the first draw, of the share that choices are made on, and of splits that a set does not bring.
        allow_missing_classes: see `evaluate_knn`.
        settings: `l2_values`, `validation_fraction` and `max_iterations` as of `linear_probe`; `batch_size`,
            `num_workers`, `device`, `spec` and `cache` as of `evaluate_knn`. With a cache a fit is kept there too, and
            a call that was killed goes on after the last one.

    Returns:
        A result for every set and budget, in that order; of sets that are not on disk the reason.

    Raises:
        InputError: before any image is read, for a suite that is none, a set that is damaged, of one class or of fewer
            images than shots, a metric that does not fit it, and where no set is on disk.
    """
    plan = plan_transfer(
        transform,
        suite,
        root=root,
        labels=labels,
        seeds=seeds,
        seed=seed,
        allow_missing_classes=allow_missing_classes,
    )
    return plan.run(encoder, **settings)


@dataclass(frozen=True)
class _Work:
    """One set, its features at hand."""

    one: TransferSet
    train: torch.Tensor
    test: torch.Tensor
    settings: dict[str, Any]
    cache: str | os.PathLike[str] | None

    @property
    def pair(self) -> LabelledPair:
        assert self.one.pair is not None
        return self.one.pair

    def result(self, task: Task, encoder: EncoderRecord) -> TransferResult:
        entry = self.one.entry
        if task.chosen is None:
            return TransferResult(entry, task.labels, encoder.spec, None, task.skipped)
        selections, fits = task.chosen.selections, len(self.settings["l2_values"]) + 1
        records: list[FitRecord] = []
        with show_progress(f"{entry.name}, labels {task.labels}", len(selections) * fits, "fits") as progress:
            for number, selection in enumerate(selections):
                done = number * fits
                records.append(self._fit(task, selection, lambda n, done=done: progress(done + n)))  # type: ignore[misc]
                progress(done + fits)
        metric = METRICS[entry.metric]
        several = len(records) > 1
        warnings = [
            (f"seed {selection.seed}: " if several else "") + warning
            for selection, record in zip(selections, records, strict=True)
            for warning in record.warnings
        ]
        chosen_on = self._chosen_on(task)
        manifest = self.pair.manifest(
            task="transfer",
            metric=entry.metric,
            values=tuple(metric(record.answers, self.pair.test_labels) for record in records),
            encoder=encoder,
            chosen=task.chosen,
            settings=self.settings | {"metric": entry.metric, "l2_chosen_on": chosen_on},
            details={"num_features": self.train.shape[1]}
            | ({"fits": [record.details for record in records]} if several else dict(records[0].details)),
            answers=[record.answers for record in records],
            warnings=(*warnings, *self._classes_left_out()),
        )
        return TransferResult(entry, task.labels, encoder.spec, manifest)

    def _fit(self, task: Task, selection: LabelSelection, progress: Callable[[int], object]) -> FitRecord:
        """The answers of a classifier fitted to one selection of labels."""
        assert task.chosen is not None
        validation = self.one.validation_rows if task.chosen.budget.is_all else None
        rows = np.arange(len(self.train)) if task.chosen.budget.is_all else self.pair.rows(selection)
        targets = self.pair.train_labels[rows]
        features = self.train if len(rows) == len(self.train) else self.train[rows]
        l2 = _one_shot_strength(features) if targets.ndim == 1 and _one_a_class(targets) else None
        choice: dict[str, Any] = {name: self.settings[name] for name in ("validation_fraction", "max_iterations")}
        choice |= {"l2_values": tuple(self.settings["l2_values"]), "metric": self.one.entry.metric}
        choice |= {"seed": selection.seed, "l2": l2, "validation_rows": validation}
        classes = len(self.pair.train_source.classes)

        def fit() -> FitRecord:
            probe = (linear_probe if targets.ndim == 1 else multilabel_probe)(
                features, targets, progress=progress, **choice
            )
            if targets.ndim == 1:
                answers = probe.answers(self.test, self.one.entry.metric, classes).numpy()
            else:
                answers = probe.logits(self.test).numpy()
            details: dict[str, Any] = {"l2": probe.l2, "train_loss": probe.train_loss, "iterations": probe.iterations}
            details |= {"converged": probe.converged, "validation": [asdict(score) for score in probe.validation]}
            return FitRecord(answers, details, probe.warnings)

        parts = (features.numpy(), targets, self.test.numpy())
        return kept_fit(self.cache, parts, choice | {"num_classes": classes}, fit)

    def _chosen_on(self, task: Task) -> str:
        assert task.chosen is not None
        if task.chosen.budget.is_all and self.one.validation_rows is not None:
            return f"its own validation split, {len(self.one.validation_rows):,} images"
        rows = self.pair.rows(task.chosen.selections[0])
        if self.pair.train_labels.ndim == 1 and _one_a_class(self.pair.train_labels[rows]):
            return f"nothing, {ONE_SHOT_STRENGTH:g} of the features' variance"
        return f"a drawn share of {self.settings['validation_fraction']:g}"

    def _classes_left_out(self) -> tuple[str, ...]:
        names = self.pair.train_source.classes
        if self.one.entry.metric not in OF_SCORES:
            return ()
        negatives = self.one.entry.metric == "mean_auc"
        counted = classes_counted(self.pair.test_labels, len(names), negatives=negatives)
        if len(counted) == len(names):
            return ()
        left_out = ", ".join(name for index, name in enumerate(names) if index not in counted)
        why = "not both test images with and without" if negatives else "no test images of"
        return (f"the mean is over {len(counted)} of {len(names)} classes: there are {why} {left_out}",)


def _one_a_class(targets: np.ndarray) -> bool:
    return int(np.unique(targets, return_counts=True)[1].max()) < 2


def _one_shot_strength(features: torch.Tensor) -> float:
    variance = float(features.double().var(dim=0, correction=0).sum())
    return max(ONE_SHOT_STRENGTH * variance, float(np.finfo(np.float64).tiny))


def _say(name: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(name, style="bold", highlight=False, soft_wrap=True)
