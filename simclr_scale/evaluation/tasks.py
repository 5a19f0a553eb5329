"""Whole evaluations on a frozen encoder: from the encoder and two sources to a manifest."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import nn

from simclr_scale.bundle import ImageTransform
from simclr_scale.data.sources import Source
from simclr_scale.errors import InputError
from simclr_scale.evaluation.augmented import (
    LEARNING_RATE,
    AugmentedProbe,
    augmented_probe,
    check_augmented_settings,
)
from simclr_scale.evaluation.features import Transform
from simclr_scale.evaluation.few_labels import check_choice
from simclr_scale.evaluation.knn import check_knn_settings, knn_classify_each
from simclr_scale.evaluation.linear import L2_VALUES, LinearProbe, check_linear_settings, linear_probe
from simclr_scale.evaluation.manifest import EncoderRecord, Manifest
from simclr_scale.evaluation.metrics import top1
from simclr_scale.evaluation.pairs import Chosen, LabelledPair
from simclr_scale.evaluation.probes import (
    EPOCHS,
    LEARNING_RATES,
    MOMENTUM,
    WEIGHT_DECAYS,
    GridProbe,
    check_grid_settings,
    probe_grid,
)
from simclr_scale.evaluation.progress import show_progress

_Rows = TypeVar("_Rows", np.ndarray, torch.Tensor)


def evaluate_knn(
    encoder: nn.Module,
    transform: Transform,
    train_source: Source,
    test_source: Source,
    *,
    k: int | Sequence[int] = 200,
    temperature: float = 0.07,
    labels: str | float = 1.0,
    seeds: int | None = None,
    seed: int = 0,
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
        labels: which labels of `train_source` are used: a fraction of them, "5-shot" (of every class), or the path of a
            list file (see `LabelBudget.parse`). The ids of those chosen are in the manifest.
        seeds: draws of the labels, each a value of the manifest; 5 by default, and no fewer, of k-shot, else 1.
        seed: of the first draw; the others follow.
        batch_size: images the encoder takes at once.
        num_workers: processes that read images.
        device: where the encoder runs; None for where it is.
        spec: how the user named the encoder, for the manifest.
        label_selection: how the user chose the labels of `train_source`, for the manifest, where `labels` are all.
        cache: folder of features computed before, see `source_features`; the digits are the same without it.
        allow_missing_classes: test images of a class that no training image has count as errors, and training images of
            a class that no test image has stay in; a warning in the manifest says how many they are.

    Raises:
        InputError: before any image is read, where a source has no labels, the labels chosen are not there (see
            `select_labels`), there are fewer training images than k or they are of fewer than two classes, no test
            image is of a training class, a class is missing on either side without `allow_missing_classes`, or a
            setting is out of range; and where the features are of no use (see `knn_classify`).
    """
    check_knn_settings(k, temperature)
    ks = (k,) if isinstance(k, int) else tuple(k)
    chosen = Chosen.of(train_source, labels, seeds, seed, label_selection)
    pair = LabelledPair.of(train_source, test_source, chosen.union(), allow_missing_classes)
    labelled = min(len(pair.rows(selection)) for selection in chosen.selections)
    if max(ks) > labelled:
        raise InputError(
            f"k: {max(ks)}, wanted at most {labelled}, the labelled training images of {train_source.name}"
            + ("" if chosen.budget.is_all else f" that labels {chosen.budget} leaves")
        )
    pair, train, test = pair.features(encoder, transform, batch_size, num_workers, device, cache)
    by_k: dict[int, list[float]] = {number: [] for number in ks}
    answers: list[np.ndarray] = []
    fewest = len(train)
    with show_progress("nearest neighbours", len(chosen.selections) * len(test), "images") as progress:
        for number, selection in enumerate(chosen.selections):
            rows = pair.rows(selection)
            predictions = knn_classify_each(
                _chosen(rows, train),
                _chosen(rows, pair.train_labels),
                test,
                ks,
                temperature=temperature,
                progress=_from(number * len(test), progress),
            )
            fewest = min(fewest, len(rows))
            for one, prediction in zip(ks, predictions, strict=True):
                by_k[one].append(top1(prediction, pair.test_labels))
            answers.append(predictions[0].numpy())
    details: dict[str, Any] = {"num_features": train.shape[1], "neighbors": min(ks[0], fewest)}
    if len(ks) > 1:
        details["top1_by_k"] = {str(one): each[0] if len(each) == 1 else each for one, each in by_k.items()}
    return pair.manifest(
        task="knn",
        values=tuple(by_k[ks[0]]),
        encoder=EncoderRecord.of(encoder, transform, spec),
        chosen=chosen,
        settings={"k": ks[0], "temperature": temperature, "similarity": "cosine"},
        details=details,
        answers=answers,
        warnings=(f"k is {max(ks)}, but only {fewest:,} training images can be read: all of them vote",)
        if max(ks) > fewest
        else (),
    )


def evaluate_linear(
    encoder: nn.Module,
    transform: Transform,
    train_source: Source,
    test_source: Source,
    *,
    method: Literal["lbfgs", "grid", "sgd"] = "lbfgs",
    l2: float | None = None,
    l2_values: tuple[float, ...] = L2_VALUES,
    validation_fraction: float = 0.2,
    seed: int = 0,
    max_iterations: int = 5000,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    learning_rate: float = LEARNING_RATE,
    epochs: int = EPOCHS,
    probe_batch_size: int = 256,
    labels: str | float = 1.0,
    seeds: int | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    spec: str = "",
    label_selection: str = "all",
    cache: str | os.PathLike[str] | None = None,
    allow_missing_classes: bool = False,
) -> Manifest:
    """Top-1 of a linear classifier on the features of a frozen encoder, on the labelled images of `test_source`.

    With `method` "lbfgs" it is multinomial logistic regression to its optimum: `l2` to `max_iterations` are then those
    of `linear_probe`. With "grid" it is the best of a grid of probes trained by SGD: `validation_fraction`, `seed` and
    `learning_rates` to `probe_batch_size` are then those of `probe_grid` (`batch_size`). With "sgd" it is the paper's
    protocol, which alone augments the training images and runs the encoder in every epoch: `seed`, `learning_rate`,
    `epochs` and `probe_batch_size` are then those of `augmented_probe`. The others and the errors are those of
    `evaluate_knn`; every draw of `labels` is a fit of its own, with a choice of its own by the seed of the
    draw. A fit that stops short of its optimum, or a choice at the edge of its range, is a warning in the manifest.
    """
    settings: dict[str, Any]
    if method == "lbfgs":
        check_linear_settings(l2, l2_values, validation_fraction, max_iterations)
        choice = {"l2_values": list(l2_values), "validation_fraction": validation_fraction, "seed": seed}
        settings = {"method": method, "max_iterations": max_iterations} | (choice if l2 is None else {"l2": l2})
        fits, unit, chosen_by_validation = (len(l2_values) + 1 if l2 is None else 1), "fits", l2 is None
    elif method == "grid":
        if l2 is not None:
            raise InputError(f"l2: {l2}, but method grid has weight_decays; l2 is of method lbfgs")
        check_grid_settings(learning_rates, weight_decays, epochs, probe_batch_size, validation_fraction)
        chosen_by_validation = len(learning_rates) * len(weight_decays) > 1
        settings = {
            "method": method,
            "learning_rates": list(learning_rates),
            "weight_decays": list(weight_decays),
            "epochs": epochs,
            "probe_batch_size": probe_batch_size,
            "momentum": MOMENTUM,
            "validation_fraction": validation_fraction,
            "seed": seed,
        }
        fits, unit = (2 * epochs if chosen_by_validation else epochs), "epochs"
    elif method == "sgd":
        if l2 is not None:
            raise InputError(f"l2: {l2}, but method sgd is not regularised; l2 is of method lbfgs")
        check_augmented_settings(transform, learning_rate, 0.0, epochs, probe_batch_size)
        chosen_by_validation = False
        settings = {
            "method": method,
            "augmentation": "random resized crop, flip",
            "learning_rate": learning_rate,
            "epochs": epochs,
            "probe_batch_size": probe_batch_size,
            "momentum": MOMENTUM,
            "seed": seed,
        }
        fits, unit = epochs, "epochs"
    else:
        raise InputError(f"method: {method!r}, wanted lbfgs, grid or sgd")

    def fit(rows: np.ndarray, draw: int, progress: Callable[[int], None]) -> LinearProbe | GridProbe | AugmentedProbe:
        if method == "sgd":
            return augmented_probe(
                encoder,
                cast(ImageTransform, transform),  # checked above
                train_source,
                pair.train_indices[rows],
                learning_rate=learning_rate,
                epochs=epochs,
                batch_size=probe_batch_size,
                seed=draw,
                num_workers=num_workers,
                device=device,
                progress=progress,
            )
        features, targets = _chosen(rows, train), _chosen(rows, pair.train_labels)
        if method == "lbfgs":
            return linear_probe(
                features,
                targets,
                l2=l2,
                l2_values=l2_values,
                validation_fraction=validation_fraction,
                seed=draw,
                max_iterations=max_iterations,
                progress=progress,
            )
        return probe_grid(
            features,
            targets,
            learning_rates=learning_rates,
            weight_decays=weight_decays,
            epochs=epochs,
            batch_size=probe_batch_size,
            validation_fraction=validation_fraction,
            seed=draw,
            progress=progress,
        )

    chosen = Chosen.of(train_source, labels, seeds, seed, label_selection)
    pair = LabelledPair.of(train_source, test_source, chosen.union(), allow_missing_classes)
    if chosen_by_validation:
        wanted = "l2" if method == "lbfgs" else "one of learning_rates and weight_decays"
        check_choice(chosen.selections, train_source.labels, wanted)
    pair, train, test = pair.features(encoder, transform, batch_size, num_workers, device, cache)
    values: list[float] = []
    answers: list[np.ndarray] = []
    details: list[dict[str, Any]] = []
    warnings: list[str] = []
    stage = {"lbfgs": "logistic regression", "grid": "grid of probes", "sgd": "linear classifier by SGD"}[method]
    draws = len(chosen.selections)
    with show_progress(stage, draws * fits, unit) as progress:
        for number, selection in enumerate(chosen.selections):
            rows = pair.rows(selection)
            probe = fit(rows, selection.seed, _from(number * fits, progress))
            answers.append(probe.predict(test).numpy())
            values.append(top1(answers[-1], pair.test_labels))
            details.append(_fit_details(probe))
            where = f"seed {selection.seed}: " if draws > 1 else ""
            warnings += [where + warning for warning in getattr(probe, "warnings", ())]
    return pair.manifest(
        task="linear",
        values=tuple(values),
        encoder=EncoderRecord.of(encoder, transform, spec),
        chosen=chosen,
        settings=settings,
        details={"num_features": train.shape[1]} | (details[0] if draws == 1 else {"fits": details}),
        answers=answers,
        warnings=tuple(warnings),
    )


def _chosen(rows: np.ndarray, of: _Rows) -> _Rows:
    """Those rows; where they are all, no copy, which would not fit where features are mapped from disk."""
    return of if len(rows) == len(of) else of[rows]


def _fit_details(probe: LinearProbe | GridProbe | AugmentedProbe) -> dict[str, Any]:
    if isinstance(probe, AugmentedProbe):
        return {"losses": list(probe.losses)}
    validation = [asdict(score) for score in probe.validation]
    if isinstance(probe, GridProbe):
        return asdict(probe.setting) | {"validation": validation}
    return {
        "l2": probe.l2,
        "train_loss": probe.train_loss,
        "iterations": probe.iterations,
        "converged": probe.converged,
        "validation": validation,
    }


def _from(done_before: int, progress: Callable[[int], None]) -> Callable[[int], None]:
    return lambda done: progress(done_before + done)
