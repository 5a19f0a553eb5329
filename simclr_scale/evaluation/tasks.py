"""Whole evaluations on a frozen encoder: from the encoder and two sources to a manifest."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from simclr_scale.data.sources import Source
from simclr_scale.errors import InputError
from simclr_scale.evaluation.features import Transform, source_features
from simclr_scale.evaluation.knn import check_knn_settings, knn_classify_each
from simclr_scale.evaluation.linear import L2_VALUES, check_linear_settings, linear_probe
from simclr_scale.evaluation.manifest import DatasetRecord, EncoderRecord, Manifest
from simclr_scale.evaluation.metrics import top1
from simclr_scale.evaluation.progress import show_progress


def evaluate_knn(
    encoder: nn.Module,
    transform: Transform,
    train_source: Source,
    test_source: Source,
    *,
    k: int | Sequence[int] = 200,
    temperature: float = 0.07,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    spec: str = "",
    label_selection: str = "all",
    cache: str | os.PathLike[str] | None = None,
    allow_missing_classes: bool = False,
) -> Manifest:
    """Top-1 of weighted k-nearest neighbours (`knn_classify`) on the labelled images of `test_source`.

    Under torch.distributed every rank must call this. They share the images out, and each gets the same digits as one
    process alone would.

    Args:
        encoder: images (B, C, H, W) in, features (B, D) out; left in the mode and on the device it is found.
        transform: from PIL image to (C, H, W), as the encoder wants it in evaluation.
        train_source: its labelled images are the neighbours.
        test_source: may be of another data set; classes are matched by name.
        k: see `knn_classify`. Of several, all found by one search, the first gives the value, and the others stand
            beside it in the details: the best of them would be a choice made on the test images.
        temperature: see `knn_classify`.
        batch_size: images the encoder takes at once.
        num_workers: processes that read images.
        device: where the encoder runs; None for where it is.
        spec: how the user named the encoder, for the manifest.
        label_selection: how the user chose the labels of `train_source`, for the manifest.
        cache: folder of features computed before, see `source_features`; the digits are the same without it.
        allow_missing_classes: test images of a class that no training image has count as errors, and training images of
            a class that no test image has stay in; a warning in the manifest says how many they are.

    Raises:
        InputError: before any image is read, where a source has no labels, there are fewer training images than k or
            they are of fewer than two classes, no test image is of a training class, a class is missing on either
            side without `allow_missing_classes`, or a setting is out of range; and where the features are of no use
            (see `knn_classify`).
    """
    check_knn_settings(k, temperature)
    ks = (k,) if isinstance(k, int) else tuple(k)
    pair = _LabelledPair.of(train_source, test_source, allow_missing_classes)
    labelled = len(pair.train_labels)
    if max(ks) > labelled:
        raise InputError(
            f"k: {max(ks)}, wanted at most {labelled}, the labelled training images of {train_source.name}"
        )
    pair, train, test = pair.features(encoder, transform, batch_size, num_workers, device, cache)
    with show_progress("nearest neighbours", len(test), "images") as progress:
        predictions = knn_classify_each(train, pair.train_labels, test, ks, temperature=temperature, progress=progress)
    values = [top1(of_k, pair.test_labels) for of_k in predictions]
    by_k = {str(number): value for number, value in zip(ks, values, strict=True)}
    return pair.manifest(
        task="knn",
        value=values[0],
        encoder=EncoderRecord.of(encoder, transform, spec),
        label_selection=label_selection,
        settings={"k": ks[0], "temperature": temperature, "similarity": "cosine"},
        details={"num_features": train.shape[1], "neighbors": min(ks[0], len(train))}
        | ({"top1_by_k": by_k} if len(ks) > 1 else {}),
        warnings=(f"k is {max(ks)}, but only {len(train):,} training images can be read: all of them vote",)
        if max(ks) > len(train)
        else (),
    )


def evaluate_linear(
    encoder: nn.Module,
    transform: Transform,
    train_source: Source,
    test_source: Source,
    *,
    l2: float | None = None,
    l2_values: tuple[float, ...] = L2_VALUES,
    validation_fraction: float = 0.2,
    seed: int = 0,
    max_iterations: int = 5000,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    spec: str = "",
    label_selection: str = "all",
    cache: str | os.PathLike[str] | None = None,
    allow_missing_classes: bool = False,
) -> Manifest:
    """Top-1 of multinomial logistic regression (`linear_probe`) on the labelled images of `test_source`.

    Images are not augmented. From `l2` to `max_iterations` the arguments are those of `linear_probe`, the others and
    the errors those of `evaluate_knn`. A fit that stops short of its optimum is a warning in the manifest.
    """
    check_linear_settings(l2, l2_values, validation_fraction, max_iterations)
    pair = _LabelledPair.of(train_source, test_source, allow_missing_classes)
    pair, train, test = pair.features(encoder, transform, batch_size, num_workers, device, cache)
    with show_progress("logistic regression", len(l2_values) + 1 if l2 is None else 1, "fits") as progress:
        probe = linear_probe(
            train,
            pair.train_labels,
            l2=l2,
            l2_values=l2_values,
            validation_fraction=validation_fraction,
            seed=seed,
            max_iterations=max_iterations,
            progress=progress,
        )
    choice = {"l2_values": list(l2_values), "validation_fraction": validation_fraction, "seed": seed}
    return pair.manifest(
        task="linear",
        value=probe.accuracy(test, pair.test_labels),
        encoder=EncoderRecord.of(encoder, transform, spec),
        label_selection=label_selection,
        settings={"max_iterations": max_iterations} | (choice if l2 is None else {"l2": l2}),
        details={
            "num_features": train.shape[1],
            "l2": probe.l2,
            "train_loss": probe.train_loss,
            "iterations": probe.iterations,
            "converged": probe.converged,
            "validation": [asdict(score) for score in probe.validation],
        },
        warnings=probe.warnings,
    )


@dataclass(frozen=True)
class _LabelledPair:
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
    def of(cls, train_source: Source, test_source: Source, allow_missing_classes: bool = False) -> "_LabelledPair":
        """Raises InputError where there is nothing to learn from or to be judged by, or a class is missing there."""
        train_indices = _labelled(train_source, "train")
        test_indices = _labelled(test_source, "test")
        train_labels = train_source.labels[train_indices]
        test_labels = _renumbered(test_source, train_source.classes)[test_indices]
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

    def features(
        self,
        encoder: nn.Module,
        transform: Transform,
        batch_size: int,
        num_workers: int,
        device: torch.device | str | None,
        cache: str | os.PathLike[str] | None = None,
    ) -> tuple["_LabelledPair", torch.Tensor, torch.Tensor]:
        """The pair of images that can be read, (N, D) of the training and (M, D) of the test images, as its labels."""

        def of(source: Source, indices: np.ndarray, part: str) -> tuple[torch.Tensor, np.ndarray, dict[int, str]]:
            unreadable: dict[int, str] = {}
            with show_progress(f"features, {part}", len(indices), "images") as progress:
                features, _, read = source_features(
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
            return features, np.isin(indices, read.numpy()), unreadable

        train, train_read, train_unreadable = of(self.train_source, self.train_indices, "train")
        test, test_read, test_unreadable = of(self.test_source, self.test_indices, "test")
        readable = replace(
            self,
            train_indices=self.train_indices[train_read],
            test_indices=self.test_indices[test_read],
            train_labels=self.train_labels[train_read],
            test_labels=self.test_labels[test_read],
            warnings=self.warnings
            + _left_out(train_unreadable, len(train_read), "training")
            + _left_out(test_unreadable, len(test_read), "test"),
            train_unreadable=train_unreadable,
            test_unreadable=test_unreadable,
        )
        return readable, train, test

    def manifest(
        self,
        *,
        task: str,
        value: float,
        encoder: EncoderRecord,
        label_selection: str,
        settings: Mapping[str, Any],
        details: Mapping[str, Any],
        warnings: tuple[str, ...] = (),
    ) -> Manifest:
        """The record of one top-1 on this pair."""
        return Manifest(
            task=task,
            metric="top1",
            values=(value,),
            train=DatasetRecord.of(self.train_source, self.train_unreadable),
            test=DatasetRecord.of(self.test_source, self.test_unreadable),
            label_selection=label_selection,
            encoder=encoder,
            settings=settings,
            details=details,
            warnings=self.warnings + warnings,
        )


def _left_out(unreadable: Mapping[int, str], images: int, part: str) -> tuple[str, ...]:
    if not unreadable:
        return ()
    first = unreadable[min(unreadable)]
    return (f"{len(unreadable):,} of {images:,} {part} images cannot be read and are left out; the first: {first}",)


def _labelled(source: Source, part: str) -> np.ndarray:
    indices = np.flatnonzero(source.labels >= 0)
    if not len(indices):
        raise InputError(f"{source.name}: no image of the {part} part has a label, and evaluation needs labels")
    return indices


def _renumbered(source: Source, classes: tuple[str, ...]) -> np.ndarray:
    """Labels of `source` as positions in `classes`, by name; the names that `classes` lacks come after its end."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys((*classes, *source.classes)))}
    return np.array([numbers[name] for name in source.classes])[source.labels]


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
