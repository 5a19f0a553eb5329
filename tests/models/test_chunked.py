"""Encoding in chunks against encoding each chunk plainly."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simclr_scale.models import create_encoder
from simclr_scale.models.chunked import encode_in_chunks


def convolutions(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False),
        nn.BatchNorm2d(5, momentum=momentum),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).double()


def gradients(module: nn.Module, features: Tensor) -> dict[str, Tensor]:
    features.square().mul(torch.arange(features.numel()).view_as(features)).sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 7, 20])
def test_equals_an_encoder_without_batch_norm(chunk_size: int) -> None:
    torch.manual_seed(0)
    encoder = create_encoder("test_vit", img_size=16, patch_size=8).double().train()
    plain = copy.deepcopy(encoder)
    x = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    expected, features = plain(x), encode_in_chunks(encoder, x, chunk_size)
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(encoder, features), gradients(plain, expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("chunk_size", [2, 5, 8])
def test_batch_norm_sees_each_chunk_once(chunk_size: int, momentum: float | None) -> None:
    encoder = convolutions(momentum)
    plain = copy.deepcopy(encoder)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    expected = torch.cat([plain(part) for part in x.split(chunk_size)])
    features = encode_in_chunks(encoder, x, chunk_size)
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(encoder, features), gradients(plain, expected), rtol=1e-10, atol=1e-10)
    for (name, buffer), plain_buffer in zip(encoder.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, plain_buffer), name
    assert encoder[1].momentum == momentum


class Watched(nn.Module):
    """Keeps the statistics of its features by a norm that takes no part in the result."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.statistics = convolutions(), nn.BatchNorm1d(5, affine=False).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        self.statistics(h.detach())
        return h


def test_a_norm_that_the_second_forward_does_not_reach() -> None:
    """It breaks off as soon as backward has all it needs."""
    encoder = Watched()
    encode_in_chunks(encoder, torch.randn(8, 3, 6, 6, dtype=torch.float64), 4).sum().backward()
    assert encoder.statistics.num_batches_tracked == encoder.body[1].num_batches_tracked == 2


def test_dropout_is_repeated() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Dropout(0.5), nn.Linear(6, 4)).double()
    plain = copy.deepcopy(encoder)
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    torch.manual_seed(1)
    expected = torch.cat([plain(part) for part in x.split(2)])
    torch.manual_seed(1)
    features = encode_in_chunks(encoder, x, 2)
    torch.manual_seed(2)
    assert torch.equal(features, expected)
    torch.testing.assert_close(gradients(encoder, features), gradients(plain, expected))


def test_keeps_no_activations() -> None:
    """For the backward pass there are the images and nothing else, however many chunks."""
    encoder = convolutions()
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)

    def kept_by(encode: Callable[[], Tensor]) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            encode()
        return sum(sizes)

    assert kept_by(lambda: encoder(images)) > 2 * images.numel()
    assert kept_by(lambda: encode_in_chunks(encoder, images, 2)) == images.numel()
