"""Encoding a large batch in pieces, so that the activations of one piece at a time are alive."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def encode_in_chunks(encoder: nn.Module, x: Tensor, chunk_size: int) -> Tensor:
    """``encoder(x)`` in chunks of ``chunk_size`` views, each run again in the backward pass.

    The gradient is that of one loss over all views, as in GradCache (Gao et al. 2021), by activation checkpointing.
    Batch norm's statistics are those of a chunk (over all ranks where it is global), not of the whole batch; its
    running statistics are updated once a chunk.

    Args:
        x: (M, C, H, W).

    Returns:
        (M, D).
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _frozen_running_statistics(encoder)

    chunks = [checkpoint(encoder, part, use_reentrant=False, context_fn=contexts) for part in x.split(chunk_size)]
    return torch.cat(chunks)


@contextmanager
def _frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Normalises by the batch as in training, but leaves running statistics alone: the first forward updated them."""
    norms = [module for module in module.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [(count, count.clone()) for norm in norms if (count := norm.num_batches_tracked) is not None]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, before in counts:
            # By value: the second forward breaks off as soon as backward has all it needs, maybe before the last norm.
            count.copy_(before)
