"""The projection head against Google's layers written out in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from simclr_scale.errors import InputError
from simclr_scale.models import ProjectionHead


def written_out(head: ProjectionHead, h: np.ndarray) -> list[np.ndarray]:
    """Input and output of every layer, with the statistics of the batch."""
    outputs = [h]
    for index, layer in enumerate(head.layers):
        y = outputs[-1] @ layer[0].weight.detach().numpy().T
        if len(layer) == 1:
            outputs.append(y)
            continue
        norm = layer[1]
        y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5) * norm.weight.detach().numpy()
        if index < len(head.layers) - 1:
            y = np.maximum(y + norm.bias.detach().numpy(), 0)
        outputs.append(y)
    return outputs


@pytest.mark.parametrize("last_norm", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_values_layer_by_layer(num_layers: int, last_norm: bool) -> None:
    torch.manual_seed(0)
    head = ProjectionHead(13, hidden_features=17, out_features=5, num_layers=num_layers, last_norm=last_norm).double()
    assert len(head.layers[-1]) == (2 if last_norm else 1)
    for parameter in head.parameters():
        nn.init.uniform_(parameter, -1, 1)
    h = torch.randn(7, 13, dtype=torch.float64)
    expected = written_out(head, h.numpy())
    np.testing.assert_allclose(head(h).detach().numpy(), expected[-1], rtol=1e-10, atol=1e-12)
    for layers, value in enumerate(expected):
        np.testing.assert_allclose(head(h, layers=layers).detach().numpy(), value, rtol=1e-10, atol=1e-12)


def test_structure_is_the_recipe() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(512, num_layers=3)
    shapes = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    assert shapes == {
        "layers.0.0.weight": (512, 512),
        "layers.0.1.weight": (512,),
        "layers.0.1.bias": (512,),
        "layers.1.0.weight": (512, 512),
        "layers.1.1.weight": (512,),
        "layers.1.1.bias": (512,),
        "layers.2.0.weight": (128, 512),
        "layers.2.1.weight": (128,),
    }
    for module in head.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.02)
        if isinstance(module, nn.BatchNorm1d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)
            assert (module.weight == 1).all()


def test_defaults_are_those_of_the_first_paper() -> None:
    head = ProjectionHead(96)
    assert [layer[0].out_features for layer in head.layers] == [96, 128]
    assert (head.in_features, head.out_features) == (96, 128)


def test_without_layers_it_is_the_identity() -> None:
    head = ProjectionHead(6, num_layers=0)
    h = torch.randn(3, 6)
    assert head(h) is h
    assert head.out_features == 6
    assert not list(head.parameters())


def test_norm_without_beta_survives_conversion_to_global_batch_norm() -> None:
    head = ProjectionHead(6, out_features=4).eval()
    h = torch.randn(5, 6)
    expected, keys = head(h), head.state_dict().keys()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(head)
    assert isinstance(converted.layers[-1][1], nn.SyncBatchNorm)
    assert converted.state_dict().keys() == keys
    torch.testing.assert_close(converted(h), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_features": 0}, "in_features=0 must be at least 1"),
        ({"in_features": 4, "hidden_features": -1}, "hidden_features=-1 must be at least 1"),
        ({"in_features": 4, "out_features": 0}, "out_features=0 must be at least 1"),
        ({"in_features": 4, "num_layers": -1}, r"num_layers=-1 must be 0 \(identity\) or more"),
    ],
)
def test_arguments_out_of_range(kwargs: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ProjectionHead(**kwargs)


@pytest.mark.parametrize("layers", [-1, 3])
def test_a_layer_that_the_head_lacks(layers: int) -> None:
    with pytest.raises(InputError, match=rf"layers={layers} must lie in 0..2"):
        ProjectionHead(4)(torch.randn(3, 4), layers=layers)
