"""Steps whose loss or gradient is not finite: skipped on all ranks, written down, and too many in a row end the run."""

import json
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from simclr_scale.distributed import all_gather, data_parallel_group
from simclr_scale.errors import InputError, RunFailed
from simclr_scale.optim.norms import local_norms, whole_norms
from simclr_scale.pretraining.agreement import Voter
from simclr_scale.pretraining.progress import RunProgress

BAD_STEPS = "bad_steps.jsonl"
_SHOWN = 5
_NAMED = 20
_BAD_GRADIENT, _BAD_LOSS = 1, 2


class BadSteps(pl.Callback, Voter):
    """Keeps what is not finite out of the weights.

    Where the loss or the norm of the gradient is infinite or NaN on any rank, no rank takes the step: weights,
    momentum and the probe stay, and running statistics go back to what they were before its forward pass. The step
    counts all the same: the schedule moves on, so that whatever is a function of the step, as are the order of images
    and the draws, is that of a run in which it went well, and a resumed run repeats it.

    Each is a line of ``bad_steps.jsonl``: epoch, step, place of the batch in its epoch, indices of its images over all
    ranks, loss, learning rate, norms, names of the parameters whose gradient is not finite, scale of the gradient
    scaler; see :func:`~simclr_scale.pretraining.replay.replay_batch`. Under a gradient scaler (float16) an overflow is
    how it finds its scale: it is neither counted nor written down, unless the loss itself is not finite or the scale
    is 1 or below.

    Args:
        max_bad_steps: so many in a row end the run. In a row, since single ones are harmless at any number, while a
            run that has diverged has no more good ones.
        folder: of the run; None writes no file.

    Raises:
        RunFailed: while training, on all ranks, at the last of ``max_bad_steps``.
    """

    def __init__(self, max_bad_steps: int = 10, folder: Path | None = None) -> None:
        if max_bad_steps < 1:
            raise InputError(f"max_bad_steps must be at least 1, got {max_bad_steps}")
        self.max_bad_steps = max_bad_steps
        self.path = folder / BAD_STEPS if folder is not None else None
        self.total = self.in_a_row = 0
        self._shown = 0
        self._buffers: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._batch: Any = None
        self._loss: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.in_a_row = state_dict["total"], state_dict["in_a_row"]

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        self._buffers = list(pl_module.buffers())
        self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        if self.path is not None and trainer.is_global_zero and self.path.exists():
            # What a resumed run had met later comes again. A line that was cut off is no record.
            lines = self.path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < trainer.global_step]
            self.path.write_text("".join(whole))

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch = batch
        pl_module.step_is_skipped = False
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self._loss = loss.detach()

    @torch.no_grad()
    def vote(self, trainer: Any, pl_module: Any) -> Tensor:
        gradients = [p.grad for p in _parameters(trainer) if p.grad is not None]
        assert self._loss is not None
        # Of this rank's shards: the ranks' votes together are about the whole.
        finite = torch.isfinite(torch.linalg.vector_norm(local_norms(gradients)))
        return torch.where(torch.isfinite(self._loss), torch.where(finite, 0, _BAD_GRADIENT), _BAD_LOSS).int()

    def decided(self, trainer: Any, pl_module: Any, vote: int) -> None:
        batch, self._batch = self._batch, None
        if not vote:
            self.in_a_row = 0
            return
        pl_module.step_is_skipped = True
        with torch.no_grad():
            for buffer, kept in zip(self._buffers, self._kept, strict=True):
                buffer.copy_(kept)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else None
        if scale is None or scale <= 1 or vote == _BAD_LOSS:
            self.total += 1
            self.in_a_row += 1
            self._report(trainer, pl_module, batch, scale)
        # Without gradients no optimizer touches a weight or its state.
        for parameter in _parameters(trainer):
            parameter.grad = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        if self.total:
            pl_module.log("bad_steps", float(self.total))

    def _report(self, trainer: Any, pl_module: Any, batch: Any, scale: float | None) -> None:
        record = self._record(trainer, pl_module, batch, scale)
        if self.path is not None and trainer.is_global_zero:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        what = f"loss {record['loss']} and gradient norm {record['gradient_norm']}"
        if self.in_a_row >= self.max_bad_steps:
            where = f"; {self.path} has them, the images too" if self.path is not None else ""
            raise RunFailed(
                f"{self.in_a_row} steps in a row were not finite, the last one step {record['step']} with {what}: "
                f"max_bad_steps allows no more{where}. The weights are those before them: resume with another "
                "model.learning_rate (--override true), or look at the images"
            )
        self._shown += 1
        progress = trainer.progress_bar_callback
        if isinstance(progress, RunProgress) and self._shown <= _SHOWN:
            more = f"; further ones are in {self.path}" if self._shown == _SHOWN and self.path is not None else ""
            progress.say(f"step {record['step']} is skipped: {what}{more}")

    @torch.no_grad()
    def _record(self, trainer: Any, pl_module: Any, batch: Any, scale: float | None) -> dict[str, Any]:
        assert self._loss is not None
        parameters = _parameters(trainer)
        with_gradient = [p for p in parameters if p.grad is not None]
        norms = whole_norms([p.grad for p in with_gradient if p.grad is not None])
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        bad = [
            names.get(id(p), "?")
            for p, norm in zip(with_gradient, norms.tolist(), strict=True)
            if not math.isfinite(norm)
        ]
        weights = torch.linalg.vector_norm(whole_norms([p.detach() for p in parameters]))
        return {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "batch": trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1,
            "indices": _indices(batch, data_parallel_group(pl_module.device_mesh)),
            "loss": _plain(self._loss) if scale is None else _plain(self._loss / scale),
            "learning_rate": next(group["lr"] for group in trainer.optimizers[0].param_groups),
            "gradient_norm": _plain(torch.linalg.vector_norm(norms)),
            "weight_norm": _plain(weights),
            "not_finite": bad[:_NAMED],
            "not_finite_count": len(bad),
            "scale": scale,
        }


def _parameters(trainer: Any) -> list[Tensor]:
    return [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]


def _indices(batch: Any, group: dist.ProcessGroup | None) -> list[int] | None:
    """Of the images of all ranks in the order of the global batch; None where the loader gives none."""
    index = batch.get("index") if isinstance(batch, dict) else None
    return all_gather(index, group).tolist() if isinstance(index, Tensor) else None


def _plain(value: Tensor) -> float | str:
    """A number, or "nan", "inf" or "-inf", which JSON has no numbers for."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
