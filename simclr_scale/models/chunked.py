"""Encoding a large batch in pieces, so that the activations of one piece at a time are alive."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simclr_scale.distributed import GlobalBatchNorm, require_equal_across_ranks
from simclr_scale.errors import InputError


# Within a larger compiled function this is left to Python, but for the encoder: Dynamo traces no context of checkpoint.
@torch.compiler.disable(recursive=False)
def encode_in_chunks(
    encoder: nn.Module, x: Tensor, chunk_size: int, memory_format: torch.memory_format = torch.preserve_format
) -> Tensor:
    """``encoder(x)`` in chunks of at most ``chunk_size`` views, each but the last run again in the backward pass.

    The gradient is that of one loss over all views, as in GradCache (Gao et al. 2021), by activation checkpointing.
    There are as few chunks as can be, and their sizes differ by one at most, so that batch norm, whose statistics are
    those of a chunk (over all ranks where it is global), has no small remainder with wild ones. What the encoder
    changes in its forward, such as running statistics, changes once a chunk. Dropout and autocast are repeated; an
    output that depends on a buffer which the same forward changes (spectral norm's power iteration) is not.

    Args:
        x: (M, C, H, W), M equal on all ranks if the encoder has global batch norm.
        memory_format: to which each chunk is brought, rather than all of ``x``.

    Returns:
        (M, D).

    Raises:
        InputError: a chunk of one view leaves batch norm a single value a channel.
        ValueError: on every rank, if their M differ and a collective of batch norm would wait for ever.
    """
    norms = [
        module
        for module in encoder.modules()
        if isinstance(module, GlobalBatchNorm | nn.SyncBatchNorm) and getattr(module, "synchronised", True)
    ]
    if norms:
        require_equal_across_ranks(
            len(x), "number of views in a batch that is encoded in chunks", norms[0].process_group
        )

    def encode(part: Tensor) -> Tensor:
        features: Tensor = encoder(part.to(memory_format=memory_format))
        return features

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _on_copies_of_buffers(encoder)

    # Not split(chunk_size): 256 views at 85 would leave one view by itself.
    *parts, last = x.tensor_split(math.ceil(len(x) / chunk_size))
    with _gradients_of_casts_apart(), _error_of_one_view(len(last)):
        chunks = [checkpoint(encode, part, use_reentrant=False, context_fn=contexts) for part in parts]
        # Backward begins with the last chunk: its activations need not be dropped and made again.
        chunks.append(encode(last))
    return torch.cat(chunks)


@contextmanager
def _on_copies_of_buffers(encoder: nn.Module) -> Iterator[None]:
    """A second forward leaves no trace: the first one updated the running statistics.

    Copies rather than batch norm's momentum or flags: those are not only batch norm's to have, and for a compiled
    encoder other settings are another graph, which may not save the same activations.
    """
    buffers = [
        (module, name, buffer)
        for module in encoder.modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        # The second forward breaks off by an exception as soon as backward has all it needs.
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


@contextmanager
def _gradients_of_casts_apart() -> Iterator[None]:
    """Within: autocast casts a weight anew for each chunk.

    A cast kept from chunk to chunk would sum their gradients in its own precision, and bfloat16 loses the later ones
    of hundreds; so they are summed in that of the weight.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _error_of_one_view(rows: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if rows > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "model.chunk_size leaves a chunk of 1 view, of which batch norm has a single value a channel to normalise "
            "by at this image size; make it 2 or more"
        ) from error
