"""The ResNets of SimCLR (Chen et al. 2020a, 2020b), registered with timm as `simclr_resnet*`.

Definition followed: google-research/simclr, tf2/resnet.py. It is the post-activation ResNet of He et al. (2015), its
channels times `width`; with `sk_ratio` > 0 the stem and the shortcuts become those of ResNet-D (He et al. 2018) and
the 3x3 convolutions of the bottlenecks become selective kernels (Li et al. 2019).

Departures of Google's network from torchvision's of the same name:
- the max-pool is padded as TensorFlow's 'SAME', on an even map below and to the right only: other features from the
  same weights;
- the last batch norm of a block starts with gamma 0, and the initialisation is Keras' VarianceScaling.
Where torchvision is followed instead: a shortcut that keeps the shape is the identity. Google projects the shortcut of
the first block of every stage; that differs in the first stage of ResNet-18 and -34 alone, by one 1x1 convolution.

Parameters bear torchvision's names, so the plain networks load the weights of torchvision and timm.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from simclr_scale.errors import InputError
from simclr_scale.models.convolution import Convolution

# Standard deviation of a unit normal cut at two standard deviations; Keras divides by it to restore the variance.
_TRUNCATED_STD = 0.87962566103423978
_SK_MIN_CHANNELS = 32


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return Convolution(in_channels, out_channels, kernel, stride)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)


def _conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [
        _convolution(in_channels, out_channels, kernel, stride),
        _batch_norm(out_channels),
        nn.ReLU(inplace=True),
    ]


class SameMaxPool(nn.Module):
    """3x3 max-pool of stride 2, (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)), padded as TensorFlow's 'SAME'.

    'SAME' pads one pixel on each side of an odd dimension; an even one is padded at its end only.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=2, padding=(x.shape[-2] % 2, x.shape[-1] % 2), ceil_mode=True)


class ShortcutPool(nn.Module):
    """2x2 average before the 1x1 convolution of a ResNet-D shortcut, aligned as in Google's code.

    Stride 2: (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)); zeros complete an odd dimension and count in the mean.
    Stride 1: the shape stays; windows begin at each pixel, and what lies beyond the map does not count.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return F.avg_pool2d(x, 2, stride=1, padding=1, count_include_pad=False)[:, :, 1:, 1:]
        odd_height, odd_width = x.shape[-2] % 2, x.shape[-1] % 2
        if odd_height or odd_width:
            x = F.pad(x, (0, odd_width, 0, odd_height))
        return F.avg_pool2d(x, 2, stride=2)

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class SelectiveKernel(nn.Module):
    """Two 3x3 streams mixed channel by channel, by a softmax that sees the global average of their sum.

    (B, C_in, H, W) -> (B, C_out, H / stride, W / stride). Batch norm and ReLU are inside: nothing follows.
    Source: class SK_Conv2D of google-research/simclr, tf2/resnet.py; both streams are plain 3x3, unlike Li et al.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, ratio: float) -> None:
        super().__init__()
        attention_channels = max(int(out_channels * ratio), _SK_MIN_CHANNELS)
        self.streams = nn.Sequential(*_conv_bn_relu(in_channels, 2 * out_channels, 3, stride))
        self.attention = nn.Sequential(
            *_conv_bn_relu(out_channels, attention_channels, 1),
            _convolution(attention_channels, 2 * out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        streams = self.streams(x).unflatten(1, (2, -1))
        summary = streams.sum(1).mean((2, 3), keepdim=True)
        weights = self.attention(summary).unflatten(1, (2, -1)).softmax(1)
        return (streams * weights).sum(1)


def _shortcut(in_channels: int, out_channels: int, stride: int, resnet_d: bool) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if resnet_d:
        projection = [ShortcutPool(stride), _convolution(in_channels, out_channels, 1)]
    else:
        projection = [_convolution(in_channels, out_channels, 1, stride)]
    return nn.Sequential(*projection, _batch_norm(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. `sk_ratio` > 0 changes the shortcut only: Google has no SK form of it."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, sk_ratio: float) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, channels, 3, stride)
        self.bn1 = _batch_norm(channels)
        self.conv2 = _convolution(channels, channels, 3)
        self.bn2 = _batch_norm(channels)
        self.downsample = _shortcut(in_channels, channels, stride, resnet_d=sk_ratio > 0)
        self.relu = nn.ReLU(inplace=True)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return self.relu(residual + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which bears the stride) and 1x1 convolutions, and a shortcut; the output has 4 * `channels`."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, sk_ratio: float) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = _convolution(in_channels, channels, 1)
        self.bn1 = _batch_norm(channels)
        self.conv2: nn.Module
        self.bn2: nn.Module
        self.act2: nn.Module
        if sk_ratio > 0:
            self.conv2 = SelectiveKernel(channels, channels, stride, sk_ratio)
            self.bn2 = nn.Identity()
            self.act2 = nn.Identity()
        else:
            self.conv2 = _convolution(channels, channels, 3, stride)
            self.bn2 = _batch_norm(channels)
            self.act2 = nn.ReLU(inplace=True)
        self.conv3 = _convolution(channels, out_channels, 1)
        self.bn3 = _batch_norm(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride, resnet_d=sk_ratio > 0)
        self.relu = nn.ReLU(inplace=True)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.act2(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return self.relu(residual + self.downsample(x))


def _initialize(module: nn.Module) -> None:
    """Keras' VarianceScaling for convolutions, N(0, .01) for dense layers; batch norms keep their own."""
    if isinstance(module, nn.Conv2d):
        fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        std = math.sqrt(1.0 / fan_in) / _TRUNCATED_STD
        nn.init.trunc_normal_(module.weight, std=std, a=-2.0 * std, b=2.0 * std)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


class SimCLRResNet(nn.Module):
    """ResNet with timm's interface: images (B, in_chans, H, W) -> features (B, D), or logits (B, num_classes).

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: number of blocks of each stage. Stages after the first halve the map.
        channels: inner channels of each stage before `width`; the stem has those of the first. D is the last one times
            `width` and the block's expansion.
        width: multiplier of all channels (Google's `width_multiplier`: 1, 2, 3 or 4; fractions are rounded).
        sk_ratio: 0 for the plain network; .0625 for SimCLRv2's selective kernels with the ResNet-D stem and shortcuts.
        small_images: a 3x3 stem of stride `stem_stride` and no max-pool, instead of the 7x7 stem (or ResNet-D's three
            3x3) of stride 2 with max-pool. Google's choice for images of at most 32 px.
        stem_stride: stride of the stem for small images.
        in_chans, num_classes, global_pool: as in timm; `num_classes=0` gives features.

    Raises:
        InputError: for an argument outside its range.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        channels: Sequence[int] = (64, 128, 256, 512),
        *,
        width: float = 1.0,
        sk_ratio: float = 0.0,
        small_images: bool = False,
        stem_stride: int = 1,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        _check_arguments(depths, channels, width, sk_ratio, small_images, stem_stride)
        channels = [max(1, round(width * count)) for count in channels]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = channels[-1] * block.expansion

        self.conv1: nn.Module
        if small_images:
            self.conv1 = _convolution(in_chans, channels[0], 3, stem_stride)
        elif sk_ratio > 0:
            half = channels[0] // 2
            self.conv1 = nn.Sequential(
                *_conv_bn_relu(in_chans, half, 3, stride=2),
                *_conv_bn_relu(half, half, 3),
                _convolution(half, channels[0], 3),
            )
        else:
            self.conv1 = _convolution(in_chans, channels[0], 7, stride=2)
        self.bn1 = _batch_norm(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else SameMaxPool()

        reduction = stem_stride if small_images else 2
        self.feature_info = [{"num_chs": channels[0], "reduction": reduction, "module": "relu"}]
        reduction *= 1 if small_images else 2
        self.stages: list[str] = []
        in_channels = channels[0]
        for index, (count, depth) in enumerate(zip(channels, depths, strict=True)):
            name, stride = f"layer{index + 1}", 1 if index == 0 else 2
            out_channels = count * block.expansion
            blocks = [block(in_channels, count, stride, sk_ratio)]
            blocks += [block(out_channels, count, 1, sk_ratio) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(*blocks))
            self.stages.append(name)
            in_channels, reduction = out_channels, reduction * stride
            self.feature_info.append({"num_chs": out_channels, "reduction": reduction, "module": name})

        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.apply(_initialize)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> the last stage's map."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stage's map -> pooled features where `pre_logits`, else the classifier's output."""
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; `num_classes=0` removes it. The pooling stays where `global_pool` is None."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        weight = next(self.parameters())
        self.fc.apply(_initialize).to(weight.device, weight.dtype)


def _check_arguments(
    depths: Sequence[int],
    channels: Sequence[int],
    width: float,
    sk_ratio: float,
    small_images: bool,
    stem_stride: int,
) -> None:
    if len(channels) != len(depths) or min(channels) < 1:
        raise InputError(f"channels={list(channels)}: this architecture needs {len(depths)} positive numbers")
    if width <= 0:
        raise InputError(f"width={width}: must be positive")
    if not 0 <= sk_ratio <= 1:
        raise InputError(f"sk_ratio={sk_ratio}: must lie in 0..1 (0 = plain, 0.0625 = SimCLRv2)")
    if stem_stride < 1:
        raise InputError(f"stem_stride={stem_stride}: must be at least 1")
    if stem_stride != 1 and not small_images:
        raise InputError(f"stem_stride={stem_stride}: only the stem of small_images=True has a choice of stride")


def _config(**overrides: Any) -> dict[str, Any]:
    """Evaluation image as in Google's data_util.py: no mean or deviation, centre crop of .875, bicubic."""
    return {
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "num_classes": 1000,
        "classifier": "fc",
        **overrides,
    }


# CIFAR's images are evaluated whole.
_SMALL_IMAGE_CONFIG = _config(input_size=(3, 32, 32), crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    {
        "simclr_resnet18": _config(),
        "simclr_resnet34": _config(),
        "simclr_resnet50": _config(),
        "simclr_resnet101": _config(),
        "simclr_resnet152": _config(),
        "simclr_resnet_tiny": _SMALL_IMAGE_CONFIG,
    }
)


def _build(
    name: str,
    block: type[BasicBlock] | type[Bottleneck],
    depths: tuple[int, ...],
    pretrained: bool,
    pretrained_cfg: Any = None,
    **kwargs: Any,
) -> SimCLRResNet:
    if pretrained_cfg is None and kwargs.get("small_images"):
        pretrained_cfg = {**_SMALL_IMAGE_CONFIG, "architecture": name}
    return build_model_with_cfg(
        SimCLRResNet,
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        feature_cfg={"out_indices": tuple(range(len(depths) + 1))},
        block=block,
        depths=depths,
        **kwargs,
    )


@register_model
def simclr_resnet18(pretrained: bool = False, **kwargs: Any) -> SimCLRResNet:
    return _build("simclr_resnet18", BasicBlock, (2, 2, 2, 2), pretrained, **kwargs)


@register_model
def simclr_resnet34(pretrained: bool = False, **kwargs: Any) -> SimCLRResNet:
    return _build("simclr_resnet34", BasicBlock, (3, 4, 6, 3), pretrained, **kwargs)


@register_model
def simclr_resnet50(pretrained: bool = False, **kwargs: Any) -> SimCLRResNet:
    return _build("simclr_resnet50", Bottleneck, (3, 4, 6, 3), pretrained, **kwargs)


@register_model
def simclr_resnet101(pretrained: bool = False, **kwargs: Any) -> SimCLRResNet:
    return _build("simclr_resnet101", Bottleneck, (3, 4, 23, 3), pretrained, **kwargs)


@register_model
def simclr_resnet152(pretrained: bool = False, **kwargs: Any) -> SimCLRResNet:
    return _build("simclr_resnet152", Bottleneck, (3, 8, 36, 3), pretrained, **kwargs)


@register_model
def simclr_resnet_tiny(
    pretrained: bool = False, channels: Sequence[int] = (24, 48, 96), stem_stride: int = 2, **kwargs: Any
) -> SimCLRResNet:
    """Three basic blocks on a 3x3 stem: an encoder for small images on a CPU. Takes no `small_images`: it always is."""
    return _build(
        "simclr_resnet_tiny",
        BasicBlock,
        (1, 1, 1),
        pretrained,
        channels=channels,
        small_images=True,
        stem_stride=stem_stride,
        **kwargs,
    )
