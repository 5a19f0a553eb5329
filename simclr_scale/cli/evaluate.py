"""``simclr-scale knn`` and ``simclr-scale linear``: an encoder's score on a labelled data set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from simclr_scale.bundle import BASELINES, ImageTransform, baseline, load_encoder
from simclr_scale.cli.parsing import OneLineErrors
from simclr_scale.cli.ranks import launched_ranks
from simclr_scale.data.pixels import channels_of, measure_value_range, size_of
from simclr_scale.data.sources import Source, open_source
from simclr_scale.data.sources.arrays import ChannelAxis
from simclr_scale.data.sources.grey import PICTURE_CHANNELS
from simclr_scale.data.sources.opening import DEFAULT_PATCH_SIZE
from simclr_scale.data.workers import default_workers, killed_workers_explained
from simclr_scale.errors import InputError
from simclr_scale.evaluation import LabelBudget, Manifest, evaluate_knn, evaluate_linear, require_new_file
from simclr_scale.evaluation.probes import EPOCHS


@dataclass
class EvaluationData:
    """The labelled images to evaluate on.

    Attributes:
        source: a folder of classes, torch/NAME, hfds/PATH_OR_ID, patches/FILE or textures.
        root: where torch/NAME finds its files.
        train_split: name of the split whose labels are used; found where not given.
        test_split: name of the split that is scored; found where not given.
        image_key: column of images, or variable of .mat files; found by type where not given.
        label_key: column of labels, or variable that labels a scene; found by type where not given.
        channel_axis: axis of arrays that is that of the channels, 0 or -1; found where not given.
        patch_size: side in pixels of the patches of patches/FILE.
        seed: of the split, where the source has none of its own, and of textures.
        num_workers: processes that decode images; one a core, up to 8, where not given.
    """

    source: str
    root: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    channel_axis: ChannelAxis | None = None
    patch_size: int = DEFAULT_PATCH_SIZE
    seed: int = 0
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for name, value in {"seed": self.seed, "num_workers": self.num_workers}.items():
            if value is not None and value < 0:
                raise InputError(f"data.{name} must be 0 or above, got {value}")

    def open(self, channels: int = 3, arrays: bool = False) -> tuple[Source, Source]:
        """The train and the test part, of images of so many channels; from arrays where there is a choice."""
        train, test = (
            open_source(
                self.source,
                root=self.root,
                split=split,
                train_split=self.train_split,
                test_split=self.test_split,
                image_key=self.image_key,
                label_key=self.label_key,
                seed=self.seed,
                channels=channels,
                arrays=arrays or channels not in PICTURE_CHANNELS,
                channel_axis=self.channel_axis,
                patch_size=self.patch_size,
            )
            for split in ("train", "test")
        )
        return train, test

    def workers(self, source: Source) -> int:
        """Decoding what is in memory already is not worth a process."""
        if self.num_workers is not None:
            return self.num_workers
        return 0 if hasattr(source, "pixels") or hasattr(source, "windows") else default_workers()


def knn(argv: list[str]) -> None:
    """``simclr-scale knn``."""
    _run("knn", run_knn, argv)


def linear(argv: list[str]) -> None:
    """``simclr-scale linear``."""
    _run("linear", run_linear, argv)


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


def _run(command: str, function: Callable[..., None], argv: list[str]) -> None:
    parser = OneLineErrors(
        prog=f"simclr-scale {command}",
        usage="%(prog)s --encoder ENCODER --data.source SOURCE [options]",
        description=(function.__doc__ or "").splitlines()[0],
    )
    parser.add_function_arguments(function, as_group=False)
    arguments = vars(parser.parse_args(argv))
    data = EvaluationData(**vars(arguments.pop("data")))
    function(data=data, **arguments)


def _evaluate(
    evaluate: Callable[..., Manifest],
    spec: str,
    data: EvaluationData,
    batch_size: int,
    device: str,
    output: str | None,
    **settings: Any,
) -> None:
    if output is not None:
        require_new_file(output)
    if batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {batch_size}")
    LabelBudget.parse(settings["labels"]).seeds(settings["seeds"], settings["seed"])  # before anything is opened
    encoder, transform, train, test = _open(spec, data)
    with launched_ranks() as ranks, killed_workers_explained():
        manifest = evaluate(
            encoder,
            transform,
            train,
            test,
            batch_size=batch_size,
            num_workers=data.workers(train),
            device=_device(device),
            spec=spec,
            **settings,
        )
    if ranks.rank:
        return
    manifest.print_table()
    if output is not None:
        manifest.write(output)


def _open(spec: str, data: EvaluationData) -> tuple[nn.Module, ImageTransform, Source, Source]:
    """The encoder, and images such as it takes.

    A transform that has no value range of its own takes that of the train part, where the images need one.
    """
    encoder, transform = load_encoder(spec)
    train, test = data.open(transform.channels, arrays=transform.value_range is not None)
    channels = channels_of(train)
    if channels != transform.channels and spec.partition(":")[0] in BASELINES:
        encoder, transform = baseline(spec, channels, min(64, *size_of(train.image(0))))
    if channels != transform.channels:
        raise InputError(
            f"--encoder {spec} takes images of {transform.channels} channels, those of {data.source} have {channels}"
        )
    if transform.value_range is None:
        transform = transform.with_value_range(measure_value_range(train, data.seed))
    return encoder, transform, train, test


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
