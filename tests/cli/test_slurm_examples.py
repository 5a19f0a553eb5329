"""The example scripts for SLURM, with stand-ins for its commands that start the processes of a job on this machine."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from simclr_scale import load_encoder
from simclr_scale.evaluation import encoder_fingerprint
from tests.cli.commands import CHECKOUT, files_below

EXAMPLES = CHECKOUT / "examples"

# As srun does: every task is told which it is; its own options end at the first word that is none.
SRUN = """#!/bin/bash
tasks=$SLURM_NTASKS
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#--ntasks=}
    shift
done
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SHORT = (
    *("--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.log_every_n_steps=1"),
    *("--data.global_batch_size=16", "--knn.max_train_images=200", "--checkpoint.every_n_epochs=1"),
    *("--trainer.accelerator=cpu", "--trainer.precision=32-true"),
)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job of two tasks on one node, and its commands."""
    commands = {
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho 127.0.0.1\n",
        "simclr-scale": f'#!/bin/bash\nexec {sys.executable} -m simclr_scale "$@"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    of_the_job = {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "simclr",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_ARRAY_TASK_ID": "1",
    }
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **of_the_job, "PATH": path, "PYTHONPATH": str(CHECKOUT)}


def run(*command: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_a_job_of_two_tasks_is_one_run_and_continues_itself(job: dict[str, str], tmp_path: Path) -> None:
    script = ("bash", EXAMPLES / "slurm" / "pretrain.sbatch", "quickstart", "textures", *SHORT)
    first = run(*script, cwd=tmp_path, env=job)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs" / "quickstart-seed1"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["scaling"]["devices"] == 2
    assert (first.stdout + first.stderr).count("kNN accuracy on") == 1

    # The same two processes, started by Lightning.
    local = {key: value for key, value in job.items() if not key.startswith("SLURM")}
    options = ("--seed_everything", 1, "--trainer.devices", 2, "--trainer.strategy", "ddp", *SHORT)
    alone = run(
        *(
            "simclr-scale",
            "pretrain",
            "--config",
            "quickstart",
            "--data.source",
            "textures",
            "--name",
            "local",
            *options,
        ),
        cwd=tmp_path,
        env=local,
    )
    assert alone.returncode == 0, alone.stderr
    encoders = [load_encoder(tmp_path / "runs" / name)[0] for name in (folder.name, "local")]
    assert encoder_fingerprint(encoders[0]) == encoder_fingerprint(encoders[1])

    before = files_below(folder / "checkpoints")
    again = run(*script, cwd=tmp_path, env=job)
    assert again.returncode == 0, again.stderr
    assert files_below(folder / "checkpoints") == before
    once_more = json.loads((folder / "summary.json").read_text())
    assert {**once_more, "seconds": 0} == {**summary, "seconds": 0}


def test_staging_copies_what_is_missing_and_says_where_it_is(job: dict[str, str], tmp_path: Path) -> None:
    packed = tmp_path / "shared" / "packed"
    (packed / "train").mkdir(parents=True)
    (packed / "train" / "0.tar").write_bytes(b"zero")
    (packed / "index with a space.json").write_bytes(b"{}")
    target = tmp_path / "node" / "packed"
    (target / "train").mkdir(parents=True)
    (target / "train" / "0.tar.part").write_bytes(b"ze")
    one = {**job, "SLURM_NTASKS": "1"}
    stage = ("bash", EXAMPLES / "slurm" / "stage.sh", packed, tmp_path / "node")
    done = run(*stage, cwd=tmp_path, env=one)
    assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == {
        "train/0.tar",
        "index with a space.json",
    }
    assert (target / "train" / "0.tar").read_bytes() == b"zero"
    stamp = (target / "train" / "0.tar").stat().st_mtime_ns
    assert (
        run("bash", EXAMPLES / "slurm" / "stage.sh", packed, tmp_path / "node", cwd=tmp_path, env=one).returncode == 0
    )
    assert (target / "train" / "0.tar").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "script", ["slurm/pretrain.sbatch", "slurm/juwels_booster.sbatch", "slurm/stage.sh", "nccl.sh"]
)
def test_the_scripts_are_bash(script: str) -> None:
    checked = subprocess.run(["bash", "-n", str(EXAMPLES / script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_what_a_script_lacks_is_said(job: dict[str, str], tmp_path: Path) -> None:
    missing = run("bash", EXAMPLES / "slurm" / "pretrain.sbatch", "quickstart", cwd=tmp_path, env=job)
    assert missing.returncode != 0
    assert "data.source" in missing.stderr
