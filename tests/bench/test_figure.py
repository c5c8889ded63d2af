"""The figure and the tables for readers say what the run's file says."""

from pathlib import Path

import pytest

from bench.report import figure, summary
from bench.report.record import Part, Run
from bench.work import Shape
from tests.bench import made_up

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
RECORDED = Path(__file__).parents[2] / "bench" / "results" / "two-cores.jsonl"
ALONE = Part(
    Shape(1000, 1000, 500),  # 8 MB each way
    "reused",
    tuple(made_up.figure(name, 0.01) for name in ("raw-tcp", "gradwire-grpc-tls")),
    (
        made_up.usage("raw-tcp", client_cpu_s=0.004, server_cpu_s=0.008),
        made_up.usage("gradwire-grpc-tls", client_cpu_s=0.032),
    ),
    products=False,
)


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


def test_transports_alone_have_columns_and_bars_of_their_own(tmp_path):
    pytest.importorskip("matplotlib")
    run = Run({}, (*RUN.parts, ALONE))
    assert summary.table(run, "fresh").splitlines() == [
        "| ms, fresh results | 32³ |   8³ | GB/s each way | CPU s/GB |",
        "| ----------------- | --: | ---: | ------------: | -------: |",
        "| numpy             |  32 | 8.00 |               |          |",
        "| raw-tcp           |  64 |   16 |          0.80 |     0.75 |",
        "| oip@host:1        |  96 |      |               |          |",
    ]
    figure.draw(run, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    for text in ("gradwire-grpc-tls", "GB/s each way", "0.80", "0.75", "2.00"):
        assert f">{text}<" in drawn


def test_the_page_is_written_between_its_marks(tmp_path):
    run = Run({}, (part(1024, "fresh", "numpy", "raw-tcp", "unknown"), ALONE))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- medians -->\nold\n<!-- /medians -->\nafter\n")
    summary.write_page(run, page)
    assert page.read_text().splitlines() == [
        "before",
        "<!-- medians -->",
        "",
        "|                           | 1024³ | GB/s each way | CPU s/GB |",
        "| ------------------------- | ----: | ------------: | -------: |",
        "| NumPy alone, no transport |  1024 |               |          |",
        "| gradwire, gRPC alone, TLS |       |          0.80 |     2.00 |",
        "| a TCP socket              |  2048 |          0.80 |     0.75 |",
        "",
        "In the last two columns nothing is computed: the rate of 1000x1000x500 in",
        "both directions at once, and processor seconds of client and server for 10⁹ "
        "bytes.",
        "",
        "<!-- /medians -->",
        "after",
    ]
    again = page.read_text()
    summary.write_page(run, page)
    assert page.read_text() == again
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="no place for the medians"):
        summary.write_page(run, page)


def test_the_benchmarks_page_has_the_table_of_the_recorded_run():
    assert summary.page_text(Run.read(RECORDED)) in PAGE.read_text()
