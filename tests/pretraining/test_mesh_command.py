"""The command on meshes of processes that it starts: training, resuming elsewhere, and what is read afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simclr_scale import load_encoder
from simclr_scale.bundle import load_head
from tests.cli.commands import CHECKOUT
from tests.pretraining.runs import QUIET, arguments, pretrain

pytestmark = [pytest.mark.slow, QUIET]

VIT = [
    *("--model.encoder.name", "test_vit", "--model.encoder.img_size", "16", "--model.encoder.patch_size", "8"),
    # A bias before a batch norm has no gradient but rounding, which Adam without such an eps would make steps of.
    *("--model.optimizer", "AdamW", "--model.optimizer.eps", "1e-2", "--model.learning_rate", "0.03"),
    *("--trainer.max_epochs", "2", "--knn.every_n_epochs", "1", "--checkpoint.every_n_steps", "3"),
    *("--checkpoint.keep", "9", "--data.num_workers", "0", "--threads", "1"),
]
TWO_BY_TWO = ["--trainer.devices", "4", "--trainer.strategy", "MeshStrategy"]
TWO_BY_TWO += ["--trainer.strategy.tensor_parallel_size", "2"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "model_parallel"]


def start(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False, env=environment, timeout=400
    )


def vit(images: Path, runs: Path, name: str, *options: str) -> list[str]:
    given = arguments(images, runs, name, *VIT, *options)
    channels = given.index("--model.encoder.channels")
    return given[:channels] + given[channels + 2 :]


def assert_same_encoder(one: Path, other: Path, tolerance: float) -> None:
    for load in (lambda run: load_encoder(run)[0], load_head):
        expected, found = load(one).state_dict(), load(other).state_dict()
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance, msg=key)


def test_a_mesh_trains_resumes_elsewhere_and_is_evaluated(images: Path, tmp_path: Path) -> None:
    pretrain(vit(images, tmp_path, "one"))
    done = start("simclr_scale", "pretrain", *vit(images, tmp_path, "mesh", *TWO_BY_TWO))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("What to try next") == 1, "rank 0 speaks for all"
    one, mesh = tmp_path / "one", tmp_path / "mesh"
    assert_same_encoder(one, mesh, 1e-5)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, mesh)]
    assert summaries[0]["knn_top1"] == summaries[1]["knn_top1"]
    assert summaries[1]["devices"] == 4

    shards = mesh / "checkpoints" / "step=10.ckpt"
    assert {file.name for file in shards.iterdir()} >= {".metadata", "meta.pt", "__3_0.distcp"}
    assert (mesh / "checkpoints" / "last.ckpt").readlink() == Path(shards.name)
    assert_same_encoder(one, shards, 1e-5)

    # In the middle of an epoch, on another mesh.
    middle = str(mesh / "checkpoints" / "step=3.ckpt")
    again = start("simclr_scale", "pretrain", *vit(images, tmp_path, "mesh", *TWO, "--resume", middle))
    assert again.returncode == 0, again.stderr
    assert_same_encoder(one, mesh, 1e-5)

    # A damaged shard is seen, and the checkpoint before it taken.
    [shard] = shards.glob("__0_0.distcp")
    shard.write_bytes(shard.read_bytes()[:-1])
    third = start("simclr_scale", "pretrain", *vit(images, tmp_path, "mesh", *TWO, "--resume", "auto"))
    assert third.returncode == 0, third.stderr
    assert f"{shards} is damaged" in third.stdout
    assert_same_encoder(one, mesh, 1e-5)

    alone = start(
        "simclr_scale", "pretrain", *vit(images, tmp_path, "mesh", "--resume", "auto", "--trainer.strategy", "auto")
    )
    assert alone.returncode == 2
    assert "is a folder of shards: resume it with --trainer.strategy model_parallel" in alone.stderr

    source = ("--data.source", str(images), "--k", "5")
    last = str(mesh / "checkpoints" / "last.ckpt")
    for spec in (last, str(mesh)):
        output = tmp_path / f"{Path(spec).name}.json"
        result = start("simclr_scale", "knn", "--encoder", spec, *source, "--output", str(output))
        assert result.returncode == 0, result.stderr
    values = [json.loads((tmp_path / name).read_text())["value"] for name in ("last.ckpt.json", "mesh.json")]
    assert values[0] == values[1]
    exported = start(
        "simclr_scale", "export", "--encoder", last, "--format", "timm", "--output", str(tmp_path / "exported")
    )
    assert exported.returncode == 0, exported.stderr


@pytest.mark.parametrize("strategy", ["ddp", "ddp_bf16", "model_parallel"])
def test_only_the_first_rank_speaks(images: Path, tmp_path: Path, strategy: str) -> None:
    logs = tmp_path / "logs"
    options = ("--trainer.max_epochs", "1", "--trainer.devices", "2", "--trainer.strategy", strategy)
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--log-dir", str(logs))
    redirected = (*launcher, "--redirects", "3", "-m", "simclr_scale")
    done = start(*redirected, "pretrain", *arguments(images, tmp_path / "runs", "x", *options))
    assert done.returncode == 0, done.stderr
    said = {f"{path.parent.name}/{path.name}": path.read_text() for path in logs.rglob("std*.log")}
    assert said.keys() == {f"{rank}/{stream}.log" for rank in (0, 1) for stream in ("stdout", "stderr")}
    assert "What to try next" in said.pop("0/stdout.log")
    assert set(said.values()) == {""}
    scaling = json.loads((tmp_path / "runs" / "x" / "summary.json").read_text())["scaling"]
    assert scaling["devices"] == 2
    if strategy == "model_parallel":
        assert scaling["sent_bytes_by_part"] is None
    else:
        numbers = sum(
            p.numel()
            for load in (lambda run: load_encoder(run)[0], load_head)
            for p in load(tmp_path / "runs" / "x").parameters()
        )
        assert scaling["sent_bytes_by_part"]["gradients"] == numbers * (2 if strategy == "ddp_bf16" else 4)
