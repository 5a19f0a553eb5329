"""``simclr-scale knn`` and ``simclr-scale linear``: an encoder's score on a labelled data set."""

from collections.abc import Callable
from typing import Any, Literal

from simclr_scale.cli.evaluated import EvaluationData, check_before_work, chosen_device, open_evaluated, run_on_data
from simclr_scale.cli.ranks import launched_ranks
from simclr_scale.data.workers import killed_workers_explained
from simclr_scale.errors import InputError
from simclr_scale.evaluation import LabelBudget, Manifest, evaluate_knn, evaluate_linear
from simclr_scale.evaluation.probes import EPOCHS

USAGE = "--encoder ENCODER --data.source SOURCE [options]"


def knn(argv: list[str]) -> None:
    """``simclr-scale knn``."""
    run_on_data("knn", run_knn, USAGE, argv)


def linear(argv: list[str]) -> None:
    """``simclr-scale linear``."""
    run_on_data("linear", run_linear, USAGE, argv)


def run_knn(
    encoder: str,
    data: EvaluationData,
    k: int | str = 200,
    temperature: float = 0.07,
    labels: str = "1.0",
    seeds: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    output: str | None = None,
    cache: str | None = None,
    allow_missing_classes: bool = False,
) -> None:
    """Score an encoder by a weighted vote of the nearest training images (exact cosine neighbours).

    Args:
        encoder: a run, a bundle, a .ckpt file, timm:NAME, hf-hub:ID, random:NAME, pixels:SIZE or histogram:BINS.
        data: the labelled images.
        k: neighbours that vote; of several, such as 200,20,10, the first gives the value, the others stand beside it.
        temperature: of their weights, exp(similarity / temperature).
        labels: those used of the training images: a fraction, k of every class as in 5-shot, or a list file.
        seeds: draws of the labels; 5 of k-shot, else 1, where not given.
        seed: of the first draw.
        batch_size: images a forward.
        device: cpu, cuda, mps; auto takes the best there is.
        output: file of the JSON manifest; must not exist.
        cache: folder in which features are kept, and found by the next evaluation of the same encoder and images.
        allow_missing_classes: goes on where a class has no training or no test image; see the note in the manifest.
    """
    settings = {"k": _neighbor_counts(k), "temperature": temperature, "labels": labels, "seeds": seeds, "seed": seed}
    settings |= {"cache": cache, "allow_missing_classes": allow_missing_classes}
    _evaluate(evaluate_knn, encoder, data, batch_size, device, output, **settings)


def run_linear(
    encoder: str,
    data: EvaluationData,
    method: Literal["lbfgs", "grid", "sgd"] = "lbfgs",
    l2: float | None = None,
    epochs: int = EPOCHS,
    labels: str = "1.0",
    seeds: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    output: str | None = None,
    cache: str | None = None,
    allow_missing_classes: bool = False,
) -> None:
    """Score an encoder by a linear classifier on its frozen features.

    Args:
        encoder: a run, a bundle, a .ckpt file, timm:NAME, hf-hub:ID, random:NAME, pixels:SIZE or histogram:BINS.
        data: the labelled images.
        method: lbfgs, logistic regression to its optimum; grid, the best of 16 probes trained by SGD; or sgd, the
            paper's protocol with random crops, which runs the encoder in every epoch.
        l2: weight of the penalty of lbfgs; where not given, chosen among 45 on a part of the training images.
        epochs: of grid and sgd.
        labels: those used of the training images: a fraction, k of every class as in 5-shot, or a list file.
        seeds: draws of the labels; 5 of k-shot, else 1, where not given.
        seed: of the first draw, and of the part that choices are made on.
        batch_size: images a forward.
        device: cpu, cuda, mps; auto takes the best there is.
        output: file of the JSON manifest; must not exist.
        cache: folder in which features are kept, and found by the next evaluation of the same encoder and images.
        allow_missing_classes: goes on where a class has no training or no test image; see the note in the manifest.
    """
    settings = {"method": method, "l2": l2, "epochs": epochs, "labels": labels, "seeds": seeds, "seed": seed}
    settings |= {"cache": cache, "allow_missing_classes": allow_missing_classes}
    _evaluate(evaluate_linear, encoder, data, batch_size, device, output, **settings)


def _neighbor_counts(k: int | str) -> int | tuple[int, ...]:
    if isinstance(k, int):
        return k
    try:
        return tuple(int(number) for number in k.split(","))
    except ValueError:
        raise InputError(f"--k {k}: wanted whole numbers, such as 200 or 200,20,10") from None


def _evaluate(
    evaluate: Callable[..., Manifest],
    spec: str,
    data: EvaluationData,
    batch_size: int,
    device: str,
    output: str | None,
    **settings: Any,
) -> None:
    check_before_work(output, batch_size)
    LabelBudget.parse(settings["labels"]).seeds(settings["seeds"], settings["seed"])  # before anything is opened
    encoder, transform, train, test = open_evaluated(spec, data)
    with launched_ranks() as ranks, killed_workers_explained():
        manifest = evaluate(
            encoder,
            transform,
            train,
            test,
            batch_size=batch_size,
            num_workers=data.workers(train),
            device=chosen_device(device),
            spec=spec,
            **settings,
        )
    if ranks.rank:
        return
    manifest.print_table()
    if output is not None:
        manifest.write(output)
