"""What a person sees while a run trains: one bar on a terminal, a line now and then in a file."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from simclr_scale.data.datamodule import SimCLRDataModule

_REFRESH_SECONDS = 0.5
_LINE_EVERY_SECONDS = 15.0


class RunProgress(ProgressBar):
    """Epoch, loss, contrastive accuracy, kNN, share of time waiting for data, images a second and time left."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def say(self, text: str) -> None:
        """Prints a line above the bar, on rank 0."""
        if self._enabled:
            self.console.print(text, highlight=False, soft_wrap=True)

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.say(" ".join(map(str, args)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        data = getattr(trainer, "datamodule", None)
        for note in data.notes() if isinstance(data, SimCLRDataModule) else ():
            self.say(note)
        self._total = int(trainer.estimated_stepping_batches)
        self._batch = pl_module.global_batch_size()
        self._shown = self._lined = time.monotonic()
        self._steps: list[tuple[float, int]] = [(time.monotonic(), trainer.global_step)]
        if self._enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=trainer.global_step, numbers="")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if not self._enabled or now - self._shown < _REFRESH_SECONDS:
            return
        self._shown = now
        # A rate over the last quarter of a minute follows a change of speed, but not a single slow step.
        self._steps = [point for point in self._steps if now - point[0] < 15][-60:] or self._steps[-1:]
        elapsed, steps = now - self._steps[0][0], trainer.global_step - self._steps[0][1]
        self._steps.append((now, trainer.global_step))
        rate = steps / elapsed if elapsed > 0 else 0.0
        epoch, numbers = self._text(trainer, rate)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=trainer.global_step, description=epoch, numbers=numbers)
        elif now - self._lined > _LINE_EVERY_SECONDS:
            self._lined = now
            self.say(f"{epoch}  step {trainer.global_step}/{self._total}  {numbers}")

    def _text(self, trainer: pl.Trainer, rate: float) -> tuple[str, str]:
        metrics = trainer.callback_metrics
        parts = []
        for key, label in {"loss": "loss", "contrastive_accuracy": "accuracy", "knn_top1": "kNN"}.items():
            if key in metrics:
                parts.append(f"{label} {float(metrics[key]):.3f}")
        if "data_wait" in metrics:
            parts.append(f"data wait {float(metrics['data_wait']):.0%}")
        if rate > 0:
            left = round((self._total - trainer.global_step) / rate)
            parts.append(f"{rate * self._batch:,.0f} images/s")
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        epochs = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        return f"epoch {trainer.current_epoch + 1}{epochs}", "  ".join(parts)

    def pause(self, trainer: pl.Trainer) -> None:
        """Time until the next batch is not training time (an evaluation runs)."""
        self._steps = [(time.monotonic(), trainer.global_step)]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.close()

    def close(self) -> None:
        """Gives the terminal back."""
        if self._bar is not None:
            if self._task is not None:
                self._bar.update(self._task, completed=self.trainer.global_step)
            self._bar.stop()
            self._bar = None
