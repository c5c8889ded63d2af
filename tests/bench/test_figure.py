"""The figure and the README's table say what the run's file says."""

import pytest

from bench.report import figure, summary
from bench.report.record import Part, Run
from bench.work import Shape
from tests.bench import made_up


def part(side, form, *names, **others):
    figures = tuple(
        made_up.figure(name, side * (i + 1) / 1e3) for i, name in enumerate(names)
    )
    usages = tuple(made_up.usage(name) for name in names)
    return Part(Shape(side, side, side), form, figures, usages, **others)


RUN = Run(
    {},
    (
        part(32, "fresh", "numpy", "raw-tcp", "oip@host:1"),
        part(8, "fresh", "numpy", "raw-tcp"),
        part(8, "reused", "numpy"),
        part(16, "fresh", "numpy", link_bits_per_s=1e9),
    ),
)


def test_the_figure_has_a_line_for_each_contender_and_the_same_run_the_same_file(
    tmp_path,
):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        figure.draw(RUN, path)
    first, second = (path.read_text() for path in paths)
    assert first == second
    for name in ("numpy", "raw-tcp", "oip@host:1", "8³", "32³"):
        assert f">{name}<" in first
    assert "16³" not in first  # it was behind a link


def test_the_short_table_has_a_column_for_each_shape():
    assert summary.table(RUN, "fresh").splitlines() == [
        "| ms, fresh results | 32³ |   8³ |",
        "| ----------------- | --: | ---: |",
        "| numpy             |  32 | 8.00 |",
        "| raw-tcp           |  64 |   16 |",
        "| oip@host:1        |  96 |      |",
    ]
