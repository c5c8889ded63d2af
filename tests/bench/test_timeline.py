"""The bench's trace says what overlapped, and nothing else."""

import pytest

from bench.report.timeline import Timeline


def _events(*blocks):
    """Events of row blocks, each (received, computed, sent) from when to when."""
    return [
        (at, stage, number)
        for number, spans in enumerate(blocks)
        for stage, span in zip(
            ("receiving", "computing", "sending"), spans, strict=True
        )
        for at in span
    ]


PIPELINE = [((b, b + 1), (b + 1, b + 2), (b + 2, b + 3)) for b in range(6)]
ONE_BY_ONE = [
    ((3 * b, 3 * b + 1), (3 * b + 1, 3 * b + 2), (3 * b + 2, 3 * b + 3))
    for b in range(6)
]


def test_a_full_pipeline_overlaps_wholly_and_one_by_one_not_at_all():
    full = Timeline.of(_events(*PIPELINE))
    assert full.overlapped() == (4, 4)
    assert full.seconds == 8
    assert full.mean_s("computing") == 1
    none = Timeline.of(_events(*ONE_BY_ONE))
    assert none.overlapped() == (0, 4)
    assert none.seconds == 18


@pytest.mark.parametrize("gone", ["next arrives", "last leaves"])
def test_a_block_must_overlap_with_both_of_its_neighbours(gone):
    blocks = list(PIPELINE)
    if gone == "next arrives":
        # Block 3 came late: it began when block 2 was computed.
        blocks[3] = ((4, 4.5), *blocks[3][1:])
    else:
        blocks[1] = (*blocks[1][:2], (3, 3))
    assert Timeline.of(_events(*blocks)).overlapped() == (3, 4)


def test_few_blocks_have_no_neighbours():
    for count in (0, 1, 2):
        assert Timeline.of(_events(*PIPELINE[:count])).overlapped() == (0, 0)


def test_a_stage_lasts_from_its_first_event_to_its_last_in_any_order():
    events = _events(*PIPELINE[:1])
    events += [(10.0, "sending", 0), (-1.0, "receiving", None), (11.0, "sending", None)]
    timeline = Timeline.of(reversed(events))
    # Seconds count from the first of all.
    assert timeline.w == (0, 0)
    assert timeline.blocks["sending"] == [(3, 11)]
    assert timeline.dw == (12, 12)
    assert timeline.seconds == 12


def test_a_stage_that_nobody_saw_is_an_error():
    events = [event for event in _events(*PIPELINE) if event[1:] != ("sending", 3)]
    with pytest.raises(ValueError, match=r"nothing was seen of .*sending.* 3"):
        Timeline.of(events)


def test_the_trace_has_every_span_on_its_stages_track():
    events = [*_events(*PIPELINE), (0.0, "receiving", None), (9.0, "sending", None)]
    trace = Timeline.of(events).chrome_trace()["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    assert names == {1: "1 receiving", 2: "2 computing", 3: "3 sending"}
    spans = [e for e in trace if e["ph"] == "X"]
    assert len(spans) == 3 * 6 + 2
    (one,) = (e for e in spans if e["name"] == "block 2" and e["cat"] == "computing")
    assert (one["ts"], one["dur"], one["tid"]) == (3e6, 1e6, 2)
    assert [e["name"] for e in spans if e["tid"] == 3][-1] == "dW"
