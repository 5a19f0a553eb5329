"""Training on the meshes of tests: what a rank of a pool does."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from simclr_scale.models import ProjectionHead, create_encoder
from simclr_scale.optim import LARS
from simclr_scale.pretraining import SimCLR
from simclr_scale.pretraining.sharding import whole_weights
from simclr_scale.pretraining.strategies import MeshStrategy
from tests.pretraining.runs import CLASSES, Pairs, fit
from tests.pretraining.test_ranks import Pool

BATCH, BATCHES, EPOCHS = 8, 2, 2
STEPS = BATCHES * EPOCHS

ENCODERS: dict[str, Callable[[], nn.Module]] = {
    # Three heads would not divide; the norms are layer norms, and the head's are batch norms over all ranks.
    "vit": lambda: create_encoder("test_vit", img_size=16, patch_size=8),
    "resnet": lambda: create_encoder("simclr_resnet_tiny", channels=(4, 6, 8)),
}
OPTIMIZERS: dict[str, Any] = {
    "lars": partial(LARS, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "adamw in lists": partial(torch.optim.AdamW, foreach=True),
}
RATES = {"lars": 30.0, "adamw": 0.03, "adamw in lists": 0.03}


class Losses(pl.Callback):
    """Of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.values.append(trainer.callback_metrics["loss"].item())


class Shares:
    """The batches of one rank: its part of every global batch."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        share = BATCH // self.size
        for batch in range(BATCHES):
            start = batch * BATCH + self.rank * share
            yield list(range(start, start + share))


def model(encoder: str, optimizer: str, seed: int = 0, **options: Any) -> SimCLR:
    torch.manual_seed(seed)
    made = ENCODERS[encoder]()
    head = ProjectionHead(int(made.num_features), hidden_features=12, out_features=7)
    for module in (*made.modules(), *head.modules()):
        # The last gamma of a block starts at 0, and gradients would be 0 too; the head's weights are small.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return SimCLR(
        made,
        head=head,
        optimizer=OPTIMIZERS[optimizer],
        learning_rate=RATES[optimizer],
        temperature=0.2,
        warmup_epochs=0,
        probe_classes=CLASSES,
        **options,
    )


def train(
    module: SimCLR,
    rank: int = 0,
    mesh: tuple[int, int] | None = None,
    *callbacks: pl.Callback,
    whole: bool = False,
    **options: Any,
) -> list[float]:
    """Four steps in float64, in one process or on a mesh; the losses, and ``module`` is what it became."""
    losses = Losses()
    ranks = 1 if mesh is None else mesh[0] * mesh[1]
    data_rank, data_ranks = (0, 1) if mesh is None else (rank // mesh[1], mesh[0])
    strategy: Any = "auto"
    if mesh is not None:
        strategy = MeshStrategy(*mesh, save_distributed_checkpoint=not whole, process_group_backend="gloo")
    ckpt_path = options.pop("ckpt_path", None)
    # A plain DataLoader, as anyone's; the data module's own shares are another test's.
    data = Pairs(BATCH * BATCHES)
    data.views = data.views.double()
    loader = DataLoader(data, batch_sampler=Shares(data_rank, data_ranks))  # type: ignore[arg-type]
    module.double()  # Lightning's 64-true is not for meshes
    module.global_batch_size = lambda: BATCH  # type: ignore[method-assign]  # a batch sampler tells none
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            fit(
                module,
                losses,
                *callbacks,
                data=loader,
                ckpt_path=ckpt_path,
                devices=ranks,
                strategy=strategy,
                plugins=[] if mesh is None else [Pool(rank, ranks)],
                max_epochs=EPOCHS,
                log_every_n_steps=1,
                use_distributed_sampler=False,
                **options,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    return losses.values


def weights(module: SimCLR) -> dict[str, Tensor]:
    """Whole, on every rank."""
    if module.device_mesh is None:
        return {key: value.clone() for key, value in module.state_dict().items()}
    return whole_weights(module, everywhere=True)


def save_to(path: Path) -> pl.Callback:
    """Writes a checkpoint after the first epoch."""

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    return Save()
