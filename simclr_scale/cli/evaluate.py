"""``simclr-scale knn`` and ``simclr-scale linear``: an encoder's score on a labelled data set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simclr_scale.bundle import load_encoder
from simclr_scale.cli.parsing import OneLineErrors
from simclr_scale.data.sources import Source, open_source
from simclr_scale.data.workers import default_workers, killed_workers_explained
from simclr_scale.errors import InputError
from simclr_scale.evaluation import Manifest, evaluate_knn, evaluate_linear, require_new_file


@dataclass
class EvaluationData:
    """The labelled images to evaluate on.

    Attributes:
        source: a folder of classes, torch/NAME, hfds/PATH_OR_ID or textures.
        root: where torch/NAME finds its files.
        train_split: name of the split whose labels are used; found where not given.
        test_split: name of the split that is scored; found where not given.
        image_key: column of images; found by type where not given.
        label_key: column of labels; found by type where not given.
        seed: of the split, where the source has none of its own, and of textures.
        num_workers: processes that decode images; one a core, up to 8, where not given.
    """

    source: str
    root: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    seed: int = 0
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for name, value in {"seed": self.seed, "num_workers": self.num_workers}.items():
            if value is not None and value < 0:
                raise InputError(f"data.{name} must be 0 or above, got {value}")

    def open(self) -> tuple[Source, Source]:
        """The train and the test part."""
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
            )
            for split in ("train", "test")
        )
        return train, test

    def workers(self, source: Source) -> int:
        """Decoding what is in memory already is not worth a process."""
        if self.num_workers is not None:
            return self.num_workers
        return 0 if hasattr(source, "pixels") else default_workers()


def knn(argv: list[str]) -> None:
    """``simclr-scale knn``."""
    _run("knn", run_knn, argv)


def linear(argv: list[str]) -> None:
    """``simclr-scale linear``."""
    _run("linear", run_linear, argv)


def run_knn(
    encoder: str,
    data: EvaluationData,
    k: int = 200,
    temperature: float = 0.07,
    batch_size: int = 256,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Score an encoder by a weighted vote of the nearest training images (exact cosine neighbours).

    Args:
        encoder: a run, a bundle, a .ckpt file, timm:NAME, hf-hub:ID, random:NAME, pixels:SIZE or histogram:BINS.
        data: the labelled images.
        k: neighbours that vote.
        temperature: of their weights, exp(similarity / temperature).
        batch_size: images a forward.
        device: cpu, cuda, mps; auto takes the best there is.
        output: file of the JSON manifest; must not exist.
    """
    _evaluate(evaluate_knn, encoder, data, batch_size, device, output, k=k, temperature=temperature)


def run_linear(
    encoder: str,
    data: EvaluationData,
    l2: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Score an encoder by multinomial logistic regression on its frozen features.

    Args:
        encoder: a run, a bundle, a .ckpt file, timm:NAME, hf-hub:ID, random:NAME, pixels:SIZE or histogram:BINS.
        data: the labelled images.
        l2: weight of the penalty; where not given, chosen among 45 on a part of the training images.
        seed: of that part.
        batch_size: images a forward.
        device: cpu, cuda, mps; auto takes the best there is.
        output: file of the JSON manifest; must not exist.
    """
    _evaluate(evaluate_linear, encoder, data, batch_size, device, output, l2=l2, seed=seed)


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
    encoder, transform = load_encoder(spec)
    train, test = data.open()
    with killed_workers_explained():
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
    manifest.print_table()
    if output is not None:
        manifest.write(output)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
