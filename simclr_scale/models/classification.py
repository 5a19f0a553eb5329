"""A classifier on an encoder, which may keep the first layers of the projection head.

"we incorporate part of the MLP projection head into the base encoder during the fine-tuning" (Chen et al. 2020b, "Big
Self-Supervised Models are Strong Semi-Supervised Learners", section 2). B images, D features, C classes.
"""

from collections.abc import Sequence
from copy import deepcopy

from torch import Tensor, nn

from simclr_scale.errors import InputError
from simclr_scale.models.heads import ProjectionHead


class ClassificationHead(nn.Module):
    """Features (B, D) -> logits (B, C): layers of a projection head, then a linear layer whose logits start at 0.

    Args:
        in_features: D.
        classes: names of the classes, in the order of the logits.
        head: the projection head whose layers are copied; None: there is none.
        from_head_layer: how many of its layers, from the first; 0: none.

    Raises:
        InputError: fewer than two classes, no head to take layers of, too many of them, or a head of another width.
    """

    def __init__(
        self, in_features: int, classes: Sequence[str], head: ProjectionHead | None = None, from_head_layer: int = 0
    ) -> None:
        super().__init__()
        if len(classes) < 2:
            raise InputError(f"a classifier needs at least two classes, got {len(classes)}")
        check_head_layer(head, from_head_layer)
        if from_head_layer and head is not None and head.in_features != in_features:
            raise InputError(f"the head takes {head.in_features} features, and the encoder gives {in_features}")
        self.in_features = in_features
        self.classes = tuple(classes)
        self.from_head_layer = from_head_layer
        self.head_arguments = head.arguments if from_head_layer and head is not None else None
        kept = [deepcopy(layer) for layer in head.layers[:from_head_layer]] if head is not None else []
        self.layers = nn.ModuleList(kept)
        width = in_features
        for layer in self.layers:
            width = layer[0].out_features  # type: ignore[index]
        self.linear = nn.utils.skip_init(nn.Linear, width, len(classes))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Features (B, D) -> logits (B, C)."""
        for layer in self.layers:
            h = layer(h)
        return self.linear(h)


class ImageClassifier(nn.Module):
    """Images (B, C, H, W) -> logits (B, classes)."""

    def __init__(self, encoder: nn.Module, head: ClassificationHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, classes)."""
        return self.head(self.encoder(images))


def check_head_layer(head: ProjectionHead | None, from_head_layer: int) -> None:
    """Raises InputError where `head` does not have so many layers."""
    if from_head_layer < 0:
        raise InputError(f"from_head_layer: {from_head_layer}, wanted 0 (the features) or a layer of the head")
    if from_head_layer and head is None:
        raise InputError(f"from_head_layer: {from_head_layer}, but no projection head was given; wanted 0")
    if head is not None and from_head_layer > len(head.layers):
        raise InputError(f"from_head_layer: {from_head_layer}, wanted at most {len(head.layers)}, the head's layers")
