import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression as ScikitLogisticRegression

from simclr_scale.errors import InputError
from simclr_scale.evaluation import linear_probe
from simclr_scale.evaluation.linear import L2_VALUES
from simclr_scale.evaluation.logistic import LogisticRegression


def encoder_like(n: int, features: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative, correlated features of falling variance with a mean far from 0; overlapping classes."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=n - classes)])
    hidden = rng.normal(size=(n, 2 * classes)) + 0.8 * rng.normal(size=(classes, 2 * classes))[labels]
    spectrum = np.logspace(0.5, -2, features)
    mixed = hidden @ rng.normal(size=(2 * classes, features)) * spectrum + 0.01 * rng.normal(size=(n, features))
    return torch.from_numpy(np.maximum(mixed + 1, 0)).float(), torch.from_numpy(labels)


def objective(
    weight: torch.Tensor, bias: torch.Tensor, features: torch.Tensor, targets: torch.Tensor, l2: float
) -> tuple[float, float]:
    """Value, and norm of the gradient, by autograd in the coordinates of the features."""
    weight, bias = weight.double().clone().requires_grad_(), bias.double().clone().requires_grad_()
    value = F.cross_entropy(features.double() @ weight.T + bias, targets) + l2 / 2 * weight.square().sum()
    value.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    return float(value.detach()), float(torch.cat([weight.grad.flatten(), bias.grad]).norm())


@pytest.mark.parametrize("l2", [1e5, 1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(("n", "features", "classes"), [(403, 37, 5), (61, 90, 3)])
def test_reaches_the_optimum_of_scikit_learn(n: int, features: int, classes: int, l2: float) -> None:
    x, y = encoder_like(n, features, classes)
    probe = linear_probe(x, y, l2=l2)
    oracle = ScikitLogisticRegression(C=1 / (n * l2), solver="newton-cg", tol=1e-8, max_iter=1000)
    oracle.fit(x.double().numpy(), y.numpy())
    best, _ = objective(torch.from_numpy(oracle.coef_), torch.from_numpy(oracle.intercept_), x, y, l2)
    reached, gradient = objective(probe.weight, probe.bias, x, y, l2)
    assert probe.converged
    assert probe.warnings == ()
    assert reached == pytest.approx(best, abs=2e-5)
    assert probe.train_loss == pytest.approx(reached, abs=1e-10)
    assert gradient < 2e-4
    agreement = (probe.predict(x).numpy() == oracle.predict(x.double().numpy())).mean()
    assert agreement > 0.99


def test_two_classes_are_scikit_learns_at_twice_the_c() -> None:
    x, y = encoder_like(301, 20, 2)
    probe = linear_probe(x, y, l2=1e-2)
    oracle = ScikitLogisticRegression(C=2 / (301 * 1e-2), tol=1e-8, max_iter=10_000).fit(x.double().numpy(), y.numpy())
    np.testing.assert_allclose((probe.weight[1] - probe.weight[0]).numpy(), oracle.coef_[0], atol=1e-3)


def test_the_whole_warm_started_path_lies_at_the_optima_of_scikit_learn() -> None:
    """All 45 strengths as the choice goes through them, each from the solution before."""
    x, y = encoder_like(203, 24, 4)
    problem, fit = LogisticRegression(x.double(), y, 4), None
    for l2 in sorted(L2_VALUES, reverse=True):
        fit = problem.fit(l2, start=fit)
        oracle = ScikitLogisticRegression(C=1 / (203 * l2), solver="newton-cholesky", tol=1e-9, max_iter=1000)
        oracle.fit(x.double().numpy(), y.numpy())
        best, _ = objective(torch.from_numpy(oracle.coef_), torch.from_numpy(oracle.intercept_), x, y, l2)
        reached, _ = objective(fit.weight, fit.bias, x, y, l2)
        assert fit.converged
        assert abs(reached - best) < 1e-4, l2
        assert fit.loss == pytest.approx(reached, abs=1e-10)


def test_scale_and_offset_of_the_features_do_not_harm_convergence() -> None:
    x, y = encoder_like(200, 15, 4)
    plain = linear_probe(x, y, l2=1e-3)
    moved = linear_probe(1000 * x.double() + 1e4, y, l2=1e-3 * 1000**2)
    assert moved.converged
    assert moved.train_loss == pytest.approx(plain.train_loss, abs=1e-5)
    torch.testing.assert_close(1000 * moved.weight, plain.weight, atol=1e-2, rtol=0)


def test_a_constant_feature_gets_no_weight() -> None:
    x, y = encoder_like(150, 10, 3)
    x[:, 4] = 7.0
    probe = linear_probe(x, y, l2=1e-4)
    assert probe.converged
    torch.testing.assert_close(probe.weight[:, 4], torch.zeros(3, dtype=torch.float64), atol=1e-8, rtol=0)


def test_a_start_elsewhere_leads_to_the_same_optimum() -> None:
    x, y = encoder_like(403, 37, 5)
    problem = LogisticRegression(x.double(), y, 5)
    cold = problem.fit(1e-4)
    for l2 in (1e-2, 1e-5):
        assert problem.fit(1e-4, start=problem.fit(l2)).loss == pytest.approx(cold.loss, abs=1e-5)
    assert problem.fit(1e-4, start=cold).iterations < cold.iterations / 2


def test_classes_keep_their_names_and_foreign_test_labels_are_errors() -> None:
    x, y = encoder_like(120, 10, 3)
    names = torch.tensor([30, 7, 1000])
    probe = linear_probe(x, names[y], x[:60], torch.full((60,), 5), l2=1e-3)
    assert probe.classes.tolist() == [7, 30, 1000]
    assert probe.test_accuracy == 0.0
    assert probe.accuracy(x, names[y]) == pytest.approx(float((probe.predict(x) == names[y]).float().mean()))
    assert probe.accuracy(x, names[y]) > 0.5


def test_l2_is_chosen_on_training_images_and_refitted_on_all() -> None:
    x, y = encoder_like(500, 30, 5)
    test_x, test_y = x[400:], y[400:]
    x, y = x[:400], y[:400]
    told: list[int] = []
    probe = linear_probe(x, y, test_x, test_y, progress=told.append)
    assert [score.l2 for score in probe.validation] == sorted(L2_VALUES, reverse=True)
    assert told == list(range(1, 47))
    best = max(score.accuracy for score in probe.validation)
    assert probe.l2 == max(score.l2 for score in probe.validation if score.accuracy == best)
    assert best > probe.validation[0].accuracy

    refitted = linear_probe(x, y, l2=probe.l2)
    assert torch.equal(refitted.weight, probe.weight)
    assert probe.test_accuracy == probe.accuracy(test_x, test_y)

    # No test label has a say, and the seed is what draws the validation images.
    shuffled = linear_probe(x, y, test_x, test_y.flip(0))
    assert shuffled.validation == probe.validation
    assert linear_probe(x, y, seed=1).validation != probe.validation


def test_the_published_strengths() -> None:
    assert len(L2_VALUES) == 45
    assert L2_VALUES[0] == pytest.approx(1e-6)
    assert L2_VALUES[-1] == pytest.approx(1e5)
    np.testing.assert_allclose(np.diff(np.log10(L2_VALUES)), 0.25)


def test_validation_takes_the_same_share_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted_on: list[list[int]] = []
    original = LogisticRegression.__init__

    def spy(self: LogisticRegression, features: torch.Tensor, targets: torch.Tensor, num_classes: int) -> None:
        fitted_on.append(torch.bincount(targets, minlength=num_classes).tolist())
        original(self, features, targets, num_classes)

    monkeypatch.setattr(LogisticRegression, "__init__", spy)
    labels = torch.tensor([0] * 50 + [1] * 20 + [2])  # of a single image nothing can be held out
    linear_probe(torch.randn(71, 4, generator=torch.Generator().manual_seed(0)), labels, l2_values=(1.0, 0.1))
    assert fitted_on == [[40, 16, 1], [50, 20, 1]]


def test_stopping_short_is_reported() -> None:
    x, y = encoder_like(403, 37, 5)
    probe = linear_probe(x, y, l2=1e-5, max_iterations=3)
    assert not probe.converged
    assert probe.iterations == 3
    assert probe.warnings == ("the fit stopped short of its optimum after 3 iterations",)
    chosen = linear_probe(x, y, l2_values=(1e-5, 1e5), max_iterations=8)
    assert [score.converged for score in chosen.validation] == [True, False]
    assert chosen.warnings[0].startswith("1 of the 2 fits that chose l2 stopped short")


def test_a_choice_at_the_weak_end_of_the_range_is_reported() -> None:
    x, y = encoder_like(403, 37, 5)
    weakest = linear_probe(x, y, l2_values=(1e3, 1e4, 1.0))
    assert weakest.l2 == 1.0
    assert weakest.warnings == ("the l2 chosen, 1, is the weakest of those tried: a better one may lie below",)
    assert linear_probe(x, y, l2=1.0).warnings == ()
    assert linear_probe(x, y, l2_values=(1.0,)).warnings == ()


X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((X, torch.ones(6, dtype=torch.long)), {}, "all are of class 1; a classifier needs at least two"),
        ((X, Y - 1), {}, "train_labels: 3 of 6 are negative"),
        ((X, Y[:4]), {}, "train_labels: 4 labels for 6 rows"),
        ((X / 0, Y), {}, "train_features: row 0 holds NaN or infinity"),
        ((X, Y, X), {}, "one is given without the other"),
        ((X, Y, X[:, :2], Y), {"l2": 1.0}, "features: 2 an image, but the probe takes 3"),
        ((X, Y, X, Y - 1), {"l2": 1.0}, "labels: 3 of 6 are negative"),
        ((X, Y), {"l2": 0.0}, "l2: 0.0, wanted a finite number above 0"),
        ((X, Y), {"l2_values": (1.0, float("nan"))}, "l2: nan"),
        ((X, Y), {"l2_values": ()}, "l2_values: none given"),
        ((X, Y), {"validation_fraction": 1.0}, "validation_fraction: 1.0"),
        ((X, Y), {"max_iterations": 0}, "max_iterations: 0"),
        ((X, torch.arange(6)), {}, "one image in each class, none left to choose l2 by"),
    ],
)
def test_bad_input_is_named(arguments: tuple[torch.Tensor, ...], settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        linear_probe(*arguments, **settings)  # type: ignore[arg-type]
