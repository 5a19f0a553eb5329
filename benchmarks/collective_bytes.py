"""A callback that watches every collective of a run's steps: `--trainer.callbacks+=collective_bytes.CollectiveBytes`.

It sees what torch dispatches on the thread that trains: on a CPU, all of it. Watching takes time of its own.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr_scale.pretraining.run_folder import SummaryFacts

_WATCHED = 64


class Watch(TorchDispatchMode):
    """Bytes that leave this rank by a ring, summed over collectives; those of at least so many bytes apart."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []
        self.ranks = ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace.startswith(("c10d", "_c10d")):
            name = func.name().split("::")[1].strip("_").split(".")[0].rstrip("_")
            given = [x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.seen.append((name, min(given, default=0) if "gather" in name else sum(given)))
        return func(*args, **(kwargs or {}))

    def sent(self, name: str, put_in: int) -> float:
        if "gather" in name:
            return (self.ranks - 1) * put_in
        return put_in if "broadcast" in name else 2 * (self.ranks - 1) / self.ranks * put_in


class CollectiveBytes(SummaryFacts):
    """Mean bytes of a step, over steps 2 to 65, as ``collective_bytes`` in ``summary.json``.

    ``weights`` are the all-reduces between the ends of backward passes and steps that carry more than the votes and
    batch norm do: buckets of gradients, or averages.
    """

    def __init__(self) -> None:
        self._watch: Watch | None = None
        self._steps = 0

    def facts(self) -> dict[str, Any]:
        assert self._watch is not None
        sent = [(name, put_in, self._watch.sent(name, put_in)) for name, put_in in self._watch.seen]
        weights = sum(leaving for name, put_in, leaving in sent if "reduce" in name and put_in >= self._least)
        every = sum(leaving for _, _, leaving in sent)
        return {"collective_bytes": {"all": every / self._steps, "weights": weights / self._steps}}

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        self._watch = Watch(trainer.world_size)
        # Batch norm's sums are two numbers a channel; the probe's are known.
        probe = sum(p.nbytes for p in pl_module.probe.parameters()) + 4 if pl_module.probe is not None else 0
        self._least = max(probe + 1, 8 * max(p.shape[0] for p in pl_module.parameters()) + 1)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if 0 < trainer.global_step <= _WATCHED:
            assert self._watch is not None
            self._watch.__enter__()
            self._steps += 1

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if 1 < trainer.global_step <= _WATCHED + 1:
            assert self._watch is not None
            self._watch.__exit__(None, None, None)
