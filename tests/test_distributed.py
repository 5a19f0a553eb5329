"""Global batch norm on several processes against torch's batch norm on the whole batch."""

import pytest
import timm
import torch
from torch import Tensor, nn

from simclr_scale.distributed import (
    GlobalBatchNorm,
    all_gather,
    convert_global_batch_norm,
    require_equal_across_ranks,
    world,
)

SHAPES = {"1d": (24, 5), "1d sequence": (24, 5, 3), "2d": (24, 5, 4, 3), "3d": (24, 5, 2, 2, 2)}
PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return 3 + 2 * draw(), draw()


def norm(shape: tuple[int, ...], affine: bool) -> nn.Module:
    torch.manual_seed(0)
    module = PLAIN[len(shape)](shape[1], affine=affine, momentum=0.3).double()
    if affine:
        nn.init.normal_(module.weight, 1.0, 0.5)
        nn.init.normal_(module.bias)
    return module


def normalise(rank: int, world_size: int, shape: tuple[int, ...], affine: bool, sizes: list[int]) -> dict[str, Tensor]:
    module = convert_global_batch_norm(norm(shape, affine))
    x, weights = (part.split(sizes)[rank] for part in data(shape))
    x = x.clone().requires_grad_()
    y = module(x)
    (y * weights).sum().backward()
    gradients = {f"d_{name}": parameter.grad for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(module.named_buffers())}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("sizes", [[24], [12, 12], [6, 6, 6, 6], [3, 21]])
def test_equals_batch_norm_on_the_whole_batch(gloo, shape: tuple[int, ...], affine: bool, sizes: list[int]) -> None:
    results = gloo(len(sizes), normalise, shape, affine, sizes)
    module = norm(shape, affine)
    x, weights = data(shape)
    x.requires_grad_()
    y = module(x)
    (y * weights).sum().backward()

    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([part["y"] for part in results]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([part["dx"] for part in results]), x.grad, **close)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(sum(part[f"d_{name}"] for part in results), parameter.grad, **close)
    for name, buffer in module.named_buffers():
        for part in results:
            torch.testing.assert_close(part[name], buffer, **close)


def test_conversion_keeps_tensors_names_and_mode() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.05, eps=1e-3), nn.Sequential(nn.BatchNorm2d(4))
    )
    module[2].eval()
    before, parameters = module.state_dict(), list(module.parameters())
    convert_global_batch_norm(module)
    assert [type(m) for m in module.modules()].count(GlobalBatchNorm) == 2
    assert list(module.state_dict()) == list(before)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert (module[1].momentum, module[1].eps) == (0.05, 1e-3)
    assert module[1].training
    assert not module[2][0].training


def test_evaluation_uses_running_statistics() -> None:
    plain = norm((8, 5), affine=True).eval()
    x = torch.randn(8, 5, dtype=torch.float64)
    expected = plain(x)
    torch.testing.assert_close(convert_global_batch_norm(plain)(x), expected)


def test_timms_fused_norm_keeps_its_activation() -> None:
    """Without ranks a global batch norm is a batch norm, the activation inside timm's included."""
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_b0", num_classes=0).train()
    x = torch.randn(4, 3, 64, 64)
    torch.manual_seed(1)
    expected = model(x)
    converted = convert_global_batch_norm(model)
    assert any(isinstance(m, GlobalBatchNorm) for m in converted.modules())
    torch.manual_seed(1)
    torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-4)


def test_low_precision_input_keeps_its_type() -> None:
    x = torch.randn(16, 5, 4, 4).bfloat16().requires_grad_()
    module = convert_global_batch_norm(nn.BatchNorm2d(5))
    y = module(x)
    y.float().square().sum().backward()
    assert (y.dtype, x.grad.dtype, module.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def gathered(rank: int, world_size: int) -> tuple[Tensor, tuple[int, int], str]:
    try:
        require_equal_across_ranks(rank // 2, "number of things")
        message = ""
    except ValueError as error:
        message = str(error)
    return all_gather(torch.tensor([[rank, 10 * rank]])), tuple(world()), message


def test_gather_and_agreement(gloo) -> None:
    for rank, (rows, place, message) in enumerate(gloo(4, gathered)):
        assert rows.tolist() == [[0, 0], [1, 10], [2, 20], [3, 30]]
        assert place == (rank, 4)
        assert "number of things" in message
        assert "[0, 0, 1, 1]" in message


def test_one_process_needs_no_group() -> None:
    x = torch.ones(2, 3)
    assert world() == (0, 1)
    assert all_gather(x) is x
    require_equal_across_ranks(1, "anything")
