"""The error of an encoder against its parameters and against the images it was trained on, and the laws that fit them.

    PYTHONPATH=. python benchmarks/scaling_laws.py small --source /path/to/parquet --folder studies/scaling \\
        --output benchmarks/results/scaling_law

`studies/scaling_small.yaml` and `scaling_full.yaml` say which runs. Each is one `simclr-scale pretrain` in a process of
its own; those that are finished are not trained again, and an interrupted one goes on from its checkpoint, so the study
may be run in pieces (`--minutes 7`). With all runs there, `fit-law` fits each axis and writes `OUTPUT_AXIS.json` and
`OUTPUT_AXIS.png`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

STUDIES = Path(__file__).parent / "studies"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("small", "full"))
    parser.add_argument("--source", type=Path, required=True, help="folder of CIFAR-10 as parquet files")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--output", help="beginning of the names of the results; without it nothing is fitted")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    given = parser.parse_args()
    study = yaml.safe_load((STUDIES / f"scaling_{given.study}.yaml").read_text())
    source = source_of(given.source, given.folder, study["test_images"])
    began = time.monotonic()
    for axis in study["axes"]:
        for name, options in runs_of(study, axis):
            if (given.folder / "runs" / name / "summary.json").is_file():
                continue
            if time.monotonic() - began > 60 * given.minutes:
                print(f"{name} and what follows is left for the next start")
                return 0
            pretrain(given.folder / "runs", name, study["recipe"], {"data.source": f"hfds/{source}", **options})
    for axis in study["axes"] if given.output else ():
        fit(given.folder / "runs", [name for name, _ in runs_of(study, axis)], axis, given.output)
    return 0


def source_of(folder: Path, study: Path, test_images: int | None) -> Path:
    """The data set, or a copy of it with fewer test images: every run reads them four times, for the kNN scores."""
    if test_images is None:
        return folder.resolve()
    import pyarrow.parquet as parquet

    shorter = study.resolve() / "images"
    if not shorter.is_dir():
        draft = study / ".images.partial"
        draft.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*.parquet"):
            table = parquet.read_table(file)
            # In the order of CIFAR-10's test batch, which is a random one.
            parquet.write_table(table[:test_images] if file.name.startswith("test") else table, draft / file.name)
        draft.rename(shorter)
    return shorter


def runs_of(study: Mapping[str, Any], axis: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of each run of one axis."""
    about = study["axes"][axis]
    for value in about["values"]:
        name = f"{axis}-{'-'.join(map(str, value)) if isinstance(value, list) else value}"
        yield name, {**study["options"], **about["options"], about["key"]: value}


def pretrain(runs: Path, name: str, recipe: str, options: Mapping[str, Any]) -> None:
    arguments = [f"--{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in options.items()]
    call("pretrain", "--config", recipe, "--runs_dir", runs, "--name", name, "--resume", "auto", *arguments)


def fit(runs: Path, names: list[str], axis: str, output: str) -> None:
    results = "--output", f"{output}_{axis}.json", "--plot", f"{output}_{axis}.png"
    call("fit-law", *(runs / name for name in names), "--axis", axis, *results)


def call(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "simclr_scale", *map(str, arguments)], check=True)


if __name__ == "__main__":
    sys.exit(main())
