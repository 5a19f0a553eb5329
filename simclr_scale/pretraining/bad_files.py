"""Images that cannot be read: named in the run's folder, counted, and too many of them end the run."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist

from simclr_scale.data.datamodule import SimCLRDataModule
from simclr_scale.data.sources import Source
from simclr_scale.distributed import world
from simclr_scale.errors import InputError
from simclr_scale.pretraining.progress import RunProgress

BAD_FILES = "bad_files.txt"
_JUDGED_AFTER = 100
_SHARED_EVERY = 20  # steps; ranks tell one another what they met
_SHOWN = 5
_CHANCE = 1e-6


class BadFiles(pl.Callback):
    """Keeps ``bad_files.txt``: the images that could not be read, each once, as where it is, a tab and the reason.

    Ranks share what they meet, and rank 0 writes; so all of them stop together where it is too much. A resumed run
    adds to the file. Held-out images that the kNN score leaves out are in it too, but do not count.

    Args:
        folder: of the run; None writes no file.

    Raises:
        InputError: while training, when more than the data module's ``max_bad_fraction`` of the training images are
            unreadable; see :func:`too_many`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = folder / BAD_FILES if folder is not None else None
        self.unreadable: dict[int, str] = {}  # training images, of all ranks
        self._held_out: set[int] = set()
        self._named: set[str] = set()
        self._shown = 0

    def state_dict(self) -> dict[str, Any]:
        return {"unreadable": dict(sorted(self.unreadable.items()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.unreadable = dict(state_dict["unreadable"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.path is not None and trainer.is_global_zero and self.path.exists():
            self._named = {line.partition("\t")[0] for line in _whole_lines(self.path)}
        self._share(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if world().size == 1 or trainer.global_step % _SHARED_EVERY == 0:
            self._share(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._share(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._share(trainer, judge=False)

    def _share(self, trainer: Any, *, judge: bool = True) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, SimCLRDataModule):
            return
        train, held_out = (
            {index: reason for index, reason in sorted(_all_ranks(met).items()) if index not in known}
            for met, known in ((data.unreadable, self.unreadable), (data.unreadable_held_out, self._held_out))
        )
        self.unreadable |= train
        self._held_out |= held_out.keys()
        if trainer.is_global_zero:
            assert data.train_source is not None
            self._name(trainer, data.train_source, train)
            if data.test_source is not None:
                self._name(trainer, data.test_source, held_out)
        if judge and self.unreadable:
            self._judge(data, trainer.global_step * data.global_batch_size)

    def _name(self, trainer: Any, source: Source, unreadable: Mapping[int, str]) -> None:
        lines = []
        for index, reason in unreadable.items():
            where = source.describe(index)
            escaped = where.replace("\n", "\\n").replace("\t", "\\t")
            if escaped not in self._named:
                self._named.add(escaped)
                lines.append(f"{escaped}\t{reason.removeprefix(f'{where}: ')}\n")
                self._tell(trainer, reason)
        if lines and self.path is not None:
            with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(lines)

    def _tell(self, trainer: Any, reason: str) -> None:
        self._shown += 1
        progress = trainer.progress_bar_callback
        if isinstance(progress, RunProgress) and self._shown <= _SHOWN:
            more = f"; further ones are named in {self.path}" if self._shown == _SHOWN and self.path else ""
            progress.say(f"{reason}; it is left out or replaced{more}")

    def _judge(self, data: SimCLRDataModule, seen: int) -> None:
        assert data.train_source is not None
        count, images = len(self.unreadable), len(data.train_source)
        if too_many(count, seen, images, data.max_bad_fraction):
            named = f"{self.path} names them" if self.path else "the first"
            raise InputError(
                f"{count:,} of the {images:,} training images cannot be read, after {min(seen, images):,} were seen: "
                f"more than data.max_bad_fraction {data.max_bad_fraction:g} allows; {named}: "
                f"{min(self.unreadable.items())[1]}"
            )


def too_many(unreadable: int, seen: int, num_images: int, max_fraction: float) -> bool:
    """Whether so many unreadable images are more than a share of the data set.

    Nothing is judged before 100 images were seen. Then it is too many when the count itself is more than the share of
    all images, or when what was seen leaves no doubt that it will be: by Chernoff's bound on the binomial tail,
    exp(-n KL(k / n, p)), a data set that keeps the limit fails so with a chance below one in a million. A single
    bad image is never too many, unless the limit is 0.

    Args:
        unreadable: different images that could not be read.
        seen: images asked for since the run began, in all its epochs.
        num_images: size of the data set.
        max_fraction: the limit, 0 to 1.
    """
    if seen < _JUDGED_AFTER or not unreadable:
        return False
    if unreadable > (max(1.0, max_fraction * num_images) if max_fraction > 0 else 0):
        return True
    seen = min(seen, num_images)
    share = min(1.0, unreadable / seen)
    if share <= max_fraction:
        return False
    divergence = share * math.log(share / max_fraction)
    if share < 1:
        divergence += (1 - share) * math.log((1 - share) / (1 - max_fraction))
    return seen * divergence > -math.log(_CHANCE)


def _all_ranks(met: dict[int, str]) -> dict[int, str]:
    if world().size == 1:
        return met
    gathered: list[Any] = [None] * world().size
    dist.all_gather_object(gathered, met)
    return {index: reason for part in gathered for index, reason in part.items()}


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file; one that was cut off when the run was killed is taken away."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    whole, newline, rest = text.rpartition("\n")
    if rest:
        os.truncate(path, len((whole + newline).encode("utf-8", errors="surrogateescape")))
    return whole.split("\n")
