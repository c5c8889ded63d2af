"""The bench's tables can be read."""

from bench.report import tables
from bench.report.record import Part
from bench.work import Shape
from tests.bench.made_up import figure, usage


def test_each_contender_has_a_row_with_its_figures():
    shape = Shape(1000, 1000, 500)  # 8 MB each way
    part = Part(
        shape,
        "fresh",
        (
            figure("numpy", 0.002),
            figure("peer", 0.25, times_yardstick=125.0, over_yardstick_s=0.248),
        ),
        (
            usage("numpy", calls=10, client_cpu_s=0.04),
            usage(
                "peer",
                calls=5,
                client_cpu_s=0.1,
                server_cpu_s=0.3,
                client_peak_bytes=40 << 20,
                server_peak_bytes=50 << 20,
                client_switches=90,
                server_switches=30,
            ),
        ),
    )
    local = "2.00|1.80 to 2.20|1.60|1.00||4.00|0.25||30||9"
    peer = "250|225 to 275|200|125.00|248|0.03|5.00|1500|40|50|9"
    assert tables.rows(part) == [
        ("1000x1000x500", "numpy", *local.split("|")),
        ("1000x1000x500", "peer", *peer.split("|")),
    ]


def test_rates_without_products_are_compared_with_the_first():
    shape = Shape(1000, 1000, 500)  # 8 MB each way
    part = Part(
        shape,
        "reused",
        (figure("a", 0.02), figure("b", 0.01)),
        (usage("a", client_switches=0), usage("b")),
        products=False,
    )
    assert ["|".join(row) for row in tables.transport_rows(part)] == [
        "a|20|18 to 22|16|0.40|1.00|0.00|0|30||9",
        "b|10|9.00 to 11|8.00|0.80|2.00|0.00||30||9",
    ]


def test_the_tables_columns_line_up():
    part = Part(
        Shape(8, 8, 8), "fresh", (figure("a-long-name", 1.0),), (usage("a-long-name"),)
    )
    lines = tables.table(tables.rows(part)).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in lines]
    assert bars[0] == bars[1] == bars[2]
