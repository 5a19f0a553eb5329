"""The online probe: its gradient is written out, so autograd is the oracle."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simclr_scale.pretraining.probe import OnlineProbe

WIDTH, CLASSES = 7, 4


def probe(learning_rate: float = 1e-3) -> OnlineProbe:
    """In float64, with weights that are not zero."""
    module = OnlineProbe(WIDTH, CLASSES, learning_rate).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def batch(seed: int = 1, size: int = 12) -> tuple[Tensor, Tensor]:
    """Features and labels, a third of them unknown."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    labels[::3] = -1
    return features, labels


def test_gradient_is_autograds() -> None:
    module = probe()
    features, labels = batch()
    weight, bias = (parameter.clone().requires_grad_() for parameter in module.parameters())
    logits = F.linear(features, weight, bias)
    expected = F.cross_entropy(logits, labels, ignore_index=-1)
    expected.backward()

    loss, accuracy = module.update(features, labels)
    torch.testing.assert_close(module.classifier.weight.grad, weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.classifier.bias.grad, bias.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, expected.detach())
    known = labels >= 0
    assert accuracy.item() == pytest.approx((logits.argmax(1) == labels)[known].double().mean().item())


def test_the_step_is_adams() -> None:
    module, twin = probe(), probe()
    for parameter in twin.parameters():
        parameter.requires_grad_()
    adam = torch.optim.Adam(twin.parameters(), lr=1e-3)
    for seed in range(5):
        features, labels = batch(seed)
        module.update(features, labels)
        adam.zero_grad()
        F.cross_entropy(twin.classifier(features), labels, ignore_index=-1).backward()
        adam.step()
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-9)


def test_learns_what_a_line_separates() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (256,))
    features = 3 * torch.eye(CLASSES, WIDTH)[labels] + torch.randn(256, WIDTH) * 0.3
    module = OnlineProbe(WIDTH, CLASSES, learning_rate=0.05)
    losses = [module.update(features, labels)[0].item() for _ in range(60)]
    assert losses[0] == pytest.approx(torch.tensor(CLASSES).log().item()), "it starts undecided"
    assert losses[-1] < 0.1
    assert module.update(features, labels)[1] > 0.99


def test_rows_without_a_label_do_not_count() -> None:
    module, twin = probe(), probe()
    features, labels = batch()
    known = labels >= 0
    assert module.update(features, labels) == twin.update(features[known], labels[known])
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


def test_a_batch_without_any_label_is_no_error() -> None:
    module = probe()
    before = [parameter.clone() for parameter in module.parameters()]
    loss, accuracy = module.update(batch()[0], torch.full((12,), -1))
    assert (loss.item(), accuracy.item()) == (0.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_takes_no_part_in_autograd() -> None:
    features = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True)
    module = probe()
    loss, _ = module.update(features, batch()[1])
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not loss.requires_grad
    assert features.grad is None


def test_half_precision_features() -> None:
    features, labels = batch()
    module, twin = OnlineProbe(WIDTH, CLASSES), OnlineProbe(WIDTH, CLASSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module.update(features.bfloat16(), labels)
    twin.update(features.bfloat16().float(), labels)
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


def update_on_a_share(rank: int, world_size: int) -> dict[str, Tensor]:
    module = probe()
    for seed in range(3):
        features, labels = (part.chunk(world_size)[rank] for part in batch(seed))
        if seed == 2 and rank == 0:
            labels = torch.full_like(labels, -1)  # nothing to learn on this rank
        module.update(features, labels)
    return module.state_dict()


def test_ranks_learn_together(gloo) -> None:
    module = probe()
    for seed in range(3):
        features, labels = batch(seed)
        if seed == 2:
            labels[:6] = -1
        module.update(features, labels)
    for state in gloo(2, update_on_a_share):
        torch.testing.assert_close(state, module.state_dict(), rtol=1e-9, atol=1e-9)
