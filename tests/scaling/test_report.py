"""Comparisons of runs: the published table's own columns, efficiencies by hand, and tables that are wrong."""

import json
import re
from pathlib import Path

import pytest

from simclr_scale.errors import InputError
from simclr_scale.scaling.plots import draw
from simclr_scale.scaling.report import ScalingReport, find_series
from simclr_scale.scaling.runs import RunSpeed, all_runs, read_runs

# images/s and images/s a device that the table's stated batch, time a step and devices come to
DERIVED = [
    (32125, 125.5),
    (96094, 46.9),
    (128502, 125.5),
    (97815, 47.8),
    (297891, 145),
    (885622, 865),
    (970105, 281),
    (1638400, 800),
]


def test_the_eight_large_batch_runs_give_their_derived_columns() -> None:
    runs = read_runs("imagenet_large_batch")
    assert len(runs) == 8
    for run, (total, per_device) in zip(runs, DERIVED, strict=True):
        assert run.images_per_second == pytest.approx(total, rel=0.02)
        assert run.images_per_second_per_device == pytest.approx(per_device, rel=0.02)
        assert run.stated_minutes is not None
        assert run.seconds == pytest.approx(60 * run.stated_minutes, rel=0.02)
    # "1 hr" and "1.2 min", written out once more
    assert runs[0].seconds == pytest.approx(3600, rel=0.02)
    assert runs[-1].seconds == pytest.approx(72, rel=0.02)
    assert runs[0].epochs == pytest.approx(90, rel=0.01)
    assert runs[3].epochs == pytest.approx(64, rel=0.01)


def test_eight_gpu_months_on_1024_gpus_are_5625_hours(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("runs:\n- {name: slide, devices: 1024, device_months: 8}\n")
    [run] = read_runs(str(tmp_path / "t.yaml"))
    assert run.seconds == 5.625 * 3600
    assert run.images_per_second is None


def run(name: str, devices: int, batch: int, seconds: float, **more: object) -> RunSpeed:
    return RunSpeed(name, devices, batch, seconds, **more)  # type: ignore[arg-type]


STRONG = [run("a", 2, 64, 0.8), run("b", 4, 64, 0.5), run("c", 8, 64, 0.25)]
WEAK = [run("b", 4, 64, 0.5), run("d", 8, 128, 0.625)]


def test_efficiencies_by_hand() -> None:
    runs = [*STRONG, WEAK[1]]
    strong, weak = find_series(runs)
    assert (strong.kind, strong.batch, [r.name for r in strong.runs]) == ("strong", 64, ["a", "b", "c"])
    # Twice the devices at .8 / .5 = 1.6 times the speed; four times at 3.2 times.
    assert strong.efficiency == pytest.approx((1, 0.8, 0.8))
    assert (weak.kind, weak.batch, [r.name for r in weak.runs]) == ("weak", 16, ["b", "d"])
    assert weak.efficiency == pytest.approx((1, 0.8))
    assert [s.kind for s in find_series(runs, "weak")] == ["weak"]
    report = ScalingReport(tuple(runs), (strong, weak), 10)
    assert report.efficiency(runs[3], "weak") == pytest.approx(0.8)
    assert report.efficiency(runs[3], "strong") is None


def test_only_alike_runs_are_compared() -> None:
    runs = [run("a", 1, 64, 1.0, hardware="A"), run("b", 2, 64, 0.5, hardware="B")]
    assert find_series(runs) == []
    with pytest.raises(InputError, match="--mode strong needs two runs of one global batch"):
        find_series(runs, "strong")
    assert find_series([run("a", 2, 64, 1.0), run("b", 2, 64, 0.9)]) == []


def test_several_runs_of_the_fewest_devices_are_averaged() -> None:
    [series] = find_series([run("a", 1, 10, 1.0), run("a2", 1, 10, 0.5), run("b", 2, 10, 0.5)])
    assert series.efficiency == pytest.approx((10 / 15, 20 / 15, 10 / 15))


def test_whole_batches_of_an_epoch_count() -> None:
    assert run("a", 1, 30, 2.0, train_images=100).seconds_of_epochs(5) == 5 * 3 * 2.0
    assert run("a", 1, 30, 2.0).seconds_of_epochs(5) is None
    assert run("a", 1, 30, 2.0, mean_seconds_per_step=3.0).images_per_second == 10


def test_a_table_reads_alike_from_csv_json_and_yaml(tmp_path: Path) -> None:
    rows = [{"name": "a", "devices": 2, "batch": 64, "seconds_per_step": 0.5, "hardware": "X"}]
    (tmp_path / "t.csv").write_text("# mine\nname,devices,batch,seconds_per_step,hardware,steps\na,2,64,0.5,X,\n")
    (tmp_path / "t.json").write_text(json.dumps({"runs": rows}))
    (tmp_path / "t.yaml").write_text(json.dumps(rows))
    tables = [read_runs(str(tmp_path / name)) for name in ("t.csv", "t.json", "t.yaml")]
    assert tables[0] == tables[1] == tables[2] == [run("a", 2, 64, 0.5, hardware="X")]
    names = [r.name for r in all_runs([str(tmp_path / "t.csv"), str(tmp_path / "t.json")])]
    assert names == ["a", "a (2)"]


MISTAKES = [
    ("t.csv", "name,devices\na,1\n", "run 1: give batch and seconds_per_step, or device_months"),
    ("t.csv", "name,device,batch,seconds_per_step\na,1,2,3\n", "there is no column 'device'; did you mean devices?"),
    ("t.csv", "devices,batch,seconds_per_step\n1,2,3\n", "run 1: it has no name"),
    ("t.csv", "name,devices,batch,seconds_per_step\na,1.5,2,3\n", "devices must be a whole number"),
    ("t.csv", "name,devices,batch,seconds_per_step\na,1,2,fast\n", "seconds_per_step must be a number"),
    ("t.csv", "name,devices,batch,seconds_per_step\na,1,2,0\n", "seconds_per_step must be above 0"),
    ("t.csv", "name,devices,batch,seconds_per_step\na,0,2,1\n", "devices must be above 0"),
    ("t.csv", "", "a table is a list of runs"),
    ("t.json", "[1]", "run 1: a run is written as names and values, got 1"),
    ("t.json", "{", "cannot be read as .json"),
    ("t.yaml", "a: [", "cannot be read as .yaml"),
    ("summary.json", "{}", "has no entry 'scaling'"),
]


@pytest.mark.parametrize(("name", "text", "message"), MISTAKES)
def test_a_wrong_table(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        read_runs(str(tmp_path / name))


def test_neither_run_nor_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no summary\.json: it is no run, or one that has not ended"):
        read_runs(str(tmp_path))
    with pytest.raises(InputError, match=r"did you mean imagenet_large_batch\?"):
        read_runs("imagenet_larg_batch")


@pytest.mark.parametrize("runs", [[*STRONG, WEAK[1]], read_runs("imagenet_large_batch"), [STRONG[0]]])
def test_the_picture_shows_every_point(runs: list[RunSpeed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    draw(ScalingReport(tuple(runs), tuple(find_series(runs)), 100), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["p.png"]
    lines = drawn[0].axes[0].get_lines()
    points = {(x, y) for line in lines if line.get_marker() != "None" for x, y in zip(*line.get_data(), strict=True)}
    assert points == {(r.devices, r.images_per_second) for r in runs}
