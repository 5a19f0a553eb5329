"""metrics.csv and TensorBoard events of a run, which a resumed run continues."""

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


class RunLogger(Logger):
    """One row a logged step in ``metrics.csv``, and the same numbers as TensorBoard events.

    The ``step`` of a row is the index of the step that it describes, the first being 0; what is logged at the end of an
    epoch belongs to its last step. Nothing is written before the first metric. Columns that appear later are added to
    the rows before, empty.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._rows: list[dict[str, str]] | None = None
        self._columns: list[str] = []
        self._events: Any = None
        self._first_step: int | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def path(self) -> Path:
        return self.folder / "metrics.csv"

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        rows = self._read()
        row = {"step": str(step), **{key: repr(value) for key, value in metrics.items()}}
        if rows and rows[-1]["step"] == row["step"]:
            rows[-1].update(row)
            self._rewrite(row)
        else:
            rows.append(row)
            if set(row) <= set(self._columns) and self.path.exists():
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, self._columns).writerow(row)
            else:
                self._rewrite(row)
        for key, value in metrics.items():
            self._writer().add_scalar(key, value, step)

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Forgets what a run logged at ``step`` and later: those steps come again after a resume."""
        if self.path.exists():
            self._rows = [row for row in self._read() if int(row["step"]) < step]
            self._rewrite({})
            self._first_step = step

    @rank_zero_only
    def save(self) -> None:
        if self._events is not None:
            self._events.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._events is not None:
            self._events.close()

    def _read(self) -> list[dict[str, str]]:
        if self._rows is None:
            self._rows = []
            if self.path.exists():
                with open(self.path, newline="") as file:
                    reader = csv.DictReader(file)
                    self._rows = [{key: value for key, value in row.items() if value} for row in reader]
                    self._columns = list(reader.fieldnames or [])
        return self._rows

    def _rewrite(self, row: dict[str, str]) -> None:
        new = [key for key in row if key not in self._columns]
        self._columns += new
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(".metrics.csv.partial")
        with open(beside, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._read())
        os.replace(beside, self.path)

    def _writer(self) -> Any:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports, only for those who log

            self._events = SummaryWriter(str(self.folder), purge_step=self._first_step)
        return self._events
