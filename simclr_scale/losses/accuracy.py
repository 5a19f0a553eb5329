"""How often a view finds its other view: the figure beside a contrastive loss that a person can read."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from simclr_scale.distributed import all_gather, world

# Similarities held at once, at most: 64 MiB in float32.
_SIMILARITIES = 2**24


@torch.no_grad()
def contrastive_accuracy(z: Tensor, *, group: dist.ProcessGroup | None = None, gather: bool = True) -> Tensor:
    """Share of this rank's rows that are closer to their other view than to any other row of the batch.

    Args:
        z: (2n, d) as for :func:`nt_xent`.

    Returns:
        Scalar in [0, 1], of this rank's rows; chance is 1 / (N - 1).
    """
    unit = F.normalize(z.float(), dim=1)
    ranks = world(group)
    gather = gather and ranks.size > 1
    rows = len(unit)
    first = ranks.rank * rows if gather else 0
    everything = all_gather(unit, group) if gather else unit
    row = torch.arange(rows, device=z.device)
    partner = row.roll(rows // 2) + first
    found = torch.zeros((), device=z.device)
    with torch.autocast(z.device.type, enabled=False):  # in half precision a row is as close to many as to its own
        for part in row.split(max(1, _SIMILARITIES // len(everything))):
            similarity = unit[part] @ everything.T
            similarity[torch.arange(len(part), device=z.device), part + first] = -torch.inf
            found += (similarity.argmax(1) == partner[part]).sum()
    return found / rows
