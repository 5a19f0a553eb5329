"""The SimCLR ResNets against torchvision, against Google's definitions written out, and against published sizes."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from simclr_scale.errors import InputError
from simclr_scale.models.resnet import BasicBlock, Bottleneck, SameMaxPool, SelectiveKernel, ShortcutPool, SimCLRResNet


def randomize(model: nn.Module) -> None:
    """Batch norms in general position, so that none of their four vectors can be lost or swapped unseen."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                nn.init.uniform_(tensor, low, low + 1, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)


# SimCLRv2's README, in millions. The numbers are those of all TensorFlow variables, moving statistics included.
@pytest.mark.parametrize(
    ("depth", "width", "sk_ratio", "millions"),
    [
        (50, 1, 0, 24),
        (50, 1, 0.0625, 35),
        (50, 2, 0, 94),
        (50, 2, 0.0625, 140),
        (101, 1, 0, 43),
        (101, 1, 0.0625, 65),
        (101, 2, 0, 170),
        (101, 2, 0.0625, 257),
        (152, 1, 0, 58),
        (152, 1, 0.0625, 89),
        (152, 2, 0, 233),
        (152, 2, 0.0625, 354),
        (152, 3, 0.0625, 795),
    ],
)
def test_sizes_are_those_of_the_published_encoders(depth: int, width: int, sk_ratio: float, millions: int) -> None:
    with torch.device("meta"):
        encoder = timm.create_model(f"simclr_resnet{depth}", num_classes=0, width=width, sk_ratio=sk_ratio)
    size = sum(tensor.numel() for tensor in encoder.state_dict().values() if tensor.ndim)
    assert round(size / 1e6) == millions


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_plain_network_has_the_parameters_of_torchvision(depth: int) -> None:
    with torch.device("meta"):
        ours = timm.create_model(f"simclr_resnet{depth}", num_classes=1000)
        peer = getattr(torchvision.models, f"resnet{depth}")()
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, peer)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("training", [False, True])
def test_plain_network_equals_torchvision_where_the_max_pools_agree(kind: str, training: bool) -> None:
    depths = [1, 2, 1, 1]
    peer = torchvision.models.ResNet(getattr(torchvision.models.resnet, kind), depths).double()
    randomize(peer)
    ours = SimCLRResNet({"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[kind], depths).double()
    ours.load_state_dict(peer.state_dict())
    for model in (ours, peer):
        model.train(training)
    # 61 px make a stem map of 31: of an odd map 'SAME' pads both sides, like torchvision. 64 px make 32.
    odd, even = (torch.rand(3, 3, size, size, dtype=torch.float64) for size in (61, 64))
    torch.testing.assert_close(ours(odd), peer(odd))
    assert not torch.allclose(ours(even), peer(even))
    peer.maxpool = SameMaxPool()
    torch.testing.assert_close(ours(even), peer(even))


def test_small_image_network_equals_torchvision_with_the_stem_replaced() -> None:
    peer = torchvision.models.resnet18(num_classes=7)
    peer.conv1, peer.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    randomize(peer)
    ours = timm.create_model("simclr_resnet18", num_classes=7, small_images=True)
    ours.load_state_dict(peer.state_dict())
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), peer.eval()(images))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 8), (8, 7), (7, 7), (1, 2), (1, 1)])
def test_max_pool_is_the_same_padding_of_tensorflow(height: int, width: int) -> None:
    def windows(size: int) -> list[slice]:
        outputs = -(-size // 2)
        before = max(2 * (outputs - 1) + 3 - size, 0) // 2
        return [slice(max(2 * i - before, 0), 2 * i - before + 3) for i in range(outputs)]

    x = torch.randn(2, 3, height, width)
    rows = [torch.stack([x[:, :, r, c].amax((2, 3)) for c in windows(width)], -1) for r in windows(height)]
    torch.testing.assert_close(SameMaxPool()(x), torch.stack(rows, -2), rtol=0, atol=0)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 6), (6, 5), (5, 5), (1, 1)])
def test_shortcut_pool_is_googles(height: int, width: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, height, width))
    # Stride 2: one row and one column of zeros after the map, then whole windows. Stride 1: the mean of what exists.
    padded = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)))
    halved = [
        [padded[:, :, i : i + 2, j : j + 2].sum((2, 3)) / 4 for j in range(0, width, 2)] for i in range(0, height, 2)
    ]
    kept = [[x[:, :, i : i + 2, j : j + 2].mean((2, 3)) for j in range(width)] for i in range(height)]
    for stride, expected in ((2, halved), (1, kept)):
        result = ShortcutPool(stride)(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(result, np.moveaxis(np.array(expected), (0, 1), (2, 3)), rtol=1e-12)


@pytest.mark.parametrize(("channels", "ratio", "attention"), [(24, 0.0625, 32), (80, 0.5, 40)])
@pytest.mark.parametrize("stride", [1, 2])
def test_selective_kernel_written_out(channels: int, ratio: float, attention: int, stride: int) -> None:
    def norm(x: Tensor, module: nn.Module, rows: slice = slice(None)) -> Tensor:
        mean, var, gamma, beta = (
            tensor[rows, None, None] for tensor in (module.running_mean, module.running_var, module.weight, module.bias)
        )
        return F.relu((x - mean) / torch.sqrt(var + 1e-5) * gamma + beta)

    sk = SelectiveKernel(5, channels, stride, ratio).double().eval()
    randomize(sk)
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    first, second = slice(0, channels), slice(channels, None)
    conv, bn, _ = sk.streams
    u1, u2 = (norm(F.conv2d(x, conv.weight[s], stride=stride, padding=1), bn, s) for s in (first, second))
    squeeze, squeeze_bn, _, excite = sk.attention
    assert squeeze.out_channels == attention
    summary = norm(F.conv2d((u1 + u2).mean((2, 3), keepdim=True), squeeze.weight), squeeze_bn)
    a1, a2 = (torch.exp(F.conv2d(summary, excite.weight[s])) for s in (first, second))
    torch.testing.assert_close(sk(x), (a1 * u1 + a2 * u2) / (a1 + a2))


def test_selective_kernels_bring_the_stem_and_shortcuts_of_resnet_d() -> None:
    with torch.device("meta"):
        encoder = timm.create_model("simclr_resnet50", num_classes=0, width=2, sk_ratio=0.0625)
        basic = timm.create_model("simclr_resnet18", num_classes=0, sk_ratio=0.0625)
    stem = [(conv.out_channels, conv.kernel_size, conv.stride) for conv in encoder.conv1 if isinstance(conv, nn.Conv2d)]
    assert stem == [(64, (3, 3), (2, 2)), (64, (3, 3), (1, 1)), (128, (3, 3), (1, 1))]
    for index, name in enumerate(encoder.stages):
        first, *others = getattr(encoder, name)
        pool, conv, _ = first.downsample
        assert (pool.stride, conv.stride) == (1 if index == 0 else 2, (1, 1))
        assert isinstance(first.conv2, SelectiveKernel)
        assert all(isinstance(block.downsample, nn.Identity) for block in others)

    assert not any(isinstance(module, SelectiveKernel) for module in basic.modules())
    assert isinstance(basic.layer2[0].downsample[0], ShortcutPool)


def test_bottleneck_strides_in_its_3x3() -> None:
    with torch.device("meta"):
        block = timm.create_model("simclr_resnet50", num_classes=0).layer2[0]
    assert [conv.stride for conv in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]


def test_stem_of_small_images_keeps_the_resolution() -> None:
    def map_after_stem(**kwargs: object) -> torch.Size:
        encoder = timm.create_model("simclr_resnet18", num_classes=0, **kwargs)
        maps = []
        encoder.layer1.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0].shape))
        encoder.eval()(torch.rand(1, 3, 32, 32))
        return maps[0]

    assert map_after_stem(small_images=True) == (1, 64, 32, 32)
    assert map_after_stem(small_images=True, sk_ratio=0.0625) == (1, 64, 32, 32)
    assert map_after_stem() == (1, 64, 8, 8)
    assert map_after_stem(small_images=True, stem_stride=2, width=0.5) == (1, 32, 16, 16)


def test_convolutions_start_as_keras_variance_scaling() -> None:
    torch.manual_seed(0)
    encoder = SimCLRResNet(Bottleneck, [1], [128], num_classes=50)
    for conv, fan_in in ((encoder.conv1, 3 * 49), (encoder.layer1[0].conv2, 128 * 9)):
        weights = conv.weight.detach().flatten().double()
        untruncated = fan_in**-0.5 / 0.87962566
        assert weights.std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert 1.95 * untruncated < weights.abs().max().item() <= 2 * untruncated
        sample = (weights[:5000] / untruncated).numpy()
        assert scipy.stats.kstest(sample, scipy.stats.truncnorm(-2, 2).cdf).pvalue > 0.01
    assert encoder.fc.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert encoder.fc.bias.count_nonzero() == 0


def test_last_gamma_of_each_block_starts_at_zero_and_no_other() -> None:
    for name in ("simclr_resnet18", "simclr_resnet50"):
        encoder = timm.create_model(name, num_classes=0, width=0.125, sk_ratio=0.0625)
        last = {
            id(block.bn2 if isinstance(block, BasicBlock) else block.bn3)
            for block in encoder.modules()
            if isinstance(block, BasicBlock | Bottleneck)
        }
        assert len(last) == {"simclr_resnet18": 8, "simclr_resnet50": 16}[name]
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert (module.weight == (0 if id(module) in last else 1)).all()
                assert (module.momentum, module.eps) == (0.1, 1e-5)


def test_timm_interface() -> None:
    torch.manual_seed(0)
    model = timm.create_model("simclr_resnet18", num_classes=10, width=0.25, small_images=True)
    images = torch.rand(2, 3, 32, 32)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert features.shape == (2, model.num_features) == (2, model.head_hidden_size)
    assert model(images).shape == (2, 10)
    assert model.get_classifier() is model.fc
    assert model.get_classifier(name_only=True) == model.default_cfg["classifier"]

    model.reset_classifier(30)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert model(images).shape == (2, 30)
    model.reset_classifier(0)
    assert model(images).shape == (2, 128)
    model.reset_classifier(0, global_pool="")
    assert model(images).shape == (2, 128, 4, 4)


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("simclr_resnet18", {"width": 0.25, "small_images": True}, 32),
        ("simclr_resnet50", {"width": 0.25}, 64),
        ("simclr_resnet_tiny", {}, 32),
    ],
)
def test_feature_info_describes_the_maps(name: str, kwargs: dict, size: int) -> None:
    model = timm.create_model(name, features_only=True, **kwargs)
    maps = model(torch.rand(1, 3, size, size))
    assert [tuple(map_.shape[1:]) for map_ in maps] == [
        (channels, size // reduction, size // reduction)
        for channels, reduction in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ]


def test_default_configs() -> None:
    plain = timm.create_model("simclr_resnet50", num_classes=0, width=0.25).pretrained_cfg
    assert (plain["input_size"], plain["crop_pct"], plain["interpolation"]) == ((3, 224, 224), 0.875, "bicubic")
    assert (plain["mean"], plain["std"]) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for small in (
        timm.create_model("simclr_resnet18", num_classes=0, small_images=True),
        timm.create_model("simclr_resnet_tiny", num_classes=0),
    ):
        assert (small.default_cfg["input_size"], small.default_cfg["crop_pct"]) == ((3, 32, 32), 1.0)
    assert not timm.list_pretrained("simclr_resnet*")


def test_a_saved_config_overrides_that_of_small_images() -> None:
    saved = {"architecture": "simclr_resnet18", "input_size": (3, 48, 48), "num_classes": 0}
    model = timm.create_model("simclr_resnet18", small_images=True, pretrained_cfg=saved)
    assert model.pretrained_cfg["input_size"] == (3, 48, 48)


def test_tiny_encoder() -> None:
    encoder = timm.create_model("simclr_resnet_tiny", num_classes=0, channels=[48, 96, 192], stem_stride=1)
    maps = encoder.forward_features(torch.rand(2, 3, 32, 32))
    assert maps.shape == (2, 192, 8, 8)
    assert [len(getattr(encoder, name)) for name in encoder.stages] == [1, 1, 1]
    default = timm.create_model("simclr_resnet_tiny", num_classes=0)
    assert default.forward_features(torch.rand(2, 3, 32, 32)).shape == (2, 96, 4, 4)


@pytest.mark.parametrize("name", ["simclr_resnet_tiny", "simclr_resnet18", "simclr_resnet50"])
def test_autocast_and_channels_last(name: str) -> None:
    encoder = timm.create_model(name, num_classes=0, width=0.25, sk_ratio=0.0625)
    encoder = encoder.to(memory_format=torch.channels_last)
    images = torch.rand(4, 3, 48, 48).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = encoder.forward_features(images)
        features = encoder.forward_head(maps)
    assert maps.is_contiguous(memory_format=torch.channels_last)
    assert features.dtype == torch.bfloat16
    features.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_the_whole_network_compiles_into_one_graph() -> None:
    for block, sk_ratio in ((BasicBlock, 0.0), (Bottleneck, 0.0625)):
        encoder = SimCLRResNet(block, [1, 2], [8, 16], sk_ratio=sk_ratio, num_classes=0).eval()
        images = torch.rand(2, 3, 40, 40)
        compiled = torch.compile(encoder, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), encoder(images))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"width": 0}, "width=0: must be positive"),
        ({"sk_ratio": 2.0}, r"sk_ratio=2.0: must lie in 0..1"),
        ({"channels": (8, 16)}, r"channels=\[8, 16\]: this architecture needs 3 positive numbers"),
        ({"channels": (8, 0, 16)}, r"needs 3 positive numbers"),
        ({"small_images": True, "stem_stride": 0}, "stem_stride=0: must be at least 1"),
        ({"stem_stride": 2}, "stem_stride=2: only the stem of small_images=True"),
    ],
)
def test_arguments_out_of_range(kwargs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SimCLRResNet(BasicBlock, (1, 1, 1), **{"channels": (8, 16, 32), **kwargs})


def test_importing_the_models_registers_them_with_timm() -> None:
    program = (
        "import simclr_scale.models, timm, torch\n"
        "with torch.device('meta'):\n"
        "    model = timm.create_model('simclr_resnet50', num_classes=0, width=2)\n"
        "print(model.num_features, *timm.list_models('simclr_*'))"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    names = [f"simclr_resnet{depth}" for depth in (18, 34, 50, 101, 152)] + ["simclr_resnet_tiny"]
    width, *registered = result.stdout.split()
    assert width == "4096"
    assert sorted(registered) == sorted(names)
