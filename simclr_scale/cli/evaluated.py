"""An encoder and the images it is evaluated on, as the options of a command name them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from simclr_scale.bundle import BASELINES, ImageTransform, baseline, load_encoder
from simclr_scale.cli.parsing import parser_of
from simclr_scale.data.pixels import channels_of, measure_value_range, size_of
from simclr_scale.data.sources import Source, open_source
from simclr_scale.data.sources.arrays import ChannelAxis
from simclr_scale.data.sources.grey import PICTURE_CHANNELS
from simclr_scale.data.sources.opening import DEFAULT_PATCH_SIZE
from simclr_scale.data.workers import default_workers
from simclr_scale.errors import InputError
from simclr_scale.evaluation import require_new_file


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
        return self.part("train", channels, arrays), self.part("test", channels, arrays)

    def part(self, split: Literal["train", "test"], channels: int, arrays: bool) -> Source:
        """One of the two."""
        return open_source(
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

    def workers(self, source: Source) -> int:
        """Decoding what is in memory already is not worth a process."""
        if self.num_workers is not None:
            return self.num_workers
        return 0 if hasattr(source, "pixels") or hasattr(source, "windows") else default_workers()


def run_on_data(
    command: str,
    function: Callable[..., None],
    usage: str,
    argv: list[str],
    data: type[EvaluationData] = EvaluationData,
) -> None:
    """Calls `function`, whose argument `data` is of that class, with what the user gave as options of a command."""
    arguments = vars(parser_of(command, function, usage).parse_args(argv))
    function(data=data(**vars(arguments.pop("data"))), **arguments)


def check_before_work(output: str | None, batch_size: int) -> None:
    """Raises InputError where a result could not be written, or no image could go through an encoder."""
    if output is not None:
        require_new_file(output)
    if batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {batch_size}")


def open_evaluated(spec: str, data: EvaluationData) -> tuple[nn.Module, ImageTransform, Source, Source]:
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


def chosen_device(name: str) -> str:
    """The device of that name; of "auto", the best there is.

    Raises:
        InputError: there is no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return name
