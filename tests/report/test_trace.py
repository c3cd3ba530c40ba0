import io
import json

from made_up_report import made_up_rank

from hpcinfer.report.events import Happening
from hpcinfer.report.metrics import Metrics
from hpcinfer.report.recording import Event, Recording, RecordingMetrics
from hpcinfer.report.run_phases import RunPhases
from hpcinfer.report.trace import write_trace


def trace_of(ranks, recorded, happenings=()):
    file = io.StringIO()
    write_trace(file, ranks, iter(recorded), happenings)
    return json.loads(file.getvalue())


def recorded(num_steps=3, num_ranks=1):
    """What a rank keeps of some steps."""
    recording = Recording(num_ranks)
    phases, metrics = RunPhases(recording), RecordingMetrics(recording)
    with phases.phase("load"):
        phases.begin()
    for _ in range(num_steps):
        with metrics.phase("forward"):
            assert metrics.place == "forward"
        metrics.timeline.step(4, 5, 6, 7)
    return recording.to_json(phases.began)


def test_each_event_has_the_fields_of_the_format():
    found = trace_of([made_up_rank(2)], [recorded()], [Happening(1.5, 2, "why", None)])
    for event in found["traceEvents"]:
        assert event["ph"] in "XCiM" and isinstance(event["name"], str) and isinstance(event["pid"], int)
        assert event["ph"] == "M" or isinstance(event["ts"], float)
        assert event["ph"] != "X" or event["dur"] >= 0 and event["tid"] == 0 and "step" in event["args"]
    (fault,) = (event for event in found["traceEvents"] if event["ph"] == "i")
    assert (fault["ts"], fault["args"]["what"]) == (1.5e6, "why")
    assert found["otherData"]["events_dropped"] == 0 and "aligned" in found["otherData"]["clocks"]


def test_steps_are_counted_and_batches_are_counters():
    found = trace_of([made_up_rank(2)], [recorded()])["traceEvents"]
    assert [event["args"]["step"] for event in found if event["name"] == "forward"] == [0, 1, 2]
    assert {event["pid"] for event in found if event["ph"] == "C"} == {2}
    assert [event["args"] for event in found if event["name"] == "KV blocks"] == [{"KV blocks": 7}] * 3
    (load,) = (event for event in found if event["name"] == "load")
    assert load["ts"] <= 0.0 <= load["ts"] + load["dur"] + 1


def test_each_rank_has_a_row_and_followers_no_counters():
    ranks = [made_up_rank(0), made_up_rank(0, 0, 1, rank=1, host="n7"), made_up_rank(rank=3, place={})]
    found = trace_of(ranks, [recorded()] * 3)["traceEvents"]
    rows = [event["args"]["name"] for event in found if event["name"] == "thread_name"]
    assert rows == ["rank 0 (pp 0, tp 0) on n0", "rank 1 (pp 0, tp 1) on n7", "rank 3 on n0"], "rank 2 has died"
    assert sum(event["ph"] == "C" for event in found) == 3 * 3 * 2  # of the leaders, the second one is spare now


def test_first_event_is_at_zero():
    recording = Recording()
    for i in (3, 1, 2):
        recording.add(Event("forward", float(i), 0.5, i))
    assert recording.first_s(2.5) == -1.5
    ranks = [made_up_rank(first_event_s=-1.5), made_up_rank(rank=1, first_event_s=0.0)]
    found = trace_of(ranks, [recording.to_json(2.5), recording.to_json(1.0)], [Happening(1.5, 0, "why", None)])
    assert min(event["ts"] for event in found["traceEvents"] if event["ph"] == "X") == 0.0
    assert [event["ts"] for event in found["traceEvents"] if event["ph"] == "i"] == [3e6]
    assert found["otherData"]["run_begins_s"] == 1.5


def test_first_and_last_events_are_kept():
    recording = Recording(num_ranks=10_000)
    for i in range(1000):
        recording.add(Event("forward", float(i), 0.5, i))
    kept = recording.to_json(0.0)
    steps = [event[3] for event in kept["events"]]
    assert len(steps) == 200 and kept["num_dropped"] == 800
    assert steps == [*range(25), *range(825, 1000)]


def test_recording_measures_what_metrics_do():
    metrics, plain = RecordingMetrics(Recording()), Metrics()
    for each in (metrics, plain):
        with each.phase("a"), each.phase("b"):
            assert each.place == "b"
        assert set(each.seconds) == {"a", "b"} and each.moves == 2 and each.place == ""


def test_phases_of_a_run_count_cpu_time():
    phases = RunPhases()
    with phases.phase("load"):
        sum(range(300_000))
    found = phases.to_json()
    assert found["cpu_seconds"]["load"] > 0 and found["phases"]["load"] > 0 and found["began"] > 0
