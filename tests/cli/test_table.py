"""The table of commands, and what every command has in common."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import simclr_scale
from simclr_scale.cli import COMMANDS, fail, main
from tests.cli.commands import CHECKOUT, Outcome, start_command

Command = Callable[..., Outcome]

FEWEST_OPTIONS = {"report": 4, "verify": 3, "export": 3, "transfer": 12, "fit-law": 11, "search": 13}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_table_lists_every_command(command: Command, arguments: list[str]) -> None:
    outcome = command(*arguments)
    assert (outcome.status, outcome.err) == (0, "")
    for name, entry in COMMANDS.items():
        assert any(line.split(None, 1) == [name, entry.summary] for line in outcome.out.splitlines())


def test_version(command: Command) -> None:
    assert command("--version") == Outcome(0, f"{simclr_scale.__version__}\n", "")


def test_an_unknown_command(command: Command) -> None:
    assert command("pretran") == (2, "", "simclr-scale: error: unknown command 'pretran'; did you mean pretrain?\n")
    listed = ", ".join(COMMANDS)
    assert command("zzz").err == f"simclr-scale: error: unknown command 'zzz'; there are {listed}\n"


def test_the_table_imports_nothing_heavy() -> None:
    code = "import json, sys; from simclr_scale.cli import main; main([]); print(); print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert "simclr_scale" in loaded
    assert not loaded & {"torch", "numpy", "timm", "pytorch_lightning", "lightning", "jsonargparse", "rich", "yaml"}


def test_as_a_module_with_the_exit_status_of_the_command(tmp_path: Path) -> None:
    assert start_command("knn", "--temprature", "3", cwd=tmp_path) == (
        2,
        "",
        "simclr-scale knn: error: there is no option temprature; did you mean temperature?\n",
    )
    assert start_command("--version", cwd=tmp_path) == (0, f"{simclr_scale.__version__}\n", "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID", "LOCAL_RANK"])
def test_one_process_of_many_tells_what_is_wrong(
    variable: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    assert fail("bad\nnews", "knn") == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(variable, "0")
    assert fail("bad\nnews", "knn") == 2
    assert capsys.readouterr().err == "simclr-scale knn: error: bad news\n"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", ["80", "110"])
def test_help_fits_on_two_screens_and_describes_every_option(
    name: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert re.match(f"usage: simclr-scale {name} (--|RUN )", text)
    assert text.count("\n") < {"80": 175, "110": 135}[columns]
    assert "known subclasses" not in text
    options = re.findall(r"^  --[\w.]+.*(?:\n {10}.*)*", text, flags=re.MULTILINE)
    assert len(options) >= FEWEST_OPTIONS.get(name, 13)
    for option in options:
        assert re.match(r"  --\S+( \S+|, --\S+)*\s{2,}\S+", option), option
