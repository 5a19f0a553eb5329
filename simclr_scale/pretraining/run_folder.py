"""The folder of a run: who may write there, and what it holds at the end."""

import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from simclr_scale import __version__
from simclr_scale.bundle import ImageTransform, save_encoder
from simclr_scale.errors import InputError
from simclr_scale.models import ProjectionHead
from simclr_scale.pretraining.bad_files import BadFiles
from simclr_scale.pretraining.bad_steps import BadSteps
from simclr_scale.pretraining.data_wait import DataWait
from simclr_scale.pretraining.knn_monitor import KNNMonitor, baselines_for, labelled_images
from simclr_scale.pretraining.logger import RunLogger
from simclr_scale.pretraining.run_lock import RunLock
from simclr_scale.pretraining.sharding import whole_encoder, whole_head

CONFIG = "config.yaml"
_Callback = TypeVar("_Callback", bound=pl.Callback)
_LABELS = {
    "raw_pixels": "raw pixels",
    "color_histogram": "colour histogram",
    "grey_histogram": "grey histogram",
    "band_histogram": "histogram of each band",
    "untrained": "untrained encoder",
    "trained": "trained encoder",
}


def _callback(trainer: Any, kind: type[_Callback]) -> _Callback | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


class SummaryFacts(pl.Callback, ABC):
    """A callback that has something to say in ``summary.json``."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """JSON values by key; asked on the first rank, after the last hook of training."""


class RunFolder(pl.Callback):
    """Writes ``config.yaml`` at the start of a run, and ``encoder/`` and ``summary.json`` at its end.

    Args:
        folder: ``runs/NAME``. A new run must not exist yet; a resumed one must.
        config: the complete configuration as YAML.
        resumed: whether this continues a run.
    """

    def __init__(self, folder: Path, config: str, *, resumed: bool, console: Console | None = None) -> None:
        self.folder, self.config, self.resumed = folder, config, resumed
        self.console = console or Console()
        self._lock = RunLock(folder)
        self._seconds_before = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - getattr(self, "_start", time.monotonic())

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.monotonic()
        taken = self._take() if trainer.is_global_zero else None
        # All ranks end together, where the first one may not write.
        taken = trainer.strategy.broadcast(taken)
        if taken is not None:
            raise InputError(taken)

    def _take(self) -> str | None:
        """Makes or takes the folder; returns why that cannot be, if it cannot."""
        if not self.resumed:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.folder.mkdir()
            except FileExistsError:
                return f"run {self.folder} exists already; give another --name, or --resume auto"
        if not self._lock.acquire():
            return f"run {self.folder} is being trained by another process; give another --name, or end that one first"
        if not self.resumed:
            (self.folder / CONFIG).write_text(self.config)
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        self.console.print(f"run {self.folder}", highlight=False, soft_wrap=True)
        return None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._lock.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._lock.release()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.continue_from(trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        monitor = _callback(trainer, KNNMonitor)
        scores = monitor.scores(trainer, pl_module) if monitor is not None else {}
        encoder, head = pl_module.encoder, pl_module.head
        if pl_module.device_mesh is not None and hasattr(encoder, "architecture"):
            encoder, head = whole_encoder(encoder, everywhere=False), whole_head(head)
        if not trainer.is_global_zero:
            return
        # A start that found the run finished has measured nothing: what an earlier one has written of it stays.
        summary = self._written_before() | self._summary(trainer, monitor, scores)
        if pl_module.transform is not None and hasattr(pl_module.encoder, "architecture"):
            self._replace_encoder(encoder, head, pl_module.transform, summary)
        beside = self.folder / ".summary.json.partial"
        beside.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(beside, self.folder / "summary.json")
        self._tell(trainer, pl_module, scores)

    def _written_before(self) -> dict[str, Any]:
        file = self.folder / "summary.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def _summary(self, trainer: Any, monitor: KNNMonitor | None, scores: dict[str, float]) -> dict[str, Any]:
        data = trainer.datamodule
        facts: dict[str, Any] = {
            "source": data.source,
            "split": data.train_source.split_description,
            "train_images": len(data.train_source),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "global_batch_size": data.global_batch_size,
            "devices": trainer.world_size,
            "seed": data.seed,
            "seconds": round(self._seconds(), 1),
            "version": __version__,
        }
        if (bad_files := _callback(trainer, BadFiles)) is not None:
            facts["unreadable_images"] = len(bad_files.unreadable)
        if (bad_steps := _callback(trainer, BadSteps)) is not None:
            facts["bad_steps"] = bad_steps.total
        if (data_wait := _callback(trainer, DataWait)) is not None and data_wait.share is not None:
            facts["data_wait"] = round(data_wait.share, 4)
        if scores and monitor is not None:
            facts["knn_top1"] = {name: round(value, 4) for name, value in scores.items()}
            facts["knn"] = {
                "k": monitor.k,
                "temperature": monitor.temperature,
                "train_images": len(labelled_images(data.train_source, monitor.max_train_images)),
                "test_images": len(labelled_images(data.test_source)),
                "test_split": data.test_source.split_description,
            }
            if monitor.left_out:
                facts["knn"]["unreadable_images"] = monitor.left_out
        for callback in trainer.callbacks:
            if isinstance(callback, SummaryFacts):
                facts |= callback.facts()
        return facts

    def _replace_encoder(
        self, encoder: nn.Module, head: nn.Module | None, transform: ImageTransform, facts: dict[str, Any]
    ) -> None:
        """Writes the bundle; file by file where there is one of a former end of this run.

        Their architecture is the same, so the folder holds a whole bundle at every moment.
        """
        final, fresh = self.folder / "encoder", self.folder / ".encoder.partial"
        shutil.rmtree(fresh, ignore_errors=True)
        kept = head if type(head) is ProjectionHead else None
        save_encoder(encoder, transform, fresh, head=kept, **facts)
        if final.exists():
            # A bundle of an earlier version has no head, so what says that there is one comes last.
            for file in sorted(fresh.iterdir(), key=lambda file: file.name == "config.json"):
                os.replace(file, final / file.name)
            fresh.rmdir()
        else:
            os.replace(fresh, final)

    def _tell(self, trainer: Any, pl_module: Any, scores: dict[str, float]) -> None:
        source = trainer.datamodule.source
        say = self.console.print
        if scores:
            say(
                f"\nkNN accuracy on {len(trainer.datamodule.test_source):,} held-out images of {source}:",
                soft_wrap=True,
            )
            table = Table("features", box=box.ROUNDED)
            table.add_column("top-1", justify="right")
            labels = dict(_LABELS)
            labels["raw_pixels"] += f" ({baselines_for(pl_module.transform)['raw_pixels'].partition(':')[2]} px)"
            for name, value in scores.items():
                table.add_row(labels[name], f"{value:.1%}", style="bold" if name == "trained" else "")
            say(table)
        else:
            say(f"{source} has no labels, so there is no kNN score; try the encoder on a labelled set:", soft_wrap=True)
        say(f"The encoder is in [bold]{self.folder / 'encoder'}[/]. What to try next:", highlight=False, soft_wrap=True)
        held_out = source if scores else "FOLDER_OF_CLASSES"
        for command in (
            f"simclr-scale knn --encoder {self.folder} --data.source {held_out}",
            f"simclr-scale linear --encoder {self.folder} --data.source {held_out}",
            f'python -c "from simclr_scale import load_encoder; print(load_encoder({str(self.folder)!r})[1])"',
        ):
            say(f"  {command}", highlight=False, soft_wrap=True, markup=False)
