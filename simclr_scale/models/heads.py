"""The projection head g of SimCLR: h (B, D) -> z (B, d), where the contrastive loss is applied."""

from typing import Any

from torch import Tensor, nn

from simclr_scale.errors import InputError


class ProjectionHead(nn.Module):
    """Linear layers, each with batch norm, ReLU between them.

    Hidden layers are linear (no bias), batch norm, ReLU; the last is linear (no bias) and batch norm without beta.
    Linear weights start as N(0, .01). Source: classes ProjectionHead and LinearLayer of google-research/simclr,
    tf2/model.py. Two layers are SimCLR (Chen et al. 2020a, section 2.1), three SimCLRv2 (2020b, section 2), one is the
    "linear" and none the "none" (identity) of the ablation in 2020a, section 4.2.

    Args:
        in_features: D, the width of the encoder's features.
        hidden_features: width of the hidden layers; `in_features` where None.
        out_features: d. Without layers the output is the input, and the attribute `out_features` is `in_features`.
        num_layers: number of linear layers.
        last_norm: batch norm after the last of them. Without it three layers are the projector of Barlow Twins (Zbontar
            et al. 2021, section 3.2) and the expander of VICReg (Bardes et al. 2022, section 4.2), both 8192 wide.

    Raises:
        InputError: a width below 1 or a negative number of layers.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int = 128,
        num_layers: int = 2,
        last_norm: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = in_features if hidden_features is None else hidden_features
        sizes = {"in_features": in_features, "hidden_features": hidden_features, "out_features": out_features}
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"projection head: {name}={size} must be at least 1")
        if num_layers < 0:
            raise InputError(f"projection head: num_layers={num_layers} must be 0 (identity) or more")
        self.arguments: dict[str, Any] = {**sizes, "num_layers": num_layers, "last_norm": last_norm}
        """What this head was made with, to make another such."""
        self.in_features = in_features
        self.out_features = out_features if num_layers else in_features
        widths = [in_features, *[hidden_features] * (num_layers - 1), out_features]
        self.layers = nn.ModuleList(
            _layer(widths[i], widths[i + 1], last=i == num_layers - 1, last_norm=last_norm) for i in range(num_layers)
        )

    def forward(self, h: Tensor, layers: int | None = None) -> Tensor:
        """Features (B, D) -> projections (B, d), or the output of the first `layers` layers only.

        SimCLRv2 fine-tunes from a middle layer of the head (2020b, section 2; Google's `ft_proj_selector`): `layers=0`
        gives h itself, `layers=1` the first hidden layer after its ReLU.
        """
        if layers is not None and not 0 <= layers <= len(self.layers):
            raise InputError(f"projection head: layers={layers} must lie in 0..{len(self.layers)}")
        for layer in self.layers[:layers]:
            h = layer(h)
        return h


def _layer(in_features: int, out_features: int, last: bool, last_norm: bool) -> nn.Sequential:
    linear = nn.Linear(in_features, out_features, bias=False)
    nn.init.normal_(linear.weight, std=0.01)
    if last and not last_norm:
        return nn.Sequential(linear)
    batch_norm = nn.BatchNorm1d(out_features, eps=1e-5, momentum=0.1)
    if not last:
        return nn.Sequential(linear, batch_norm, nn.ReLU(inplace=True))
    # The keyword bias=False of newer torch does the same.
    batch_norm.register_parameter("bias", None)
    return nn.Sequential(linear, batch_norm)
