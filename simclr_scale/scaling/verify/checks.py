"""The checks. Each runs on every rank at once, in one order, and tells what this rank found.

What ranks compute together is held against the same thing by torch's own modules on the whole batch in this process: a
definition of the loss in three lines, ``nn.BatchNorm``, one optimizer.
"""

import copy
import platform
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_scale import __version__
from simclr_scale.data.sampler import GlobalBatchSampler, Position, epoch_order
from simclr_scale.distributed import all_gather, convert_global_batch_norm, world
from simclr_scale.losses import NTXentLoss
from simclr_scale.models import ProjectionHead, create_encoder
from simclr_scale.optim import LARS, param_groups
from simclr_scale.scaling.verify.outcomes import Outcome

_TEMPERATURE = 0.2
_IMAGES_OF_A_RANK, _SIDE = 4, 16
# Float64 and float32 on ranks and in one process differ by the order of their sums alone, some 1e-14 and 1e-5.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_STEPS, _RATE = 3, 4.8


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = create_encoder("simclr_resnet_tiny", channels=(4, 6, 8))
        self.head = ProjectionHead(8, hidden_features=12, out_features=7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def _network(device: torch.device, dtype: torch.dtype) -> _Network:
    """The same on every rank; batch norms at random, as the last of a block starts at 0, which hides all before it."""
    generator = torch.Generator().manual_seed(0)
    network = _Network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(std=0.3, generator=generator))
    return network.to(device, dtype)


def _views(device: torch.device, dtype: torch.dtype, step: int) -> Tensor:
    """Of all ranks: (2, images, 3, side, side)."""
    generator = torch.Generator().manual_seed(1 + step)
    images = _IMAGES_OF_A_RANK * world().size
    return torch.rand(2, images, 3, _SIDE, _SIDE, generator=generator, dtype=torch.float64).to(device, dtype)


def _own(views: Tensor) -> Tensor:
    first = world().rank * _IMAGES_OF_A_RANK
    return views[:, first : first + _IMAGES_OF_A_RANK].flatten(0, 1)


def _loss_by_definition(z: Tensor) -> Tensor:
    unit = F.normalize(z, dim=1)
    logits = (unit @ unit.T / _TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def _wrapped(network: nn.Module, device: torch.device) -> nn.Module:
    convert_global_batch_norm(network)
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def gradient(device: torch.device, dtype: torch.dtype = torch.float64) -> Outcome:
    """The loss and its gradient for every parameter, through DDP and global batch norm."""
    alone = _network(device, dtype)
    ranks = copy.deepcopy(alone)
    views = _views(device, dtype, 0)
    expected = _loss_by_definition(alone(views.flatten(0, 1)))
    expected.backward()
    loss = NTXentLoss(_TEMPERATURE, engine="tiled" if dtype == torch.float64 else "auto")
    wrapped = _wrapped(ranks, device)  # kept: with it go the hooks that reduce gradients
    value = loss(wrapped(_own(views)))
    value.backward()

    largest = max(float(p.grad.abs().max()) for p in alone.parameters() if p.grad is not None)
    worst, where = 0.0, ""
    for (name, p), q in zip(ranks.named_parameters(), alone.parameters(), strict=True):
        assert q.grad is not None
        # A gradient that is 0 but for rounding is measured by the others.
        scale = max(float(q.grad.abs().max()), 1e-3 * largest)
        error = float((p.grad - q.grad).abs().max()) / scale if p.grad is not None else float("inf")
        if not error <= worst:
            worst, where = error, name
    off = _relative(value.detach(), expected.detach())
    passed = max(worst, off) <= _TOLERANCE[dtype]
    detail = f"largest relative error of a gradient {worst:.1e}" + (f" ({where})" if not passed else "")
    return Outcome(
        _named("gradient of the ranks is that of one process", dtype), passed, f"{detail}, of the loss {off:.1e}"
    )


def batch_norm(device: torch.device, dtype: torch.dtype = torch.float64) -> Outcome:
    """Output, running statistics and the gradient of the input, on ranks whose inputs are far apart."""
    ranks, n = world(), 3
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n * ranks.size, 5, 4, 4, generator=generator, dtype=torch.float64).to(device, dtype)
    x += torch.arange(ranks.size, device=device).repeat_interleave(n)[:, None, None, None]
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device, dtype)
    alone = nn.BatchNorm2d(5).to(device, dtype)
    together = convert_global_batch_norm(copy.deepcopy(alone))
    own = slice(ranks.rank * n, (ranks.rank + 1) * n)
    whole, part = x.clone().requires_grad_(), x[own].clone().requires_grad_()
    y, z = alone(whole), together(part)
    (y * weight).sum().backward()
    (z * weight[own]).sum().backward()
    assert whole.grad is not None
    assert part.grad is not None
    pairs = [(z, y[own]), (part.grad, whole.grad[own]), *zip(together.buffers(), alone.buffers(), strict=True)]
    worst = max(_relative(a.detach().to(dtype), b.detach().to(dtype)) for a, b in pairs)
    return Outcome(
        _named("batch norm is over all ranks", dtype), worst <= _TOLERANCE[dtype], f"largest relative error {worst:.1e}"
    )


def lars(device: torch.device, dtype: torch.dtype = torch.float64) -> Outcome:
    """Three steps of LARS leave the same weights on every rank, to the bit, and those of one process."""
    alone = _network(device, dtype)
    ranks = copy.deepcopy(alone)
    wrapped = _wrapped(ranks, device)
    optimizers = [LARS(param_groups(network, 1e-4), lr=_RATE) for network in (alone, ranks)]
    for step in range(_STEPS):
        views = _views(device, dtype, step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        _loss_by_definition(alone(views.flatten(0, 1))).backward()
        NTXentLoss(_TEMPERATURE, engine="tiled")(wrapped(_own(views))).backward()
        for optimizer in optimizers:
            optimizer.step()
    mine = torch.cat([p.detach().flatten() for p in ranks.parameters()])
    everyone = all_gather(mine[None])
    other = [rank for rank in range(len(everyone)) if not torch.equal(everyone[rank], everyone[0])]
    error = _relative(mine, torch.cat([p.detach().flatten() for p in alone.parameters()]))
    name = _named(f"LARS is alike on every rank after {_STEPS} steps", dtype)
    if other:
        return Outcome(name, False, f"weights of rank {other[0]} differ from those of rank 0")
    # Rounding grows with every step.
    return Outcome(name, error <= 100 * _TOLERANCE[dtype], f"equal to the bit; from one process {error:.1e}")


def order_of_images(device: torch.device) -> Outcome:
    """Each image once an epoch over all ranks, in the global batches of one process."""
    ranks = world()
    batch, images = 3 * ranks.size, 3 * ranks.size * 5 + 2
    problems = []
    for epoch in range(2):
        start = partial(Position, epoch, 0)
        sampler = GlobalBatchSampler(images, batch, seed=3, rank=ranks.rank, world_size=ranks.size, position=start)
        mine = torch.tensor([[key.image for key in keys] for keys in sampler], device=device)
        everyone = all_gather(mine[None])  # (ranks, batches, images of a rank)
        seen = everyone.transpose(0, 1).flatten().tolist()
        if len(set(seen)) < len(seen):
            problems.append(f"epoch {epoch}: {len(seen) - len(set(seen))} images come twice")
        if len(seen) != images // batch * batch:
            problems.append(f"epoch {epoch}: {len(seen)} images of {images // batch * batch}")
        if seen != epoch_order(images, 3, epoch)[: len(seen)].tolist():
            problems.append(f"epoch {epoch}: not in the order of one process")
    detail = "; ".join(problems) or f"{images // batch * batch} images an epoch, none twice, none left out"
    return Outcome("images are shared out, each once", not problems, detail)


def same_software() -> Outcome:
    """Versions that ranks must share to compute the same."""
    mine = {"Python": platform.python_version(), "torch": str(torch.__version__), "simclr_scale": __version__}
    everyone: list[dict[str, str]] = [{}] * world().size
    dist.all_gather_object(everyone, mine)
    differing = [name for name in mine if len({versions[name] for versions in everyone}) > 1]
    detail = ", ".join(f"{name} {version}" for name, version in mine.items())
    if differing:
        versions = sorted({rank[differing[0]] for rank in everyone})
        detail = f"{differing[0]} is {' and '.join(versions)}"
    return Outcome("software is the same everywhere", not differing, detail)


def correctness(device: torch.device) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Names and calls of all checks but those of speed, for this device."""
    yield "software is the same everywhere", same_software
    yield "images are shared out, each once", lambda: order_of_images(device)
    # Apple's GPUs have no float64.
    wide = torch.float32 if device.type == "mps" else torch.float64
    yield "batch norm is over all ranks", lambda: batch_norm(device, wide)
    yield "gradient of the ranks is that of one process", lambda: gradient(device, wide)
    if wide != torch.float32:
        yield "gradient in float32", lambda: gradient(device, torch.float32)
    yield "LARS is alike on every rank", lambda: lars(device, wide)


def _named(name: str, dtype: torch.dtype) -> str:
    return f"{name} ({str(dtype).removeprefix('torch.')})"


def _relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
