"""The online probe: a linear classifier on features that it cannot influence."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from simclr_scale.distributed import world


class OnlineProbe(nn.Module):
    """Linear classifier trained beside the encoder on stop-gradient features, with Adam of its own.

    "we attach the linear classifier on top of the base encoder (with a stop_gradient on the input)" (SimCLR, appendix
    B.6): its accuracy tells during training about what linear evaluation will tell after it. Its parameters take no
    part in autograd, so neither the contrastive loss nor the encoder's optimizer, LARS, ever sees them; the gradient of
    softmax regression is written out.

    Args:
        group: the ranks that hold different images; None: all.

    Attributes:
        synchronised: whether a step is that of the rows of all ranks; if not, each rank trains a probe of its own.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        learning_rate: float = 1e-3,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.synchronised = True
        self.classifier = nn.Linear(in_features, num_classes).requires_grad_(False)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.optimizer = torch.optim.Adam(self.classifier.parameters(), lr=learning_rate)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step, on all ranks together unless they are not synchronised.

        Args:
            features: (B, D); labels: (B,) int64, rows with -1 are left out.

        Returns:
            Cross-entropy and accuracy of this rank's rows before the step; 0 where no row has a label.
        """
        known = labels >= 0
        features, labels = features.detach()[known].to(self.classifier.weight.dtype), labels[known]
        with torch.autocast(features.device.type, enabled=False):
            logits = self.classifier(features)
        residual = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
        weight, bias = self.classifier.weight, self.classifier.bias
        sums = torch.cat([(residual.T @ features).flatten(), residual.sum(0), known.sum()[None].to(features.dtype)])
        if self.synchronised and world(self.group).size > 1:
            dist.all_reduce(sums, group=self.group)
        gradient = sums[:-1] / sums[-1].clamp(min=1)
        weight.grad = gradient[: weight.numel()].view_as(weight)
        bias.grad = gradient[weight.numel() :]
        self.optimizer.step()
        if not len(labels):
            return features.new_zeros(()), features.new_zeros(())
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()
