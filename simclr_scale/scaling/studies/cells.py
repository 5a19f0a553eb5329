"""The cells of a study: each is one training, kept in a file of its own once it is done.

A file appears whole or not at all, so a study that is killed loses no more than the trainings under way, and starting
it again runs what is missing. More cells may be asked of the same folder later.
"""

import json
import multiprocessing
import os
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import yaml

from simclr_scale.errors import InputError, RunFailed
from simclr_scale.evaluation.manifest import write_json
from simclr_scale.pretraining.run_lock import RunLock

STUDY = "study.yaml"
_CELLS = "cells"


@dataclass(frozen=True)
class Cell:
    """One training of a study; what differs from cell to cell.

    Attributes:
        batch: images in a step of the optimizer.
        negatives: images among which negatives are taken, m; a view has 2(m - 1) of them.
        rate: peak learning rate.
        seed: of weights, order and draws.
        rule: by which the rate followed the batch.
    """

    batch: int
    negatives: int
    rate: float
    seed: int
    rule: str

    @property
    def name(self) -> str:
        return f"batch={self.batch},negatives={self.negatives},rule={self.rule},rate={self.rate:.6g},seed={self.seed}"


class CellRunner(ABC):
    """Runs cells, one after the other, in the process that made it."""

    @abstractmethod
    def run(self, cell: Cell) -> dict[str, Any]:
        """What was measured, as JSON values."""


class StudyFolder:
    """``study.yaml``, what all cells share, and ``cells/NAME.json``, one for each that is done.

    Raises:
        InputError: something else lies there, or a study with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self._lock = RunLock(folder)
        if folder.exists():
            self._require_same()
        elif not folder.absolute().parent.is_dir():
            raise InputError(f"{folder}: there is no folder {folder.parent}")

    def _require_same(self) -> None:
        file = self.folder / STUDY
        if not file.is_file():
            raise InputError(f"{self.folder} exists already and is no study: it has no {STUDY}; name another folder")
        try:
            before = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
        before = before if isinstance(before, dict) else {}
        for key in sorted({*before, *self.settings}):
            if before.get(key) != self.settings.get(key):
                raise InputError(
                    f"study {self.folder} was started with {key} = {before.get(key)}, not {self.settings.get(key)}; "
                    "name another folder"
                )

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within: the folder is there, and nobody else writes to it.

        Raises:
            InputError: another process does.
        """
        (self.folder / _CELLS).mkdir(parents=True, exist_ok=True)
        if not self._lock.acquire():
            raise InputError(f"study {self.folder} is being run by another process; end that one first")
        try:
            if not (self.folder / STUDY).exists():
                draft = self.folder / f".{STUDY}.partial"
                draft.write_text(yaml.safe_dump(self.settings, sort_keys=False))
                os.replace(draft, self.folder / STUDY)
            yield
        finally:
            self._lock.release()

    def file(self, cell: Cell) -> Path:
        return self.folder / _CELLS / f"{cell.name}.json"

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Of a cell that is done: its settings and what was measured."""
        file = self.file(cell)
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise InputError(f"{file} is damaged; delete it, and its training is run again") from error

    def keep(self, cell: Cell, measured: Mapping[str, Any]) -> None:
        write_json({**asdict(cell), **measured}, self.file(cell))


def run_cells(
    cells: Sequence[Cell],
    study: StudyFolder,
    make_runner: Callable[[], CellRunner],
    *,
    workers: int = 1,
    done: Callable[[int], None] = lambda _count: None,
) -> list[dict[str, Any]]:
    """Runs the cells that have no result yet, and returns the results of all.

    Args:
        make_runner: called once in each process; with several workers it has to be picklable.
        workers: processes; they end with this one, however that ends.
        done: is told how many cells are done.

    Raises:
        InputError, RunFailed: as a cell raised it, or a worker was killed; finished cells are kept.
    """
    missing = [cell for cell in cells if study.result(cell) is None]
    count = len(cells) - len(missing)
    done(count)
    several = min(workers, len(missing)) > 1
    results = _in_processes(missing, make_runner, workers) if several else _here(missing, make_runner)
    for cell, measured in results:
        study.keep(cell, measured)
        count += 1
        done(count)
    return [result for cell in cells if (result := study.result(cell)) is not None]


def _here(cells: Sequence[Cell], make_runner: Callable[[], CellRunner]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    if cells:
        runner = make_runner()
        for cell in cells:
            yield cell, runner.run(cell)


def _in_processes(
    cells: Sequence[Cell], make_runner: Callable[[], CellRunner], workers: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(cells))
    busy: dict[Connection, tuple[Any, Cell]] = {}
    processes = []
    ended_well = False
    try:
        for number in range(min(workers, len(cells))):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, make_runner, number), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            cell = waiting.pop()
            here.send(cell)
            busy[here] = process, cell
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                process, cell = busy.pop(connection)
                yield cell, _received(connection, process, cell)
                if waiting:
                    following = waiting.pop()
                    connection.send(following)
                    busy[connection] = process, following
                else:
                    connection.send(None)
        ended_well = True
    finally:
        for process in processes:
            # Those that are done end by themselves; where a cell failed they wait for another, which never comes.
            process.join(timeout=None if ended_well else 0)
            if process.is_alive():
                process.kill()
                process.join()


def _received(connection: Connection, process: Any, cell: Cell) -> dict[str, Any]:
    try:
        kind, content = connection.recv()
    except EOFError as error:
        process.join()
        raise RunFailed(
            f"the process that trained {cell.name} was ended (exit status {process.exitcode}), maybe for want of "
            "memory: start again with fewer --workers; finished cells are kept"
        ) from error
    if kind == "input":
        raise InputError(content)
    if kind == "failed":
        raise RunFailed(f"{cell.name} failed: {content}")
    return content


def _serve(connection: Connection, make_runner: Callable[[], CellRunner], number: int) -> None:
    """What a worker does; ends at once with the process that started it, be that by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["SIMCLR_SCALE_WORKER"] = str(number)
    runner = None
    while (cell := connection.recv()) is not None:
        try:
            runner = runner or make_runner()
            connection.send(("done", runner.run(cell)))
        except InputError as error:
            connection.send(("input", str(error)))
        except Exception:
            connection.send(("failed", traceback.format_exc().strip().splitlines()[-1]))
