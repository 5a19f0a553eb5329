"""Several labels an image: each class against scikit-learn's binary logistic regression."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression as ScikitLogisticRegression

from simclr_scale.errors import InputError
from simclr_scale.evaluation import linear_probe, mean_auc, multilabel_probe, voc2007_map
from simclr_scale.evaluation.logistic import BinaryRegressions
from simclr_scale.evaluation.strength import L2_VALUES
from tests.evaluation.test_linear import encoder_like


def several_labels(n: int, features: int, classes: int, unsaid: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    x, hidden = encoder_like(n, features, 6)
    rng = np.random.default_rng(n)
    chance = 0.15 + 0.7 * (rng.random((6, classes)) < 0.3)
    targets = (rng.random((n, classes)) < chance[hidden.numpy()]).astype(int)
    targets[rng.random(targets.shape) < unsaid] = -1
    return x, torch.from_numpy(targets)


def loss_of_class(w: np.ndarray, b: float, x: np.ndarray, y: np.ndarray, l2: float) -> float:
    z = x @ w + b
    return float(np.mean(np.logaddexp(0, z) - y * z) + l2 / 2 * w @ w)


@pytest.mark.parametrize("l2", [1e5, 1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(("n", "features", "classes"), [(403, 37, 5), (97, 120, 3)])
def test_every_class_is_at_the_optimum_of_scikit_learn(n: int, features: int, classes: int, l2: float) -> None:
    x, targets = several_labels(n, features, classes)
    probe = multilabel_probe(x, targets, l2=l2)
    assert probe.converged
    total = 0.0
    for column in range(classes):
        said = targets[:, column] >= 0
        rows, truth = x[said].double().numpy(), targets[said, column].numpy()
        oracle = ScikitLogisticRegression(C=1 / (len(truth) * l2), solver="newton-cholesky", tol=1e-9, max_iter=1000)
        oracle.fit(rows, truth)
        best = loss_of_class(oracle.coef_[0], oracle.intercept_[0], rows, truth, l2)
        reached = loss_of_class(probe.weight[column].numpy(), float(probe.bias[column]), rows, truth, l2)
        assert abs(reached - best) < 1e-4
        total += reached
    assert probe.train_loss == pytest.approx(total, abs=1e-9)


def test_the_whole_warm_started_path_lies_at_the_optima_of_scikit_learn() -> None:
    x, targets = several_labels(203, 24, 2)
    problem, fit = BinaryRegressions(x.double(), targets), None
    for l2 in sorted(L2_VALUES, reverse=True):
        fit = problem.fit(l2, start=fit)
        assert fit.converged
        for column in range(2):
            said = targets[:, column] >= 0
            rows, truth = x[said].double().numpy(), targets[said, column].numpy()
            oracle = ScikitLogisticRegression(C=1 / (len(truth) * l2), solver="newton-cholesky", tol=1e-9)
            oracle.set_params(max_iter=1000).fit(rows, truth)
            best = loss_of_class(oracle.coef_[0], oracle.intercept_[0], rows, truth, l2)
            reached = loss_of_class(fit.weight[column].numpy(), float(fit.bias[column]), rows, truth, l2)
            assert abs(reached - best) < 1e-4, l2


def test_the_gradient_is_that_of_autograd() -> None:
    x, targets = several_labels(31, 7, 3)
    problem = BinaryRegressions(x.double(), targets)
    parameters = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    penalty = torch.full((8,), 0.3, dtype=torch.float64)
    _, gradient = problem._objective(parameters.detach(), penalty)
    logits = problem._coordinates_nE @ parameters.T
    said = targets >= 0
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, (targets == 1).double(), reduction="none", weight=said.double()
    )
    ((losses.sum(0) / said.sum(0)).sum() + (penalty * parameters.square()).sum() / 2).backward()
    torch.testing.assert_close(gradient, parameters.grad, rtol=0, atol=1e-12)


def test_images_of_which_nothing_is_said_do_not_matter() -> None:
    x, targets = several_labels(150, 12, 2, unsaid=0)
    more = torch.cat([x, 50 + 0 * x[:9]])
    told = torch.cat([targets, torch.full((9, 2), -1)])
    a, b = multilabel_probe(x, targets, l2=1e-2), multilabel_probe(more, told, l2=1e-2)
    torch.testing.assert_close(a.weight, b.weight, atol=2e-3, rtol=0)
    assert a.train_loss == pytest.approx(b.train_loss, abs=1e-6)


@pytest.mark.parametrize(("metric", "function"), [("voc2007_map", voc2007_map), ("mean_auc", mean_auc)])
def test_l2_is_chosen_by_the_metric_on_the_validation_rows_and_refitted_on_all(metric: str, function: object) -> None:
    x, targets = several_labels(300, 30, 4)
    rows = np.arange(200, 300)
    told: list[int] = []
    probe = multilabel_probe(x, targets, validation_rows=rows, metric=metric, progress=told.append)
    assert told == list(range(1, 47))
    assert [score.l2 for score in probe.validation] == sorted(L2_VALUES, reverse=True)
    for score in probe.validation[::9]:
        alone = multilabel_probe(x[:200], targets[:200], l2=score.l2)
        assert function(alone.logits(x[200:]), targets[200:]) == pytest.approx(score.accuracy, abs=5e-3)  # type: ignore[operator]
    best = max(score.accuracy for score in probe.validation)
    assert probe.l2 == max(score.l2 for score in probe.validation if score.accuracy == best)
    assert torch.equal(multilabel_probe(x, targets, l2=probe.l2).weight, probe.weight)


def test_a_drawn_share_is_chosen_on_where_no_rows_are_given() -> None:
    x, targets = several_labels(200, 10, 3)
    first, again, other = (multilabel_probe(x, targets, seed=seed) for seed in (0, 0, 1))
    assert first.validation == again.validation
    assert first.validation != other.validation


def test_of_one_label_the_choice_goes_by_the_metric_on_the_rows_given() -> None:
    x, y = encoder_like(300, 30, 5)
    rows = np.arange(0, 300, 3)
    kept = np.setdiff1d(np.arange(300), rows)
    probe = linear_probe(x, y, metric="mean_auc", validation_rows=rows)
    for score in probe.validation[::11]:
        alone = linear_probe(x[kept], y[kept], l2=score.l2)
        probabilities = alone.logits(x[rows]).softmax(dim=1)
        assert mean_auc(probabilities, y[rows]) == pytest.approx(score.accuracy, abs=2e-3)
    assert probe.l2 == max(probe.validation, key=lambda score: (score.accuracy, score.l2)).l2
    by_top1 = linear_probe(x, y, validation_rows=rows)
    assert [s.accuracy for s in by_top1.validation] != [s.accuracy for s in probe.validation]
    assert torch.equal(linear_probe(x, y, l2=probe.l2).weight, probe.weight)


def test_scores_of_nearly_certain_images_stay_apart() -> None:
    x, y = encoder_like(120, 10, 3)
    probe = linear_probe(1000 * x, y, l2=1e-6)
    answers = probe.answers(1000 * x, "mean_auc", 5)
    assert answers.shape == (120, 5)
    assert (answers[:, 3:] < answers[:, :3].min()).all()
    assert len(answers[:, 0].unique()) > len(answers[:, :3].softmax(dim=1).float()[:, 0].unique())
    assert torch.equal(probe.answers(1000 * x, "top1", 5), probe.predict(1000 * x))


@pytest.mark.parametrize(
    ("targets", "settings", "message"),
    [
        (torch.zeros(9, dtype=torch.long), {}, r"train_targets: torch.int64 \(9,\), wanted integers \(9, C\)"),
        (torch.zeros(9, 2), {}, "wanted integers"),
        (torch.full((9, 2), 3), {}, "wanted 1, 0 or -1"),
        (torch.full((9, 2), -1), {}, "class 0 is said of none of the training images"),
        (torch.zeros(9, 2, dtype=torch.long), {"metric": "top1"}, "top1 takes one label an image"),
        (torch.zeros(9, 2, dtype=torch.long), {"metric": "f1"}, "there is no 'f1'"),
        (torch.zeros(9, 2, dtype=torch.long), {"validation_rows": np.arange(9)}, "validation_rows: 9 of 9"),
        (torch.zeros(9, 2, dtype=torch.long), {"l2": -1.0}, "l2: -1.0"),
    ],
)
def test_bad_input_is_named(targets: torch.Tensor, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        multilabel_probe(torch.randn(9, 4), targets, **settings)  # type: ignore[arg-type]
