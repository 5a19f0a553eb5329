"""SimCLR by local losses, as a class of its own."""

from typing import Any

from torch import nn

from simclr_scale.models.stages import Partition
from simclr_scale.pretraining.local_losses import LocalLosses
from simclr_scale.pretraining.simclr import SimCLR


class LocalSimCLR(SimCLR):
    """:class:`SimCLR` with ``local_losses``: one NT-Xent and one head for each stage, no gradient across stages.

    The configuration's ``model.local_losses`` makes the same of ``SimCLR``; checkpoints are interchangeable.

    Args:
        encoder, options: as for :class:`SimCLR`.
        partition, overlap, noise_std, expansion, full_resolution: see
            :class:`~simclr_scale.pretraining.local_losses.LocalLosses`.

    Raises:
        InputError: for an encoder that cannot be cut so, and for values out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        partition: Partition = "stages",
        overlap: int = 0,
        noise_std: float = 0.25,
        expansion: int = 2048,
        full_resolution: bool = False,
        **options: Any,
    ) -> None:
        local_losses = LocalLosses(partition, overlap, noise_std, expansion, full_resolution)
        super().__init__(encoder, local_losses=local_losses, **options)
