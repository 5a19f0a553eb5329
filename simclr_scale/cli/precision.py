"""The precision "auto": bfloat16 where the device computes in it, float32 elsewhere."""

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.trainer import _PRECISION_INPUT


class Trainer(pl.Trainer):
    """Lightning's Trainer, which also takes the precision "auto"."""

    def __init__(self, *, precision: _PRECISION_INPUT | Literal["auto"] | None = None, **kwargs: Any) -> None:
        if precision == "auto":
            precision = fastest_precision(kwargs.get("accelerator", "auto"))
        super().__init__(precision=precision, **kwargs)


def fastest_precision(accelerator: object) -> Literal["bf16-mixed", "32-true"]:
    """``bf16-mixed`` where the device has instructions for it, else ``32-true``.

    A CPU without them computes bfloat16 in software: the quickstart's encoder is then some seven times slower than in
    float32 (AMD Zen 3).

    Args:
        accelerator: as Lightning's Trainer takes it.
    """
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("cpu", "auto") and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16-mixed"
    return "32-true"
