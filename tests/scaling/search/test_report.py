"""The report of a search."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from simclr_scale.scaling.search.report import Row, SearchReport, draw


def rows(linear: list[float], knn: list[float], rank: list[float]) -> tuple[Row, ...]:
    return tuple(
        Row(f"n{i}", "complete", k, None, 1, {"knn": k, "rankme": r, "params": 100 - i}, y)
        for i, (y, k, r) in enumerate(zip(linear, knn, rank, strict=True))
    )


def test_rank_correlations_by_hand(tmp_path: Path) -> None:
    linear = [0.5, 0.6, 0.7, 0.8, 0.9, 0.55, 0.65, 0.75]
    knn = [0.1, 0.2, 0.4, 0.3, 0.5, 0.15, 0.25, 0.35]
    rank = [8, 7, 6, 5, 4, 3, 2, 1.5]
    report = SearchReport("knn", rows(linear, knn, rank), ())
    found = report.correlations()
    for name, values in {"knn": knn, "rankme": rank}.items():
        places = [np.argsort(np.argsort(each)) for each in (values, linear)]
        by_hand = 1 - 6 * ((places[0] - places[1]) ** 2).sum() / (8 * (64 - 1))
        assert found[name]["spearman"] == pytest.approx(by_hand)
        assert found[name]["encoders"] == 8
    console = Console(width=120, record=True, force_terminal=True, file=StringIO())
    report.print_table(console)
    text = console.export_text()
    assert "Spearman correlation of kNN with linear accuracy" in text
    assert "says little" not in text
    draw(report, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 5_000


def test_few_encoders_say_little() -> None:
    report = SearchReport("knn", rows([0.5, 0.6, 0.7], [0.1, 0.2, 0.3], [3, 2, 1]), ())
    console = Console(width=120, record=True, force_terminal=True, file=StringIO())
    report.print_table(console)
    assert "3 encoders; of fewer than 8 that says little" in console.export_text()


def test_without_a_complete_trial() -> None:
    report = SearchReport("knn", (Row("n", "failed", None, None, 1, {"reason": "why"}, None),), ())
    assert report.best is None
    assert report.correlations() == {}
    assert report.as_json()["best"] is None
