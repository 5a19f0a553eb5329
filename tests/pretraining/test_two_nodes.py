"""torchrun on two nodes with addresses of their own, between which the link is cut in mid-run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simclr_scale.pretraining.checkpointing import checkpoints, is_intact
from tests.pretraining.runs import QUIET, arguments
from tests.pretraining.test_preemption import HANGS_AFTER, assert_gone, family
from tests.pretraining.two_nodes import ADDRESSES, Nodes, two_nodes
from tests.pretraining.two_ranks import ERROR, environment

pytestmark = [QUIET, pytest.mark.slow]

TIMEOUT = 20


def start(nodes: Nodes, node: int, images: Path, runs: Path, *options: str) -> "subprocess.Popen[str]":
    meeting = ("--nnodes", "2", "--node_rank", str(node), "--master_addr", ADDRESSES[0], "--master_port", "29511")
    pretrain = arguments(
        images,
        runs,
        "x",
        *("--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp"),
        *("--data.in_memory", "false", "--data.num_workers", "1", "--timeout", str(TIMEOUT), *options),
    )
    launch = ("-m", "torch.distributed.run", *meeting, "--nproc_per_node", "1", "-m", "simclr_scale", "pretrain")
    return subprocess.Popen(
        nodes.on(node, sys.executable, *launch, *pretrain),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), "GLOO_SOCKET_IFNAME": nodes.devices[node]},
    )


def ends(process: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    """Exit status and the lines of simclr-scale."""
    _, errors = process.communicate(timeout=HANGS_AFTER)
    return process.returncode, [line for line in errors.splitlines() if line.startswith(ERROR)]


def test_the_link_is_cut(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x" / "checkpoints"
    with two_nodes() as nodes:
        endless = ("--trainer.max_epochs", "100000", "--knn.every_n_epochs", "100000")
        both = [start(nodes, node, images, tmp_path, *endless) for node in (0, 1)]
        everybody: list[int] = []
        try:
            deadline = time.monotonic() + HANGS_AFTER
            while not (folder / "step=5.ckpt").exists() and not checkpoints(folder):
                assert [process.poll() for process in both] == [None, None]
                assert time.monotonic() < deadline, "the run does not begin"
                time.sleep(0.05)
            everybody = [pid for process in both for pid in family(process.pid)]
            began = time.monotonic()
            nodes.cut()
            outcomes = [ends(process) for process in both]
            # The limit itself, and what the launchers add to it.
            assert time.monotonic() - began < 2 * TIMEOUT
            assert_gone(everybody)
        finally:
            for pid in {*everybody, *(process.pid for process in both)}:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)
        for node, (status, lines) in enumerate(outcomes):
            assert status == 1
            [line] = lines
            other = 1 - node
            assert re.match(
                rf"{ERROR}rank {other} of 2 \(node{other}, process \d+\) has been silent for \d+ s.*: it is stopped, "
                rf"its machine is down or the network is; its last word was of step \d+ \(.+\); --resume auto --name x",
                line,
            )
        newest = checkpoints(folder)[0]
        assert is_intact(newest)

        nodes.mend()
        epochs = int(newest.stem.removeprefix("step=")) // 5 + 2
        options = ("--resume", "auto", "--override", "true", "--trainer.max_epochs", str(epochs))
        both = [start(nodes, node, images, tmp_path, *options) for node in (0, 1)]
        assert [ends(process) for process in both] == [(0, []), (0, [])]
        assert checkpoints(folder)[0].name == f"step={5 * epochs}.ckpt"
