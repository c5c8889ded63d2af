"""The bars are those that were set, and a run's verdicts follow from it."""

import io

import pytest

from bench.driver import Turn
from bench.report import bars
from bench.report.record import Part, Run, Writer
from bench.work import Shape
from tests.bench.made_up import figure, usage

CUBE = Shape(2048, 2048, 2048)


def part(shape=CUBE, form="fresh", link_bits_per_s=None, **seconds):
    local_s = seconds.get("numpy", 0.0)
    figures = tuple(
        figure(name.replace("_", "-"), s, over_yardstick_s=s - local_s)
        for name, s in seconds.items()
    )
    usages = tuple(usage(f.contender) for f in figures)
    return Part(shape, form, figures, usages, link_bits_per_s)


def verdict(run_part, bar):
    found = bars.verdicts(Run({}, (run_part,)))
    (one,) = (
        v
        for v in found
        if (v.bar, v.shape, v.form) == (bar, run_part.shape, run_part.form)
    )
    return one


@pytest.mark.parametrize(
    ("bar", "form", "seconds", "ratio", "holds"),
    [
        (
            "over(gradwire-tcp) / over(grpcio-unary)",
            "fresh",
            {"numpy": 0.3, "gradwire_tcp": 0.4, "grpcio_unary": 1.3},
            0.1,
            True,
        ),
        (
            "over(gradwire-tcp) / over(grpcio-unary)",
            "reused",
            {"numpy": 0.3, "gradwire_tcp": 0.5, "grpcio_unary": 1.3},
            0.2,
            False,
        ),
        (
            "gradwire-tcp / arrow-flight",
            "fresh",
            {"gradwire_tcp": 0.85, "arrow_flight": 1.0},
            0.85,
            True,
        ),
        (
            "gradwire-tcp / raw-tcp",
            "fresh",
            {"gradwire_tcp": 1.3, "raw_tcp": 1.0},
            1.3,
            False,
        ),
        (
            "gradwire-tcp / torch-rpc",
            "fresh",
            {"gradwire_tcp": 1.1, "torch_rpc": 1.0},
            1.1,
            True,
        ),
        (
            "gradwire-shm / numpy",
            "reused",
            {"numpy": 1.0, "gradwire_shm": 1.04},
            1.04,
            True,
        ),
        (
            "gradwire-shm / raw-shm",
            "reused",
            {"gradwire_shm": 1.2, "raw_shm": 1.0},
            1.2,
            False,
        ),
    ],
)
def test_a_bar_compares_medians(bar, form, seconds, ratio, holds):
    found = verdict(part(form=form, **seconds), bar)
    assert found.ratio == pytest.approx(ratio)
    assert found.holds is holds


def test_a_bar_stays_open_where_the_run_lacks_a_contender_or_the_shape():
    found = list(bars.verdicts(Run({}, (part(numpy=1.0, gradwire_tcp=2.0),))))
    assert found
    assert all(v.ratio is None and v.holds is None for v in found)


def test_over_is_left_open_where_the_other_took_no_longer_than_numpy():
    lucky = part(numpy=1.0, gradwire_tcp=1.1, grpcio_unary=0.9)
    assert verdict(lucky, "over(gradwire-tcp) / over(grpcio-unary)").holds is None


def test_behind_a_link_the_longest_stage_is_the_measure():
    shape = Shape(1000, 1000, 500)  # 8 MB each way: 64 ms at 1 Gbit/s
    compute_bound = part(shape, link_bits_per_s=1e9, numpy=0.1, gradwire_tcp=0.11)
    assert verdict(compute_bound, bars.LINK_BAR).ratio == pytest.approx(1.1)
    link_bound = part(shape, link_bits_per_s=1e9, numpy=0.01, gradwire_tcp=0.08)
    assert verdict(link_bound, bars.LINK_BAR).ratio == pytest.approx(1.25)


def test_a_run_that_was_written_reads_the_same(tmp_path):
    behind = part(Shape(8, 4, 2), "reused", 1e9, numpy=1.0, raw_tcp=3.0)
    run = Run({"cores": 2}, (part(numpy=1.0, gradwire_tcp=1.5), behind))
    lines = io.StringIO()
    writer = Writer(lines)
    writer.about(run.about)
    for each in run.parts:
        writer.part(each, [Turn("numpy", 0, (1.0,))])
    path = tmp_path / "run.jsonl"
    path.write_text(lines.getvalue())
    assert Run.read(path) == run
    assert run.part(Shape(8, 4, 2), "reused", 1e9) == behind
    assert run.part(Shape(8, 4, 2), "reused") is None


def test_the_command_fails_when_a_bar_does(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    for seconds, status, word in ((1.2, 0, "holds"), (1.3, 1, "FAILS")):
        with path.open("w") as lines:
            writer = Writer(lines)
            writer.about({})
            writer.part(part(gradwire_tcp=seconds, raw_tcp=1.0), [])
        assert bars.main([str(path)]) == status
        assert word in capsys.readouterr().out
