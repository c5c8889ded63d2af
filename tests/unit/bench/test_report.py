"""The bench's table can be read."""

from bench import report
from bench.driver import Peak
from bench.statistics import Figure
from bench.work import Shape


def _figure(contender, median_s, **others):
    values = {
        "low_s": median_s * 0.9,
        "high_s": median_s * 1.1,
        "min_s": median_s * 0.8,
        "turns": 9,
        "calls": 12,
        "times_yardstick": 1.0,
        "over_yardstick_s": 0.0,
    }
    return Figure(contender=contender, median_s=median_s, **(values | others))


def test_each_contender_has_a_row_with_its_figures():
    rows = report.rows(
        Shape(64, 64, 64),
        [
            _figure("numpy", 0.002),
            _figure("peer", 0.25, times_yardstick=125.0, over_yardstick_s=0.248),
        ],
        [Peak("numpy", 30 << 20, None), Peak("peer", 40 << 20, 50 << 20)],
    )
    interval = "1.80 to 2.20"
    assert rows == [
        ("64³", "numpy", "2.00", interval, "1.60", "1.00", "", "30", "", "9"),
        ("64³", "peer", "250", "225 to 275", "200", "125.00", "248", "40", "50", "9"),
    ]


def test_the_tables_columns_line_up():
    rows = report.rows(
        Shape(8, 8, 8), [_figure("a-long-name", 1.0)], [Peak("a-long-name", 1, 1)]
    )
    lines = report.table(rows).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in lines]
    assert bars[0] == bars[1] == bars[2]
