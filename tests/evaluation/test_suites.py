"""Suite files: those that are shipped, and what is wrong with others."""

import tomllib
from pathlib import Path

import pytest

from simclr_scale.errors import InputError
from simclr_scale.evaluation import load_suite, suites
from simclr_scale.evaluation.suites import shipped_suites
from tests.cli.commands import CHECKOUT


def test_published_values_are_those_of_the_paper() -> None:
    suite = load_suite("twelve")
    expected = [68.4, 90.6, 71.6, 37.4, 58.8, 50.3, 50.3, 80.5, 74.5, 83.6, 90.3, 91.2]
    assert [entry.published for entry in suite.entries] == expected
    assert suite.published == "SimCLR ResNet-50 (1x), linear"
    assert [entry.name for entry in suite.entries][::4] == ["Food-101", "SUN397", "DTD"]
    assert set(shipped_suites()) == {"twelve", "local_example"}
    assert [entry.name for entry in load_suite("local_example").entries] == ["Chest X-rays", "Clothing"]


def test_an_installed_package_brings_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(shipped_suites().values()) == sorted((CHECKOUT / "suites").glob("*.yaml"))
    wheel = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["suites"] == "simclr_scale/suites"
    (tmp_path / "mine.yaml").write_text("sets: [{name: A, source: a, metric: top1}]")
    monkeypatch.setattr(suites, "_FOLDERS", (tmp_path, *suites._FOLDERS))
    assert load_suite("mine").entries[0].source == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sets:\n  - {name: A\n  - b", r"s.yaml, line 3: "),
        ("", "s.yaml: wanted a key 'sets' with a list of data sets"),
        ("sets: {}", "wanted a key 'sets'"),
        ("set: []", "wanted a key 'sets'"),
        ("sets: [a]", "set 1 is 'a', wanted keys such as name, source and metric"),
        ("sets: [{name: A, source: a}]", r"set 1 \(A\): has no metric; one of top1, mean_per_class"),
        ("sets: [{source: a, metric: top1}]", "set 1: has no name"),
        ("sets: [{name: A, source: a, metric: top5}]", r"set 1 \(A\): metric: there is no 'top5'; did you mean top1\?"),
        ("sets: [{name: A, source: a, metric: top1, shot: 3}]", r"there is no key 'shot'; did you mean shots\?"),
        ("sets: [{name: A, source: a, metric: top1, shots: 0}]", "shots: 0, wanted at least 1"),
        ("sets: [{name: A, source: a, metric: top1, shots: x}]", "shots: 'x', wanted a whole number"),
        ("sets: [{name: A, source: a, metric: top1, shots: true}]", "shots: True, wanted a whole number"),
        ("sets: [{name: A, source: a, metric: top1, splits: a}]", "splits: 'a', wanted keys with values"),
        ("sets: [{name: A, source: a, metric: top1, splits: {tst: b}}]", r"splits: .*'tst'; did you mean test\?"),
        ("sets: [{name: 3, source: a, metric: top1}]", "set 1: name: 3, wanted a text"),
        (
            "sets: [{name: A, source: a, metric: top1}, {name: A, source: b, metric: top1}]",
            "two sets are called 'A'",
        ),
        ("published: 3\nsets: [{name: A, source: a, metric: top1}]", "published: 3, wanted a text"),
        ("\x00", "cannot be read as YAML"),
    ],
)
def test_a_malformed_suite_is_named_by_line_or_key(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_suite(file)


def test_an_unknown_suite_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no suite file or shipped suite 'twelv'; did you mean twelve\?"):
        load_suite("twelv")
    with pytest.raises(InputError, match="shipped suites are local_example, twelve"):
        load_suite("none.yaml")
