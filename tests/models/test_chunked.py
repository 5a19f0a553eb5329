"""Encoding in chunks against encoding each chunk plainly."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from simclr_scale.distributed import GlobalBatchNorm
from simclr_scale.errors import InputError
from simclr_scale.losses import nt_xent
from simclr_scale.models import ProjectionHead, create_encoder
from simclr_scale.models.chunked import encode_in_chunks

ENGINES = ("dense", "tiled")


def convolutions(norm: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False),
        norm or nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).double()


def parts(x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    assert sum(sizes) == len(x)
    return x.split(sizes)


def gradients(module: nn.Module, features: Tensor) -> dict[str, Tensor | None]:
    features.square().mul(torch.arange(features.numel()).view_as(features)).sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_equal_buffers(module: nn.Module, other: nn.Module) -> None:
    for (name, buffer), other_buffer in zip(module.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, other_buffer), name


class Sizes(nn.Module):
    """Notes how many rows each of its forwards has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(1, 2), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.linear(x.flatten(1)).square()


@pytest.mark.parametrize(
    ("rows", "chunk_size", "sizes"),
    [
        (7, 3, [3, 2, 2]),
        (256, 85, [64, 64, 64, 64]),  # not 85, 85, 85 and one alone
        (512, 100, [86, 86, 85, 85, 85, 85]),
        (6, 1, [1] * 6),
        (8, 4, [4, 4]),
        (8, 8, [8]),
        (8, 20, [8]),
    ],
)
def test_chunks_are_few_and_alike_and_the_last_is_encoded_once(rows: int, chunk_size: int, sizes: list[int]) -> None:
    encoder = Sizes()
    features = encode_in_chunks(encoder, torch.randn(rows, 1, 1, 1), chunk_size)
    assert encoder.seen == sizes
    encoder.seen.clear()
    features.sum().backward()
    assert encoder.seen == sizes[-2::-1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 7, 20])
def test_equals_an_encoder_without_batch_norm(chunk_size: int, engine: Any) -> None:
    """Through the head, whose batch norm takes all rows at once, and the loss."""
    torch.manual_seed(0)
    encoder = create_encoder("test_vit", img_size=16, patch_size=8).double().train()
    head = ProjectionHead(encoder.num_features, hidden_features=6, out_features=4).double().train()
    plain, plain_head = copy.deepcopy(encoder), copy.deepcopy(head)
    x = torch.randn(14, 3, 16, 16, dtype=torch.float64)

    loss = nt_xent(head(encode_in_chunks(encoder, x, chunk_size)), 0.2, engine=engine)
    expected = nt_xent(plain_head(plain(x)), 0.2, engine="dense")
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for module, other in ((encoder, plain), (head, plain_head)):
        for (name, parameter), twin in zip(module.named_parameters(), other.parameters(), strict=True):
            largest = twin.grad.abs().max().item()
            # The head's batch norm takes away what shifts all features alike: no gradient, but for rounding.
            assert (largest > 1e-6) == (name != "norm.bias"), f"{name} is at most {largest}"
            assert (parameter.grad - twin.grad).abs().max() <= 1e-10 * max(largest, 1e-3), name
    torch.testing.assert_close(dict(head.named_buffers()), dict(plain_head.named_buffers()), rtol=1e-10, atol=1e-10)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "momentum .1": lambda: nn.BatchNorm2d(5, momentum=0.1),
    "momentum 1": lambda: nn.BatchNorm2d(5, momentum=1.0),
    "cumulative": lambda: nn.BatchNorm2d(5, momentum=None),
    "without statistics": lambda: nn.BatchNorm2d(5, track_running_stats=False),
    "global": lambda: GlobalBatchNorm(5),
    "global, cumulative": lambda: GlobalBatchNorm(5, momentum=None),
    "instance norm": lambda: nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
    "timm's batch norm with activation": lambda: timm.layers.BatchNormAct2d(5),
    "EvoNorm-B0": lambda: timm.layers.EvoNorm2dB0(5),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("chunk_size", "sizes"), [(2, [2, 2, 2, 2]), (3, [3, 3, 2]), (5, [4, 4]), (8, [8])])
def test_each_chunk_has_its_statistics_and_counts_once(norm: str, chunk_size: int, sizes: list[int]) -> None:
    encoder = convolutions(NORMS[norm]())
    plain = copy.deepcopy(encoder)
    own_buffers = dict(encoder.named_buffers())
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    for _ in range(2):
        expected = torch.cat([plain(part) for part in parts(x, sizes)])
        features = encode_in_chunks(encoder, x, chunk_size)
        torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(encoder, features), gradients(plain, expected), rtol=1e-10, atol=1e-10)
        assert_equal_buffers(encoder, plain)
    for name, buffer in encoder.named_buffers():
        assert buffer is own_buffers[name], f"{name} is another tensor than DDP and state_dict know"


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


@pytest.mark.parametrize("frozen", ["stem", "all", "norm in evaluation", "encoder in evaluation"])
def test_frozen_parts(frozen: str) -> None:
    encoder = convolutions()
    nn.init.uniform_(encoder[1].running_mean)
    if frozen in ("stem", "all"):
        (encoder[0] if frozen == "stem" else encoder).requires_grad_(False)
    else:
        (encoder[1] if frozen == "norm in evaluation" else encoder).eval()
    modes = [module.training for module in encoder.modules()]
    plain = copy.deepcopy(encoder)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    expected, features = torch.cat([plain(part) for part in parts(x, [3, 3, 2])]), encode_in_chunks(encoder, x, 3)
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)
    assert features.requires_grad == (frozen != "all")
    if frozen != "all":
        torch.testing.assert_close(gradients(encoder, features), gradients(plain, expected), rtol=1e-10, atol=1e-10)
    assert_equal_buffers(encoder, plain)
    assert [module.training for module in encoder.modules()] == modes


def test_without_gradients() -> None:
    encoder = convolutions()
    plain = copy.deepcopy(encoder)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(encode_in_chunks(encoder, x, 4), torch.cat([plain(part) for part in x.split(4)]))
    assert_equal_buffers(encoder, plain)


RANDOM_ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.Dropout(0.5), nn.Linear(6, 4)),
    "drop path": lambda: create_encoder("test_vit", img_size=16, patch_size=8, drop_path_rate=0.5),
}


@pytest.mark.parametrize("name", RANDOM_ENCODERS)
def test_randomness_is_repeated(name: str) -> None:
    torch.manual_seed(0)
    encoder = RANDOM_ENCODERS[name]().double().train()
    plain = copy.deepcopy(encoder)
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    torch.manual_seed(1)
    expected = torch.cat([plain(part) for part in parts(x, [2, 2, 2])])
    after = torch.get_rng_state()
    torch.manual_seed(1)
    features = encode_in_chunks(encoder, x, 2)
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(features, expected)
    torch.testing.assert_close(gradients(encoder, features), gradients(plain, expected), rtol=1e-10, atol=1e-10)
    assert torch.equal(torch.get_rng_state(), before), "backward must not move the random stream"


def test_autocast_is_repeated() -> None:
    encoder = convolutions().float()
    plain = copy.deepcopy(encoder)
    x = torch.randn(8, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        features = encode_in_chunks(encoder, x, 3)
        assert torch.is_autocast_cache_enabled()
    assert features.dtype == torch.bfloat16
    expected = []
    for part in parts(x, [3, 3, 2]):
        with torch.autocast("cpu", torch.bfloat16):  # an own context has an own cache
            expected.append(plain(part))
    assert torch.equal(features, torch.cat(expected))
    torch.testing.assert_close(
        gradients(encoder, features.float()), gradients(plain, torch.cat(expected).float()), rtol=1e-6, atol=1e-6
    )
    assert_equal_buffers(encoder, plain)


def test_many_chunks_are_not_summed_in_bfloat16() -> None:
    """512 gradients of 1: bfloat16 cannot count beyond 256."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
    with torch.autocast("cpu", torch.bfloat16):
        features = encode_in_chunks(encoder, torch.ones(512, 1, 2, 2), 1)
    features.float().sum().backward()
    assert torch.equal(encoder[1].weight.grad, torch.full((1, 4), 512.0))


@pytest.mark.parametrize("memory_format", [torch.preserve_format, torch.channels_last])
def test_keeps_the_images_and_the_last_chunk(memory_format: torch.memory_format) -> None:
    """Nothing else for the backward pass, however many chunks; the images in their own memory."""
    encoder = convolutions()
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)

    def kept_by(encode: Callable[[], Tensor]) -> dict[int, int]:
        """Bytes by address, that of the images left out."""
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            features = encode()
        assert features.requires_grad
        kept.pop(images.untyped_storage().data_ptr(), None)
        return kept

    last = sum(kept_by(lambda: encoder(images[6:].to(memory_format=memory_format))).values())
    assert sum(kept_by(lambda: encoder(images.to(memory_format=memory_format))).values()) > 3 * last
    assert sum(kept_by(lambda: encode_in_chunks(encoder, images, 2, memory_format)).values()) == last


def test_memory_format() -> None:
    encoder = convolutions()
    seen: list[bool] = []
    encoder.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    encode_in_chunks(encoder, torch.randn(8, 3, 6, 6, dtype=torch.float64), 4, torch.channels_last).sum().backward()
    assert seen == [True] * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("rows", "sizes", "graphs"), [(8, [4, 4], 1), (10, [4, 3, 3], 2)])
def test_compiled_encoder(rows: int, sizes: list[int], graphs: int) -> None:
    """The second forward runs the graph of the first, whose saved activations it must reproduce one by one."""
    torch.compiler.reset()
    encoder = convolutions().float()
    plain = copy.deepcopy(encoder)
    backend = CompileCounterWithBackend("aot_eager_decomp_partition")
    encoder.compile(backend=backend)
    for _ in range(2):
        x = torch.randn(rows, 3, 6, 6)
        expected, features = torch.cat([plain(part) for part in parts(x, sizes)]), encode_in_chunks(encoder, x, 4)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients(encoder, features), gradients(plain, expected), rtol=1e-3, atol=1e-4)
        for buffer, twin in zip(encoder.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(buffer, twin, rtol=1e-5, atol=1e-6)
    assert backend.frame_count == graphs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_within_a_compiled_function() -> None:
    torch.compiler.reset()
    encoder = convolutions()
    plain = copy.deepcopy(encoder)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    features = torch.compile(lambda x: encode_in_chunks(encoder, 2 * x, 4), backend="aot_eager")(x)
    expected = torch.cat([plain(2 * part) for part in x.split(4)])
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(gradients(encoder, features), gradients(plain, expected))
    assert_equal_buffers(encoder, plain)


def test_one_view_has_no_statistics() -> None:
    encoder = convolutions()
    x = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"model\.chunk_size .* 1 view.* 2 or more"):
        encode_in_chunks(encoder, x, 1)
    encode_in_chunks(encoder, x, 2)
    encode_in_chunks(encoder.eval(), x, 1)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_errors_of_the_encoder_stay_its_own(chunk_size: int) -> None:
    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("an encoder's own reason")

    with pytest.raises(ValueError, match="own reason") as caught:
        encode_in_chunks(Refusing(), torch.randn(4, 3, 3, 3), chunk_size)
    assert not isinstance(caught.value, InputError)
