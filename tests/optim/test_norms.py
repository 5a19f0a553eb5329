import pytest
import torch

from simclr_scale.optim.norms import local_norms, whole_norms


@pytest.mark.parametrize(
    ("kinds", "wide"),
    [
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float16,), torch.float32),
        ((torch.float64, torch.float32), torch.float64),
    ],
)
def test_norms_in_at_least_single_precision(kinds: tuple[torch.dtype, ...], wide: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(3, 5).to(kind) * 300 for kind in kinds] + [torch.empty(0, 4, dtype=kinds[0])]
    for norms in (local_norms(tensors), whole_norms(tensors)):
        assert norms.dtype == wide
        expected = [x.double().pow(2).sum().sqrt().item() for x in tensors]
        assert norms.tolist() == pytest.approx(expected, rel=1e-6)
