"""The bars are those that were set, and a run's verdicts follow from it."""

import dataclasses
import io

import pytest

from bench.driver import Turn
from bench.report import bars
from bench.report.record import Part, Run, Writer
from bench.work import Shape
from tests.bench.made_up import figure, usage

CUBE = Shape(2048, 2048, 2048)


def part(shape=CUBE, form="fresh", link_bits_per_s=None, round_trip_s=0.0, **seconds):
    local_s = seconds.get("numpy", 0.0)
    figures = tuple(
        figure(name.replace("_", "-"), s, over_yardstick_s=s - local_s)
        for name, s in seconds.items()
    )
    usages = tuple(usage(f.contender) for f in figures)
    return Part(shape, form, figures, usages, link_bits_per_s, round_trip_s)


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
            "over(gradwire-grpc) / over(grpcio-unary)",
            "fresh",
            {"numpy": 0.3, "gradwire_grpc": 0.4, "grpcio_unary": 1.3},
            0.1,
            True,
        ),
        (
            "over(gradwire-grpc) / over(grpcio-unary)",
            "reused",
            {"numpy": 0.3, "gradwire_grpc": 0.5, "grpcio_unary": 1.3},
            0.2,
            False,
        ),
        (
            "gradwire-direct / arrow-flight",
            "fresh",
            {"gradwire_direct": 0.87, "arrow_flight": 1.0},
            0.87,
            True,
        ),
        (
            "gradwire-direct / raw-tcp",
            "fresh",
            {"gradwire_direct": 1.01, "raw_tcp": 1.0},
            1.01,
            False,
        ),
        (
            "gradwire-grpc / raw-tcp",
            "fresh",
            {"gradwire_grpc": 1.3, "raw_tcp": 1.0},
            1.3,
            False,
        ),
        (
            "gradwire-grpc / torch-rpc",
            "fresh",
            {"gradwire_grpc": 1.1, "torch_rpc": 1.0},
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
    assert found.seen == pytest.approx(ratio)
    assert found.holds is holds


def test_a_bar_stays_open_where_the_run_lacks_a_contender_or_the_shape():
    found = list(bars.verdicts(Run({}, (part(numpy=1.0, gradwire_grpc=2.0),))))
    assert found
    assert all(v.seen is None and v.holds is None for v in found)


def test_over_is_left_open_where_the_other_took_no_longer_than_numpy():
    lucky = part(numpy=1.0, gradwire_grpc=1.1, grpcio_unary=0.9)
    assert verdict(lucky, "over(gradwire-grpc) / over(grpcio-unary)").holds is None


def test_behind_a_link_the_longest_stage_is_the_measure():
    shape = Shape(1000, 1000, 500)  # 8 MB each way: 64 ms at 1 Gbit/s
    compute_bound = part(shape, link_bits_per_s=1e9, numpy=0.1, gradwire_grpc=0.11)
    assert verdict(compute_bound, bars.LINK_BAR).seen == pytest.approx(1.1)
    link_bound = part(shape, link_bits_per_s=1e9, numpy=0.01, gradwire_grpc=0.08)
    assert verdict(link_bound, bars.LINK_BAR).seen == pytest.approx(1.25)


TALL = Shape(16384, 1024, 1024)  # 138.4 MB each way


def test_transports_alone_are_held_to_rates_and_costs():
    moved_gb = 2 * TALL.bytes_each_way / 1e9
    costs = {
        "gradwire-grpc": {},
        "gradwire-direct": {
            "client_cpu_s": 0.25 * moved_gb,
            "server_cpu_s": 0.34 * moved_gb,
            "client_switches": round(700 * moved_gb),
            "server_switches": round(900 * moved_gb),
        },
        "gradwire-grpc-tls": {"client_cpu_s": 2.0},
        "gradwire-direct-tls": {"client_cpu_s": 1.2},
    }
    seconds = zip(costs, (0.2, 0.09, 0.4, 0.2), strict=True)
    alone = Part(
        TALL,
        "reused",
        tuple(figure(name, s) for name, s in seconds),
        tuple(usage(name, **used) for name, used in costs.items()),
        products=False,
    )
    found = {v.bar: v for v in bars.verdicts(Run({}, (alone,))) if v.seen is not None}
    expected = {
        "GB/s each way, gradwire-direct": (0.1384 / 0.09, True),
        "GB/s, gradwire-direct / gradwire-grpc": (2.222, True),
        "CPU s/GB, gradwire-direct": (0.59, True),
        "switches/GB, gradwire-direct": (1600, False),
        "CPU s/GB, gradwire-direct-tls / gradwire-grpc-tls": (0.6, True),
    }
    assert {name.removesuffix(", without products") for name in found} == set(expected)
    for name, (value, holds) in expected.items():
        each = found[f"{name}, without products"]
        assert each.seen == pytest.approx(value, rel=2e-3)
        assert each.holds is holds


@pytest.mark.parametrize(
    ("rate", "holds"), [(1.5, True), (1.49, False)], ids=["enough", "too little"]
)
def test_a_rate_is_a_lower_bound(rate, holds):
    figures = (figure("gradwire-direct", TALL.bytes_each_way / 1e9 / rate),)
    alone = Part(TALL, "reused", figures, (usage("gradwire-direct"),), products=False)
    name = "GB/s each way, gradwire-direct, without products"
    (found,) = (v for v in bars.verdicts(Run({}, (alone,))) if v.bar == name)
    assert found.holds is holds


def test_a_part_without_products_is_no_whole_job():
    whole = part(TALL, gradwire_direct=1.0, raw_tcp=1.0)
    alone = dataclasses.replace(whole, form="fresh", products=False)
    assert verdict(whole, "gradwire-direct / raw-tcp").holds is False
    assert verdict(alone, "gradwire-direct / raw-tcp").holds is None


def test_peaks_of_memory_are_compared_end_by_end():
    names = ("gradwire-grpc", "gradwire-direct")
    peaks = {"client": (100, 106), "server": (200, 210)}
    usages = (
        usage(name, client_peak_bytes=client, server_peak_bytes=server)
        for name, client, server in zip(names, *peaks.values(), strict=True)
    )
    both = Part(CUBE, "fresh", tuple(figure(n, 1.0) for n in names), tuple(usages))
    for end, holds in (("client", False), ("server", True)):
        name = f"{end}'s peak, gradwire-direct / gradwire-grpc"
        assert verdict(both, name).holds is holds


def test_a_delay_and_a_rate_have_bars_of_their_own():
    far = part(TALL, "fresh", 1e9, 0.02, gradwire_grpc=2.0, gradwire_direct=1.6)
    bar = "gradwire-direct / gradwire-grpc, 1 Gbit/s + 20 ms"
    assert verdict(far, bar).holds is False
    near = dataclasses.replace(far, round_trip_s=0.0)
    assert verdict(near, bar).holds is None
    wide = part(TALL, "fresh", 1e10, gradwire_direct=0.14)
    empty = dataclasses.replace(wide, products=False)
    bar = "gradwire-direct / the wire, 10 Gbit/s, without products"
    assert verdict(empty, bar).seen == pytest.approx(0.14 / 0.1107, rel=1e-3)
    assert verdict(wide, bar).holds is None


def test_a_run_that_was_written_reads_the_same(tmp_path):
    behind = part(Shape(8, 4, 2), "reused", 1e9, numpy=1.0, raw_tcp=3.0)
    empty = dataclasses.replace(behind, round_trip_s=0.02, products=False)
    run = Run({"cores": 2}, (part(numpy=1.0, gradwire_grpc=1.5), behind, empty))
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
    assert run.part(Shape(8, 4, 2), "reused", 1e9, 0.02, products=False) == empty


def test_the_command_fails_when_a_bar_does(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    for seconds, status, word in ((1.2, 0, "holds"), (1.3, 1, "FAILS")):
        with path.open("w") as lines:
            writer = Writer(lines)
            writer.about({})
            writer.part(part(gradwire_grpc=seconds, raw_tcp=1.0), [])
        assert bars.main([str(path)]) == status
        assert word in capsys.readouterr().out
