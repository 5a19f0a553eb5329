"""What is left out of weight decay and adaptation, on real architectures."""

from inspect import signature

import pytest
import timm
import timm.layers
import torch
from torch import nn

from simclr_scale.errors import InputError
from simclr_scale.models import ProjectionHead
from simclr_scale.optim import LARS, param_groups


def split(module: nn.Module, **settings) -> dict[str, set[str]]:  # type: ignore[no-untyped-def]
    """The names of the parameters by the name of their group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = param_groups(module, **{"weight_decay": 1e-4, **settings})
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def tiny_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3, num_classes=0
    )


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = timm.create_model("resnet18", num_classes=0)
    adapted, excluded = (group["params"] for group in param_groups(model, 1e-4))
    assert sorted(map(id, adapted + excluded)) == sorted(map(id, model.parameters()))
    assert [id(p) for p in model.parameters() if p.ndim == 4] == [id(p) for p in adapted]


def test_groups_carry_their_settings() -> None:
    groups = param_groups(nn.Linear(3, 2), weight_decay=1e-4)
    assert [{key: group[key] for key in ("name", "weight_decay", "adapt")} for group in groups] == [
        {"name": "adapted", "weight_decay": 1e-4, "adapt": True},
        {"name": "excluded", "weight_decay": 0.0, "adapt": False},
    ]


def test_the_norm_of_a_resnet_shortcut_is_excluded() -> None:
    groups = split(timm.create_model("resnet18", num_classes=0))
    assert {"layer2.0.downsample.1.weight", "layer2.0.downsample.1.bias", "bn1.weight"} <= groups["excluded"]
    assert "layer2.0.downsample.0.weight" in groups["adapted"]


@pytest.mark.parametrize("num_layers", [2, 3])
def test_the_norms_of_the_projection_head_are_excluded(num_layers: int) -> None:
    head = ProjectionHead(16, 16, 8, num_layers=num_layers)
    matrices = {name for name, parameter in head.named_parameters() if parameter.ndim == 2}
    groups = split(nn.ModuleDict({"encoder": nn.Linear(4, 16), "head": head}))
    assert groups["adapted"] == {"encoder.weight"} | {f"head.{name}" for name in matrices}
    assert len(matrices) == num_layers


def test_the_tokens_position_embedding_and_norms_of_a_vit_are_excluded_wherever_it_sits() -> None:
    groups = split(nn.ModuleDict({"encoder": tiny_vit()}))
    names = {
        "cls_token",
        "pos_embed",
        "norm.weight",
        "blocks.0.norm1.weight",
        "blocks.0.attn.qkv.bias",
        "patch_embed.proj.bias",
    }
    assert {f"encoder.{name}" for name in names} <= groups["excluded"]
    assert groups["adapted"] == {
        f"encoder.{name}.weight"
        for name in (
            "patch_embed.proj",
            "blocks.0.attn.qkv",
            "blocks.0.attn.proj",
            "blocks.0.mlp.fc1",
            "blocks.0.mlp.fc2",
        )
    }


def test_no_weight_decay_of_inner_modules_counts_and_may_hold_patterns() -> None:
    # XCiT names `temperature` in its attention, and `pos_embed.*` in the model.
    groups = split(timm.create_model("xcit_nano_12_p16_224", num_classes=0))
    assert {"blocks.3.attn.temperature", "pos_embed.token_projection.weight", "cls_token"} <= groups["excluded"]


class OurBatchNorm(nn.BatchNorm2d):
    """A subclass, as for statistics over all ranks."""


TORCH_NORMS = [
    nn.BatchNorm1d(8),
    nn.SyncBatchNorm(8),
    nn.InstanceNorm2d(8, affine=True),
    nn.LayerNorm(8),
    nn.GroupNorm(2, 8),
    nn.RMSNorm(8),
    OurBatchNorm(8),
]


def timm_norms() -> list[nn.Module]:
    """Every norm among timm's public layers, by the words of its class name."""
    words = ("BatchNorm", "GroupNorm", "LayerNorm", "RmsNorm", "SimpleNorm", "EvoNorm", "ResponseNorm")
    classes = {
        layer
        for name, layer in vars(timm.layers).items()
        if isinstance(layer, type) and issubclass(layer, nn.Module) and any(word in name for word in words)
    }
    classes -= {timm.layers.GlobalResponseNormMlp}  # a perceptron that contains one
    width = {"num_groups": 2}
    return [
        layer(8, **{key: value for key, value in width.items() if key in signature(layer).parameters})
        for layer in sorted(classes, key=lambda layer: layer.__name__)
    ]


@pytest.mark.parametrize("norm", [*TORCH_NORMS, *timm_norms()], ids=lambda norm: type(norm).__name__)
def test_norms_are_known_by_their_type(norm: nn.Module) -> None:
    # The name says nothing of a norm, and the linear layer shows that not everything is excluded.
    groups = split(nn.Sequential(nn.Linear(8, 8), norm))
    assert groups["adapted"] == {"0.weight"}
    assert groups["excluded"] == {"0.bias"} | {f"1.{name}" for name, _ in norm.named_parameters()}


def test_global_response_norms_are_excluded() -> None:
    groups = split(timm.create_model("convnextv2_atto", num_classes=0))
    assert any(name.endswith("grn.weight") for name in groups["excluded"])
    assert not any("grn" in name for name in groups["adapted"])


def test_biases_are_known_by_any_of_torchs_names() -> None:
    attention = split(nn.MultiheadAttention(8, 2))
    assert attention["excluded"] == {"in_proj_bias", "out_proj.bias"}
    recurrent = split(nn.LSTM(8, 2))
    assert recurrent["excluded"] == {"bias_ih_l0", "bias_hh_l0"}


def test_exclude_takes_names_and_patterns() -> None:
    model = timm.create_model("resnet18", num_classes=0)
    groups = split(model, exclude=["conv1.weight", "layer4.*"])
    assert "conv1.weight" in groups["excluded"]
    assert "layer1.0.conv1.weight" in groups["adapted"]
    assert not any(name.startswith("layer4.") for name in groups["adapted"])


def test_a_pattern_that_matches_nothing_is_refused_with_what_is_close() -> None:
    with pytest.raises(InputError, match=r"'convl.weight' matches no parameter of ResNet; close to it: conv1.weight"):
        param_groups(timm.create_model("resnet18", num_classes=0), 1e-4, exclude=["convl.weight"])


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[0].requires_grad_(False)
    assert split(model) == {"adapted": {"1.weight"}}


def test_a_shared_parameter_appears_once_and_is_excluded_under_any_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    [group] = param_groups(model, 1e-4)
    assert len(group["params"]) == 1
    [group] = param_groups(model, 1e-4, exclude=["1.weight"])
    assert group["name"] == "excluded"
    assert len(group["params"]) == 1


def test_a_module_of_norms_alone_gives_one_group() -> None:
    assert split(nn.BatchNorm1d(3)) == {"excluded": {"weight", "bias"}}


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(lambda groups: LARS(groups, lr=0.1), id="LARS"),
        pytest.param(lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9), id="SGD"),
        pytest.param(lambda groups: torch.optim.AdamW(groups, lr=0.1), id="AdamW"),
    ],
)
def test_lars_and_ordinary_optimizers_take_the_groups(optimizer) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    stepper = optimizer(param_groups(model, 1e-4))
    (model(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))) ** 3).sum().backward()
    stepper.step()
    assert [group["name"] for group in stepper.param_groups] == ["adapted", "excluded"]
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_weight_decay_0_leaves_adaptation_on() -> None:
    # By the rule, an adapted step has the length lr * trust_coefficient * ||p|| whatever the gradient; an excluded
    # one that of lr * gradient.
    model = nn.Linear(3, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    model.weight.grad, model.bias.grad = torch.full((2, 3), 1e3), torch.full((2,), 1e3)
    LARS(param_groups(model, weight_decay=0.0), lr=1.0, trust_coefficient=0.5).step()
    torch.testing.assert_close((weight - model.weight).norm(), 0.5 * weight.norm())
    torch.testing.assert_close(bias - model.bias, torch.full((2,), 1e3))
