"""The record of an evaluation: one number, and all that it takes to say what the number is of."""

import hashlib
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from simclr_scale import __version__
from simclr_scale.data.sources import Source
from simclr_scale.data.sources.base import targets_of
from simclr_scale.errors import InputError
from simclr_scale.evaluation.outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_LIBRARIES = ("torch", "timm", "faiss-cpu", "scipy", "numpy")


@dataclass(frozen=True)
class DatasetRecord:
    """What was evaluated on, or trained on: one split of one data set."""

    name: str
    split: str
    fingerprint: str
    images: int
    """Images used: those with a label that can be read; of few labels, those of one draw."""
    unlabelled: int
    """Images of the split left out for want of a label."""
    classes: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    """Labelled images left out because they cannot be read: where each is, and why."""

    @classmethod
    def of(cls, source: Source, unreadable: Mapping[int, str] = MappingProxyType({})) -> "DatasetRecord":
        """The labelled images of `source` but the unreadable ones, given by index with the reason."""
        targets = targets_of(source)
        labelled = int(((source.labels if targets is None else targets.max(axis=1)) >= 0).sum())
        return cls(
            name=source.name,
            split=source.split_description,
            fingerprint=source.fingerprint(),
            images=labelled - len(unreadable),
            unlabelled=len(source) - labelled,
            classes=tuple(source.classes),
            unreadable=tuple(unreadable[index] for index in sorted(unreadable)),
        )


@dataclass(frozen=True)
class EncoderRecord:
    """Which encoder gave the features, and how images were made ready for it."""

    spec: str
    """As the user named it; empty for a module handed over in Python."""
    fingerprint: str
    transform: str

    @classmethod
    def of(cls, encoder: nn.Module, transform: object, spec: str = "") -> "EncoderRecord":
        """`encoder` with its weights as they are now, and `transform` by its repr."""
        return cls(spec=spec, fingerprint=encoder_fingerprint(encoder), transform=repr(transform))


def encoder_fingerprint(encoder: nn.Module) -> str:
    """sha256 in hex over names, shapes, dtypes and bytes of the state dict, in its order.

    Equal for equal weights on any device; different after any change of a weight or of a batch norm's statistics.
    """
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        # numpy has no bfloat16, but every tensor has bytes.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def require_new_file(path: str | os.PathLike[str]) -> Path:
    """`path`, where a manifest can be written. Raises InputError if a file is there, or no folder to hold it.

    For a command to call before its work rather than after.
    """
    file = Path(path)
    if file.exists():
        raise InputError(f"{file} exists already; results are never overwritten, so name another file")
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}")
    return file


def write_json(content: Mapping[str, Any], file: Path) -> Path:
    """Writes `content` to `file`, whole or not at all; NaN is an error."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    return file


def library_versions() -> dict[str, str | None]:
    """Of this package and of those that the numbers depend on; None where one is not installed."""

    def of(library: str) -> str | None:
        try:
            return version(library)
        except PackageNotFoundError:
            return None

    return {"simclr-scale": __version__} | {library: of(library) for library in _LIBRARIES}


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Manifest:
    """One evaluation: `metric` of `encoder` on `test`, with the labels of `train`."""

    task: str
    """"knn", "linear", "transfer"."""
    metric: str
    """The name in `metrics.METRICS`: a value between 0 and 1."""
    values: tuple[float, ...]
    """The metric, once for each seed."""
    train: DatasetRecord
    test: DatasetRecord
    label_selection: str
    """Which labels of `train` were used: "all", "5-shot (class-balanced, seeds 0 to 4)"; the ids are in `details`."""
    encoder: EncoderRecord
    settings: Mapping[str, Any]
    """Every choice that the value depends on."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What came out beside the value: the strength chosen, iterations."""
    warnings: tuple[str, ...] = ()
    """What a reader of the value must know."""
    versions: Mapping[str, str | None] = field(default_factory=library_versions)
    created: str = field(default_factory=now)
    """UTC, ISO 8601."""
    outcome: Outcome | None = field(default=None, compare=False, repr=False)
    """The answers behind the values, image by image; not written to the file."""

    @property
    def mean(self) -> float:
        """Mean of `values`."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of `values` over seeds (n - 1 in the denominator); None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        """The content of the file: the fields, with `values` summed up under "value"."""
        return {
            "task": self.task,
            "metric": self.metric,
            "value": {"mean": self.mean, "std": self.std, "seeds": len(self.values), "each": list(self.values)},
            "train": vars(self.train),
            "test": vars(self.test),
            "label_selection": self.label_selection,
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
        """Prints the record for a reader, to standard output unless `console` says otherwise."""
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        spread = "" if self.std is None else f" ± {self.std:.2%} over {len(self.values)} seeds"
        rows = [
            (self.metric, Text(f"{self.mean:.2%}{spread}", style="bold green")),
            ("encoder", Text(f"{self.encoder.spec or 'a module'}, {_short(self.encoder.fingerprint)}")),
            ("transform", Text(self.encoder.transform)),
            ("train", _described(self.train, f"labels: {self.label_selection}")),
            ("test", _described(self.test)),
            ("settings", _listed(self.settings)),
            ("details", _listed(self.details)),
            ("versions", _listed(self.versions)),
        ]
        table = Table(title=f"{self.task} evaluation", title_style="bold", show_header=False, box=box.ROUNDED)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in rows:
            if text.plain:
                table.add_row(label, text)
        for warning in self.warnings:
            table.add_row("note", Text(warning, style="yellow"))
        (console or Console()).print(table)


def _short(fingerprint: str) -> str:
    return f"sha256 {fingerprint[:12]}"


def _described(dataset: DatasetRecord, *more: str) -> "Text":
    from rich.text import Text

    facts = (f"{dataset.images:,} images", f"{len(dataset.classes)} classes", *more, _short(dataset.fingerprint))
    return Text(f"{dataset.name}, {dataset.split}\n{', '.join(facts)}")


def _listed(facts: Mapping[str, Any]) -> "Text":
    from rich.text import Text

    return Text(", ".join(f"{key} {_brief(value)}" for key, value in facts.items() if value not in ([], None)))


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_brief(part)}" for key, part in value.items())
    if not isinstance(value, list):
        return str(value)
    if len(value) == 1 and isinstance(value[0], int | float | str):
        return _brief(value[0])
    if value and isinstance(value[0], float):
        return f"{len(value)} from {min(value):.4g} to {max(value):.4g}"
    return f"{len(value)} in the file"
