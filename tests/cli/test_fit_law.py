"""The command fit-law."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from simclr_scale import save_encoder
from simclr_scale.bundle import ImageTransform
from simclr_scale.models import create_encoder
from tests.cli.commands import Outcome, TrainedRun

Command = Callable[..., Outcome]

CHANNELS = (2, 3, 4, 6, 8)
TABLE = "# stated\nname,params,accuracy\n" + "".join(f"n{n},{n},{1 - 0.1 - n**-0.5}\n" for n in (10, 20, 40, 80, 160))
LOSSES = "params,loss,global_batch_size,temperature\n" + "".join(
    f"{n},{4 + 9 / n},{256 if n < 160 else 512},0.1\n" for n in (10, 20, 40, 80, 160)
)


@pytest.fixture(scope="module")
def widths(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for each of five widths, with errors .2 + 100 / sqrt(channels) of a thousand, beside the trained one."""
    folder = tmp_path_factory.mktemp("widths")
    for channels in CHANNELS:
        run = folder / f"w{channels}"
        shutil.copytree(trained.folder, run, symlinks=True, ignore=shutil.ignore_patterns("encoder", "checkpoints"))
        save_encoder(
            create_encoder("simclr_resnet_tiny", channels=[channels] * 3), ImageTransform((3, 32, 32)), run / "encoder"
        )
        _change(run, lambda summary, c=channels: summary["knn_top1"].update(trained=1 - 0.2 - 0.4 / c**0.5))
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["model"]["encoder"]["init_args"]["channels"] = [channels] * 3
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def _change(run: Path, change: Callable[[dict], object]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    change(summary)
    (run / "summary.json").write_text(json.dumps(summary))


def _params(channels: int) -> int:
    return sum(p.numel() for p in create_encoder("simclr_resnet_tiny", channels=[channels] * 3).parameters())


def test_runs_of_several_widths(widths: Path, command: Command, tmp_path: Path) -> None:
    runs = [widths / f"w{channels}" for channels in CHANNELS]
    files = "--output", tmp_path / "law.json", "--plot", tmp_path / "law.png", "--predict", "1e5,1e6"
    outcome = command("fit-law", *runs, "--axis", "params", "--resamples", 50, *files)
    assert (outcome.status, outcome.err) == (0, "")
    assert "power: E + A x^-alpha" in outcome.out
    assert "without the 1 largest the law foresees" in outcome.out
    report = json.loads((tmp_path / "law.json").read_text())
    assert [point["x"] for point in report["points"]] == [_params(channels) for channels in CHANNELS]
    assert [point["y"] for point in report["points"]] == pytest.approx([0.2 + 0.4 / c**0.5 for c in CHANNELS])
    # Parameters go nearly as channels squared, so that 1 / sqrt(channels) is nearly a fourth root.
    assert report["parameters"]["alpha"]["value"] == pytest.approx(0.25, abs=0.08)
    assert report["predictions"][1]["low"] <= report["predictions"][1]["value"] <= report["predictions"][1]["high"]
    assert report["notes"] == []
    assert (tmp_path / "law.png").stat().st_size > 10_000


def test_compute_is_counted(widths: Path, command: Command, tmp_path: Path) -> None:
    runs = [widths / f"w{channels}" for channels in CHANNELS]
    command("fit-law", *runs, "--axis", "compute", "--resamples", 20, "--output", tmp_path / "law.json")
    summary = json.loads((runs[0] / "summary.json").read_text())
    first = json.loads((tmp_path / "law.json").read_text())["points"][0]["x"]
    # Stem of stride 2, then three blocks of two 3x3 convolutions each at 16, 8 and 4 px, and two shortcuts.
    c, pixels = CHANNELS[0], (256, 64, 16)
    convolutions = 2 * pixels[0] * 9 * (3 * c + 2 * c * c) + 2 * (pixels[1] + pixels[2]) * (18 + 1) * c * c
    seen = summary["steps"] * summary["global_batch_size"]
    assert first == pytest.approx(3 * 2 * seen * convolutions, rel=1e-6)


def test_runs_that_are_on_no_curve(widths: Path, command: Command, tmp_path: Path) -> None:
    runs = []
    for channels in CHANNELS:
        shutil.copytree(widths / f"w{channels}", tmp_path / f"w{channels}", symlinks=True)
        runs.append(tmp_path / f"w{channels}")

    def refused(*more: object) -> str:
        outcome = command("fit-law", *runs, "--axis", "params", *more)
        assert (outcome.status, outcome.err.count("\n")) == (2, 1), outcome
        return outcome.err

    _change(runs[1], lambda summary: summary.update(global_batch_size=summary["global_batch_size"] * 2, steps=3))
    assert command("fit-law", *runs, "--axis", "params", "--resamples", 20).status == 0
    line = refused("--measure", "loss")
    assert "w2 and w3 differ in global_batch_size (16, 32)" in line
    assert "a contrastive loss grows with the logarithm of its negatives" in line
    _change(runs[1], lambda summary: summary["knn"].update(k=20))
    assert "w2 and w3 differ in knn.k (200, 20): errors that are measured differently are on no curve" in refused()
    _change(runs[1], lambda summary: summary["knn"].update(k=200))
    _change(runs[1], lambda summary: summary.update(steps=7))
    assert "differ in images seen (96, 224): only the size on the axis may vary" in refused()
    _change(runs[1], lambda summary: summary.pop("knn_top1"))
    assert f"{runs[1]} has no kNN score: its images have no labels" in refused()
    (runs[1] / "summary.json").unlink()
    assert f"{runs[1]} has no summary.json: it is no run, or one that has not ended" in refused()
    assert "--measure linear takes the manifest that lies in the run, and there is none" in refused(
        "--measure", "linear"
    ) or "has no summary.json" in refused("--measure", "linear")


def test_losses_at_fixed_negatives(widths: Path, command: Command) -> None:
    runs = [widths / f"w{channels}" for channels in CHANNELS]
    outcome = command("fit-law", *runs, "--axis", "params", "--measure", "loss", "--resamples", 20)
    # All five are copies of one training, so that there is a law of no slope.
    assert outcome.status == 0
    assert "hardly any law is told from another" in outcome.out


def test_manifests_of_linear(widths: Path, command: Command, tmp_path: Path) -> None:
    manifest = {
        "task": "linear",
        "metric": "top1",
        "test": {"fingerprint": "f"},
        "label_selection": "all",
        "settings": {"method": "lbfgs"},
    }
    files = []
    for channels in CHANNELS:
        files.append(tmp_path / f"{channels}.json")
        content = {"encoder": {"spec": str(widths / f"w{channels}")}, "value": {"mean": 0.9 - 0.4 / channels}}
        files[-1].write_text(json.dumps(manifest | content))
    options = "--axis", "params", "--measure", "linear", "--resamples", 20
    assert command("fit-law", *files, *options, "--output", tmp_path / "law.json").status == 0
    report = json.loads((tmp_path / "law.json").read_text())
    assert [point["y"] for point in report["points"]] == pytest.approx([0.1 + 0.4 / c for c in CHANNELS])
    files[0].write_text(files[0].read_text().replace('"all"', '"5-shot"'))
    assert "differ in label selection" in command("fit-law", *files, *options).err


def test_a_table_of_points(command: Command, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TABLE)
    outcome = command("fit-law", tmp_path / "t.csv", "--axis", "params", "--output", tmp_path / "law.json")
    assert outcome.status == 0
    found = json.loads((tmp_path / "law.json").read_text())["parameters"]
    assert [found[name]["value"] for name in ("E", "A", "alpha")] == pytest.approx([0.1, 1, 0.5], rel=1e-3)


MISTAKES = [
    ("", "the following arguments are required: runs, axis"),
    ("t.csv", "the following arguments are required: axis"),
    ("nowhere --axis params", "there is no run, manifest or table 'nowhere'"),
    ("empty --axis params", "empty has no summary.json: it is no run, or one that has not ended"),
    ("t.csv --axis size", "axis: expected one of 'params', 'data', 'compute'; got size"),
    ("t.csv --axis data", "t.csv: it has no column 'data', the sizes of --axis data"),
    ("few.csv --axis params", "a scaling law needs points of at least 5 sizes, got 3"),
    ("none.csv --axis params", "none.csv: it has no column 'params'"),
    ("t.csv --axis params --form m5", "form: expected one of 'power', 'm4', 'bnsl'; got m5"),
    ("t.csv --axis params --form bnsl", "form bnsl has 6 unknowns, so it needs points of 7 sizes, got 5"),
    ("t.csv --axis params --measure loss", "t.csv: --measure loss needs a column loss; it has accuracy"),
    ("loss.csv --axis params", "--measure knn needs a column error or accuracy, one of them (a loss needs --measure"),
    ("loss.csv --axis params --measure loss", "differ in global_batch_size (256.0, 512.0): a contrastive loss grows"),
    ("bad.csv --axis params", "bad.csv: there is no column 'parms'; did you mean params?"),
    ("percent.csv --axis params", "percent.csv, point 1: accuracy 76, wanted below 1, such as 0.76 for 76%"),
    ("t.csv --axis params --predict big", "--predict big: wanted sizes above 0, such as 1e6,1e7"),
    ("t.csv --axis params --level 95", "level: 95.0, wanted between 0 and 1"),
    ("t.csv --axis params --output t.csv", "t.csv exists already"),
    ("t.csv --axis params --plot law.doc", "--plot law.doc: the name of a picture ends in .png"),
    ("old.json --axis params", "old.json: it is no manifest of an evaluation"),
]


@pytest.mark.parametrize(("options", "line"), MISTAKES)
def test_mistakes(options: str, line: str, refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text(TABLE)
    (tmp_path / "few.csv").write_text("\n".join(TABLE.splitlines()[:5]))
    (tmp_path / "none.csv").write_text("# nothing\n")
    (tmp_path / "loss.csv").write_text(LOSSES)
    (tmp_path / "bad.csv").write_text("parms,error\n1,0.5\n")
    (tmp_path / "percent.csv").write_text("params,accuracy\n1,76\n")
    (tmp_path / "old.json").write_text("{}")
    assert line in refusal("fit-law", *options.split())
