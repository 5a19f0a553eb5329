"""``simclr-scale health``: how healthy an encoder's features are, without labels."""

from dataclasses import dataclass
from typing import Literal

from simclr_scale.bundle import ImageTransform
from simclr_scale.cli.evaluated import EvaluationData, check_before_work, chosen_device, open_evaluated, run_on_data
from simclr_scale.data.augmentation import Augmentation, Preset, resolve
from simclr_scale.data.sources import Source
from simclr_scale.data.sources.joined import JoinedSource
from simclr_scale.data.subsets import take_subset
from simclr_scale.data.workers import killed_workers_explained
from simclr_scale.errors import InputError
from simclr_scale.evaluation import evaluate_health

_SMALL_IMAGE = 64


@dataclass
class HealthData(EvaluationData):
    """The images to judge by; labels are not needed.

    Attributes:
        source: a folder of images or arrays, torch/NAME, hfds/PATH_OR_ID, wds/PATTERN, patches/FILE or textures.
        root: where torch/NAME finds its files.
        train_split: name of the train split; found where not given.
        test_split: name of the held-out split; found where not given.
        image_key: column of images, or variable of .mat files; found by type where not given.
        label_key: column of labels, or variable that labels a scene; found by type where not given.
        channel_axis: axis of arrays that is that of the channels, 0 or -1; found where not given.
        patch_size: side in pixels of the patches of patches/FILE.
        seed: of the split, where the source has none of its own, of the choice of images, and of the views.
        num_workers: processes that decode images; one a core, up to 8, where not given.
        images: which part of the source, test, train or all; held-out ones where there are any, where not given.
        max_images: images at most, class-balanced where there are labels.
    """

    images: Literal["test", "train", "all"] | None = None
    max_images: int = 25_600

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_images < 2:
            raise InputError(f"data.max_images must be at least 2, got {self.max_images}")

    def open(self, channels: int = 3, arrays: bool = False) -> tuple[Source, Source]:
        """The train part, of which a range of values is measured, and the images to judge by."""
        train = self.part("train", channels, arrays)
        judged = self._judged(train, channels, arrays)
        return train, take_subset(judged, min(self.max_images, len(judged)), self.seed)

    def _judged(self, train: Source, channels: int, arrays: bool) -> Source:
        if self.images == "train":
            return train
        try:
            test = self.part("test", channels, arrays)
        except InputError:
            # Without labels and a split of its own, a data set is all train.
            if self.images == "test" or (train.labels >= 0).any() or self.test_split is not None:
                raise
            return train
        return JoinedSource([train, test]) if self.images == "all" else test


def main(argv: list[str]) -> None:
    """``simclr-scale health``."""
    run_on_data("health", run_health, "--encoder ENCODER --data.source SOURCE [options]", argv, HealthData)


def run_health(
    encoder: str,
    data: HealthData,
    preset: Preset | None = None,
    batch_size: int = 256,
    device: str = "auto",
    output: str | None = None,
) -> None:
    """Judge an encoder without labels: RankMe, alpha-ReQ, alignment, uniformity and signs of collapse.

    Args:
        encoder: a run, a bundle, a .ckpt file, timm:NAME, hf-hub:ID, random:NAME, pixels:SIZE or histogram:BINS.
        data: the images.
        preset: augmentation of the views for alignment, natural, small, grey or multiband; by channels and size
            where not given.
        batch_size: images a forward.
        device: cpu, cuda, mps; auto takes the best there is.
        output: file of the JSON manifest; must not exist.
    """
    check_before_work(output, batch_size)
    module, transform, _, images = open_evaluated(encoder, data)
    with killed_workers_explained():
        report = evaluate_health(
            module,
            transform,
            images,
            augmentation_for(transform, preset),
            seed=data.seed,
            batch_size=batch_size,
            num_workers=data.workers(images),
            device=chosen_device(device),
            spec=encoder,
        )
    report.print_table()
    if output is not None:
        report.write(output)


def augmentation_for(transform: ImageTransform, preset: Preset | None) -> Augmentation:
    """The one of that name, or the one for images such as the encoder takes."""
    if preset is None:
        small = max(transform.config["input_size"][1:]) <= _SMALL_IMAGE
        preset = {1: "grey", 3: "small" if small else "natural"}.get(transform.channels, "multiband")
    assert preset is not None
    return resolve(preset, {})
