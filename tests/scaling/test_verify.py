"""The checks hold for the package as it is, and fail for each way in which it could be wrong."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from simclr_scale.data.sampler import GlobalBatchSampler
from simclr_scale.distributed import GlobalBatchNorm, world
from simclr_scale.losses import NTXentLoss
from simclr_scale.optim import LARS
from simclr_scale.scaling.verify import Verdict, checks, launching, speed
from simclr_scale.scaling.verify.outcomes import Outcome
from tests.scaling import breakage

CPU = torch.device("cpu")


def small(rank: int, world_size: int) -> Verdict:
    with mock.patch.dict(speed._LARGE, cpu=1000):
        return launching.run_checks(CPU)


def test_everything_holds(gloo) -> None:
    verdicts = gloo(3, small)
    assert all(verdict == verdicts[0] for verdict in verdicts)
    assert verdicts[0].failed == []
    assert (verdicts[0].ranks, verdicts[0].backend) == (3, "gloo")
    assert len(verdicts[0].outcomes) == 9


def broken(rank: int, world_size: int, what: str) -> list[str]:
    """Names of the checks that fail."""
    patches: dict[str, tuple[Any, str, Any]] = {
        "without_gradient": (NTXentLoss, "forward", breakage.without_gradient),
        "local_negatives": (NTXentLoss, "forward", breakage.local_negatives),
        "local_statistics": (GlobalBatchNorm, "forward", breakage.local_statistics),
        "lars": (LARS, "step", breakage.step_of_its_own),
        "same_images": (GlobalBatchSampler, "__iter__", same_images),
        "torch": (torch, "__version__", f"2.{rank}"),
    }
    owner, name, wrong = patches[what]
    with mock.patch.object(owner, name, wrong):
        tried = [launching._tried(name, check) for name, check in checks.correctness(CPU)]
    return [outcome.check for outcome in tried if not outcome.passed]


def same_images(sampler: GlobalBatchSampler) -> Any:
    sampler.rank = 0
    return ITERATE(sampler)


ITERATE = GlobalBatchSampler.__iter__
GRADIENTS = [
    "gradient of the ranks is that of one process (float64)",
    "gradient of the ranks is that of one process (float32)",
]
LARS_ALIKE = "LARS is alike on every rank after 3 steps (float64)"


@pytest.mark.parametrize(
    ("what", "failing"),
    [
        ("without_gradient", [*GRADIENTS, LARS_ALIKE]),
        ("local_negatives", [*GRADIENTS, LARS_ALIKE]),
        ("local_statistics", ["batch norm is over all ranks (float64)", *GRADIENTS, LARS_ALIKE]),
        ("lars", [LARS_ALIKE]),
        ("same_images", ["images are shared out, each once"]),
        ("torch", ["software is the same everywhere"]),
    ],
)
def test_what_is_broken_is_found_on_every_rank(gloo, what: str, failing: list[str]) -> None:
    for found in gloo(2, broken, what):
        assert found == failing


def test_the_gather_without_gradient_has_the_right_loss(gloo) -> None:
    """So that only the gradient can tell."""
    for outcome in gloo(2, gradient_of_broken):
        assert not outcome.passed
        assert float(outcome.detail.rpartition(" ")[2]) < 1e-12


def gradient_of_broken(rank: int, world_size: int) -> Outcome:
    with mock.patch.object(NTXentLoss, "forward", breakage.without_gradient):
        return checks.gradient(CPU)


def wrong_sum(rank: int, world_size: int) -> list[tuple[bool, str]]:
    def nothing(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        dist.barrier()

    outcomes = []
    with mock.patch.dict(speed._LARGE, cpu=1000), mock.patch.object(dist, "all_reduce", nothing):
        for operation in speed.OPERATIONS:
            outcome = speed.measure(operation, CPU)
            outcomes.append((outcome.passed, outcome.detail))
    return outcomes


def test_what_arrives_wrong_is_found(gloo) -> None:
    for outcomes in gloo(2, wrong_sum):
        assert [passed for passed, _ in outcomes] == [False, True, True]
        assert outcomes[0][1].startswith("what arrived is wrong; latency ")


def test_a_verdict_names_the_first_rank_that_fails() -> None:
    good, bad = Outcome("a", True, "fine"), Outcome("a", False, "off by 2")
    verdict = Verdict.of("gloo", ["X", "X"], [[good], [bad]])
    assert verdict.failed == ["a"]
    assert verdict.outcomes[0].detail == "rank 1: off by 2"
    assert verdict.devices == ("X",)
    assert Verdict.of("gloo", ["X"] * 3, [[bad]] * 3).outcomes[0].detail == "rank 0, and on 2 more: off by 2"


def test_a_check_that_breaks_does_not_hold() -> None:
    def check() -> Outcome:
        raise RuntimeError("connection\nreset")

    assert launching._tried("x", check) == Outcome("x", False, "RuntimeError: connection reset")


def test_nobody_launched_this(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert launching.under_a_launcher() is None
    for name in ("RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    environment = launching.under_a_launcher()
    assert environment is not None
    assert environment.world_size() == 4


@pytest.fixture(autouse=True)
def _no_group() -> Any:
    yield
    assert world().size == 1
