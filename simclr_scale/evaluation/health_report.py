"""A health report on an encoder and images without labels: from both to a record of all measures."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import normalize

from simclr_scale.bundle import ImageTransform
from simclr_scale.data.augmentation import Augmentation
from simclr_scale.data.sampler import Key
from simclr_scale.data.sources import Source
from simclr_scale.data.views import ViewsDataset, finish_views, keep
from simclr_scale.errors import InputError
from simclr_scale.evaluation.features import extract_features, image_loader
from simclr_scale.evaluation.health import (
    ALPHA_RANKS,
    alignment,
    collapse_warnings,
    constant_features,
    effective_rank,
    power_law_exponent,
    spectrum,
    spread,
    uniformity,
)
from simclr_scale.evaluation.manifest import (
    DatasetRecord,
    EncoderRecord,
    library_versions,
    now,
    require_new_file,
    write_json,
)
from simclr_scale.evaluation.progress import show_progress

if TYPE_CHECKING:
    from rich.console import Console

_DIGITS = 3
_MEANING = {
    "rankme": "effective rank of the features, 1 to {rank}; higher is better",
    "rankme_centered": "the same without their mean",
    "alpha_req": "decay of the spectrum; near 1 is best",
    "alignment": "distance of two views of an image; lower is better",
    "uniformity": "how evenly images lie on the sphere; lower is better, 0 is one point",
    "spread": "half the mean squared distance of images, 0 to 1; 0 is one point",
    "constant_features": "of {width} features",
}


@dataclass(frozen=True)
class HealthReport:
    """What can be said of an encoder without labels. See `simclr_scale.evaluation.health` for each measure."""

    values: Mapping[str, float | int | None]
    """rankme, rankme_centered, alpha_req, alignment, uniformity, spread, constant_features. `alpha_req` is None where
    too few eigenvalues are above 0 to fit it."""
    images: DatasetRecord
    encoder: EncoderRecord
    settings: Mapping[str, Any]
    """Every choice that the values depend on."""
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    """Collapse, and what else a reader of the values must know."""
    versions: Mapping[str, str | None] = field(default_factory=library_versions)
    created: str = field(default_factory=now)
    """UTC, ISO 8601."""

    def as_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "task": "health",
            "values": dict(self.values),
            "images": vars(self.images),
            "encoder": vars(self.encoder),
            "settings": dict(self.settings),
            "details": dict(self.details),
            "warnings": list(self.warnings),
            "versions": dict(self.versions),
            "created": self.created,
        }

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes JSON to `path`, whole or not at all. Raises InputError as `require_new_file` does."""
        return write_json(self.as_dict(), require_new_file(path))

    def print_table(self, console: "Console | None" = None) -> None:
        """Prints the report for a reader, to standard output unless `console` says otherwise."""
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        width = self.details["num_features"]
        sizes = {"width": f"{width:,}", "rank": f"{min(width, self.images.images):,}"}
        table = Table(title="health without labels", title_style="bold", show_header=False, box=box.ROUNDED)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.values.items():
            text = "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.{_DIGITS}f}"
            table.add_row(name, Text.assemble((text, "bold green"), "  ", _MEANING[name].format(**sizes)))
        table.add_row("encoder", Text(f"{self.encoder.spec or 'a module'}, sha256 {self.encoder.fingerprint[:12]}"))
        table.add_row("images", Text(f"{self.images.images:,} of {self.images.name}, {self.images.split}"))
        for warning in self.warnings:
            table.add_row("note", Text(warning, style="yellow"))
        (console or Console()).print(table)


def evaluate_health(
    encoder: nn.Module,
    transform: ImageTransform,
    source: Source,
    augmentation: Augmentation,
    *,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    spec: str = "",
) -> HealthReport:
    """Rank, spectrum, alignment, uniformity and signs of collapse, of all images of `source`; labels are not looked at.

    Rank, spectrum and uniformity are those of the images as `transform` makes them. Alignment is that of two views of
    each image by `augmentation`, the ones that training with `seed` would see in epoch 0, at the size of `transform`.
    Memory holds three feature vectors an image.

    Args:
        encoder: images (B, C, H, W) in, features (B, D) out; left in the mode and on the device it is found.
        transform: as the encoder wants images in evaluation; of as many channels as `source`.
        source: at least two images that can be read; others are left out and named in the report.
        augmentation: one that the channels of the images allow.
        seed: of the views.
        batch_size: images the encoder takes at once; of views half as many.
        num_workers: processes that read images.
        device: where the encoder runs; None for where it is.
        spec: how the user named the encoder, for the report.

    Raises:
        InputError: fewer than two images can be read, the encoder takes images that are not square, the augmentation
            makes no sense for the channels, or the features are not finite.
    """
    side, width = transform.config["input_size"][1:]
    if side != width:
        raise InputError(f"the encoder takes images of {side} x {width} pixels, and views are square")
    augmentation.require_channels(transform.channels)
    unreadable: dict[int, str] = {}
    loader = image_loader(source, transform, batch_size=batch_size, num_workers=num_workers)
    with show_progress("features", len(source), "images") as progress:
        features, _, indices = extract_features(
            encoder, loader, device=device, progress=progress, unreadable=unreadable
        )
    if len(features) < 2:
        raise InputError(f"{source.name}: {len(features)} image can be read, and health is judged by several")
    views = _view_batches(source, transform, augmentation, seed, indices.numpy(), max(1, batch_size // 2), num_workers)
    with show_progress("features of views", 2 * len(features), "views") as progress:
        of_views, _, _ = extract_features(encoder, views, device=device, progress=progress)

    found = spectrum(features)
    warnings = list(collapse_warnings(features, found=found))
    try:
        alpha: float | None = power_law_exponent(found.centered)
    except InputError as error:
        alpha = None
        warnings.append(f"no alpha_req: {error}")
    if unreadable:
        first = unreadable[min(unreadable)]
        warnings.append(
            f"{len(unreadable):,} of {len(source):,} images cannot be read and are left out; the first: {first}"
        )
    return HealthReport(
        values={
            "rankme": effective_rank(found.raw),
            "rankme_centered": effective_rank(found.centered),
            "alpha_req": alpha,
            "alignment": alignment(of_views[0::2], of_views[1::2]),
            "uniformity": uniformity(features),
            "spread": spread(features),
            "constant_features": constant_features(features),
        },
        images=DatasetRecord(
            name=source.name,
            split=source.split_description,
            fingerprint=source.fingerprint(),
            images=len(features),
            unlabelled=0,
            classes=(),
            unreadable=tuple(unreadable[index] for index in sorted(unreadable)),
        ),
        encoder=EncoderRecord.of(encoder, transform, spec),
        settings={
            "alpha_ranks": list(ALPHA_RANKS),
            "alignment_power": 2.0,
            "uniformity_t": 2.0,
            "seed": seed,
            "augmentation": asdict(augmentation),
        },
        details={"num_features": features.shape[1]},
        warnings=tuple(warnings),
    )


def _view_batches(
    source: Source,
    transform: ImageTransform,
    augmentation: Augmentation,
    seed: int,
    indices: np.ndarray,
    batch_size: int,
    num_workers: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Both views of the images at `indices`, for `extract_features`: view v of the nth has the index 2 n + v."""
    side = transform.config["input_size"][1]
    dataset = ViewsDataset(source, augmentation, side, seed, value_range=transform.value_range)
    batches: Sequence[list[Key]] = [
        [Key(0, int(index), number) for index in indices[start : start + batch_size]]
        for number, start in enumerate(range(0, len(indices), batch_size))
    ]
    done = 0
    for batch in DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=keep):
        if bad := batch.get("unreadable"):
            raise InputError(f"an image that could be read before cannot be read now: {bad[0][1]}")
        inputs = normalize(
            finish_views(batch, augmentation, side)["inputs"], transform.config["mean"], transform.config["std"]
        )
        count = len(inputs) // 2
        places = 2 * torch.arange(done, done + count)
        yield {
            "image": inputs,
            "label": torch.full((2 * count,), -1),
            "index": torch.cat([places, places + 1]),
        }
        done += count
