"""Grids of SGD probes: each head is the probe that torch would train alone."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from simclr_scale.data.randomness import Purpose, generator
from simclr_scale.data.splits import stratified_split
from simclr_scale.errors import InputError
from simclr_scale.evaluation import ProbeSetting, probe_grid, train_probes
from simclr_scale.evaluation.probes import LEARNING_RATES, WEIGHT_DECAYS

SETTINGS = [ProbeSetting(rate, decay) for rate in (0.01, 0.4, 5.0) for decay in (1e-2, 0.0, 0.3)]


def problem(n: int = 131, width: int = 7, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(n)
    targets = torch.cat([torch.arange(classes), torch.randint(classes, (n - classes,), generator=draw)])
    centres = torch.randn(classes, width, generator=draw, dtype=torch.float64)
    return (centres[targets] + torch.randn(n, width, generator=draw, dtype=torch.float64)).relu(), targets


def alone(
    features: torch.Tensor,
    targets: torch.Tensor,
    setting: ProbeSetting,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    nesterov: bool = True,
    decay_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One probe by torch's own layers, loss, optimizer and schedule."""
    head = torch.nn.Linear(features.shape[1], int(targets.max()) + 1, dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    size = min(batch_size, len(features))
    steps = len(features) // size
    groups = [
        {"params": [head.weight], "weight_decay": setting.weight_decay},
        {"params": [head.bias], "weight_decay": setting.weight_decay if decay_bias else 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=setting.learning_rate * size / 256, momentum=0.9, nesterov=nesterov)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / (epochs * steps))) / 2
    )
    for epoch in range(epochs):
        order = generator(Purpose.ORDER, seed, epoch, 0).bit_generator.random_raw(len(features)).argsort(kind="stable")
        for chosen in torch.from_numpy(order)[: steps * size].split(size):
            optimizer.zero_grad()
            F.cross_entropy(head(features[chosen]), targets[chosen]).backward()
            optimizer.step()
            schedule.step()
    return head.weight.detach(), head.bias.detach()


@pytest.mark.parametrize(("n", "batch_size", "classes"), [(131, 32, 3), (64, 64, 2), (23, 256, 5), (50, 1, 4)])
def test_every_head_is_the_probe_that_torch_trains_alone(n: int, batch_size: int, classes: int) -> None:
    features, targets = problem(n, classes=classes)
    grid = train_probes(features, targets, classes, SETTINGS, epochs=4, batch_size=batch_size, seed=3)
    for head, setting in enumerate(SETTINGS):
        weight, bias = alone(features, targets, setting, epochs=4, batch_size=batch_size, seed=3)
        torch.testing.assert_close(grid.weight[head], weight, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(grid.bias[head], bias, rtol=1e-8, atol=1e-10)


def test_every_head_is_itself_trained_alone() -> None:
    features, targets = problem()
    grid = train_probes(features, targets, 3, SETTINGS, epochs=5, batch_size=16)
    for head, setting in enumerate(SETTINGS):
        single = train_probes(features, targets, 3, [setting], epochs=5, batch_size=16)
        torch.testing.assert_close(grid.weight[head], single.weight[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grid.bias[head], single.bias[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mistake", [{"nesterov": False}, {"decay_bias": True}, {"seed": 4}, {"batch_size": 33}])
def test_the_comparison_sees_the_usual_mistakes(mistake: dict[str, int]) -> None:
    features, targets = problem()
    grid = train_probes(features, targets, 3, SETTINGS, epochs=4, batch_size=32, seed=3)
    weight, bias = alone(features, targets, SETTINGS[8], **({"epochs": 4, "batch_size": 32, "seed": 3} | mistake))  # type: ignore[arg-type]
    assert max(float((grid.weight[8] - weight).abs().max()), float((grid.bias[8] - bias).abs().max())) > 1e-4


def test_float32_is_float64_to_its_rounding() -> None:
    features, targets = problem()
    settings = [setting for setting in SETTINGS if setting.learning_rate < 1]
    exact = train_probes(features, targets, 3, settings, epochs=4, batch_size=32)
    rounded = train_probes(features.float(), targets, 3, settings, epochs=4, batch_size=32)
    assert rounded.weight.dtype is torch.float32
    torch.testing.assert_close(rounded.weight.double(), exact.weight, rtol=1e-4, atol=1e-5)


def test_a_head_that_diverges_leaves_the_others_alone() -> None:
    features, targets = problem()
    wild = ProbeSetting(1e4, 1e4)
    settings = [SETTINGS[0], wild, SETTINGS[4]]
    grid = train_probes(features, targets, 3, settings, epochs=9, batch_size=8)
    without = train_probes(features, targets, 3, [SETTINGS[0], SETTINGS[4]], epochs=9, batch_size=8)
    assert grid.finite == [True, False, True]
    torch.testing.assert_close(grid.weight[[0, 2]], without.weight, rtol=1e-12, atol=1e-12)
    accuracies = grid.accuracies(features, targets)
    assert accuracies[1] == 0.0
    expected = [
        float(((features @ grid.weight[head].T + grid.bias[head]).argmax(dim=1) == targets).double().mean())
        for head in (0, 2)
    ]
    assert [accuracies[0], accuracies[2]] == expected


def test_the_default_grid_is_sixteen_heads_around_the_papers() -> None:
    assert len(LEARNING_RATES) * len(WEIGHT_DECAYS) == 16
    assert min(abs(rate - 0.1) for rate in LEARNING_RATES) < 1e-12
    assert 0.0 in WEIGHT_DECAYS


def test_the_head_is_chosen_on_training_images_and_trained_anew_on_all() -> None:
    features, targets = problem(403, 12, 4)
    names = torch.tensor([30, 7, 1000, 8])
    train, test = slice(0, 300), slice(300, 403)
    told: list[int] = []
    probe = probe_grid(
        features[train], names[targets[train]], features[test], names[targets[test]],
        epochs=6, batch_size=32, seed=2, dtype=torch.float64, progress=told.append,
    )  # fmt: skip
    assert told == list(range(1, 13))
    assert probe.classes.tolist() == [7, 8, 30, 1000]
    positions = torch.searchsorted(probe.classes, names[targets[train]])

    kept, held_out = (torch.from_numpy(part) for part in stratified_split(positions.numpy(), 0.8, 2))
    settings = [ProbeSetting(rate, decay) for rate in LEARNING_RATES for decay in WEIGHT_DECAYS]
    scores = []
    for setting in settings:
        weight, bias = alone(features[train][kept], positions[kept], setting, epochs=6, batch_size=32, seed=2)
        predicted = (features[train][held_out] @ weight.T + bias).argmax(dim=1)
        scores.append(float((predicted == positions[held_out]).double().mean()))
    assert [score.accuracy for score in probe.validation] == pytest.approx(scores)
    assert scores[settings.index(probe.setting)] == max(scores)

    weight, bias = alone(features[train], positions, probe.setting, epochs=6, batch_size=32, seed=2)
    torch.testing.assert_close(probe.weight, weight, rtol=1e-8, atol=1e-10)
    assert probe.test_accuracy == probe.accuracy(features[test], names[targets[test]])
    assert probe.test_accuracy > 0.6

    # No test label has a say; the seed is what draws the validation images.
    other = probe_grid(features[train], names[targets[train]], features[test], names[targets[test]].flip(0),
                       epochs=6, batch_size=32, seed=2, dtype=torch.float64)  # fmt: skip
    assert other.validation == probe.validation
    reseeded = probe_grid(features[train], targets[train], epochs=6, batch_size=32, seed=3, dtype=torch.float64)
    assert reseeded.validation != probe.validation


def test_one_setting_is_trained_without_a_choice() -> None:
    features, targets = problem()
    told: list[int] = []
    probe = probe_grid(features, targets, learning_rates=[0.1], weight_decays=[0.0], epochs=3, progress=told.append)
    assert (probe.validation, probe.warnings, told) == ((), (), [1, 2, 3])
    assert probe.setting == ProbeSetting(0.1, 0.0)


def test_equals_are_decided_and_the_edges_of_the_grid_are_reported() -> None:
    features, targets = problem(90, 4, 2)
    features[:, 0] += 40 * targets - 20  # so easy that all are right
    probe = probe_grid(features, targets, learning_rates=[0.3, 0.1], weight_decays=[0.0, 1e-4], epochs=30)
    assert {score.accuracy for score in probe.validation} == {1.0}
    assert probe.setting == ProbeSetting(0.1, 1e-4)
    assert probe.warnings == (
        "the learning rate chosen, 0.1, is the smallest of those tried: a better one may lie below",
    )
    wild = probe_grid(features, targets, learning_rates=[0.1, 1e6], weight_decays=[100.0], epochs=40, batch_size=8)
    assert wild.warnings[0] == "1 of the 2 probes diverged and were not chosen"
    assert wild.setting == ProbeSetting(0.1, 100.0)


def test_twice_is_the_same_to_the_bit() -> None:
    features, targets = problem()
    first, second = (probe_grid(features, targets, epochs=3, batch_size=16) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.validation == second.validation


X, Y = problem(12, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((X, torch.ones(12, dtype=torch.long)), {}, "all are of class 1; a classifier needs at least two"),
        ((X, Y - 1), {}, "train_labels: .* of 12 are negative"),
        ((X / 0, Y), {}, "train_features: row 0 holds NaN or infinity"),
        ((X, Y, X), {}, "one is given without the other"),
        ((X, torch.arange(12)), {}, "one image in each class, none left to choose a head by; give one setting"),
        ((X, Y), {"learning_rates": []}, "learning_rates: none given"),
        ((X, Y), {"learning_rates": [0.1, 0.0]}, "learning_rates: 0.0, wanted a finite number above 0"),
        ((X, Y), {"learning_rates": [0.1, 0.1]}, "learning_rates: 0.1 is given twice"),
        ((X, Y), {"weight_decays": [-1.0]}, "weight_decays: -1.0, wanted a finite number of at least 0"),
        ((X, Y), {"weight_decays": [float("nan")]}, "weight_decays: nan"),
        ((X, Y), {"epochs": 0}, "epochs: 0"),
        ((X, Y), {"batch_size": 0}, "batch_size: 0"),
        ((X, Y), {"validation_fraction": 1.0}, "validation_fraction: 1.0"),
        (
            (X, Y),
            {"learning_rates": [1e9, 1e8], "weight_decays": [1e9], "batch_size": 2},
            r"every probe diverged, that at 1e\+08 too",
        ),
        (
            (X, Y),
            {"learning_rates": [1e9], "weight_decays": [1e9], "batch_size": 2},
            r"the probe at 1e\+09 diverged; wanted a smaller one",
        ),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[torch.Tensor, ...], settings: dict[str, Sequence[float]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        probe_grid(*arguments, **settings)  # type: ignore[arg-type]
