from pathlib import Path

import pytest
from made_up_report import made_up_rank, made_up_run

from hpcinfer.report.summary import merge_counts, summary_lines

RUN = {
    "input_kind": "jsonl", "loaded_s": 0.0, "num_mergers": 2,
    "num_rows": 10, "num_failed": 2, "mesh": "dp=2 pp=1 tp=1", "world_size": 2, "kv_cache_bytes": 1 << 20,
    "seconds": {"load": 1.5, "run": 4.0, "merge": 0.25},
    "sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.1, "max_tokens": 256},
    "origins": {"temperature": "generation_config.json", "top_p": "hpcinfer", "top_k": "hpcinfer",
                "min_p": "command line", "max_tokens": "hpcinfer"},
}  # fmt: skip


def rank(stops=3, lengths=1, **sections):
    return {
        "rank": 0, "seconds": {"forward": 2.0, "sampling": 0.5}, "finish_reasons": {"stop": stops, "length": lengths},
        "errors": {"invalid_json": 1}, "rows": {"finished": 5, "cut_by_default": lengths},
        "tokens": {"prompt": 60, "output": 40}, "phases": {}, "cpu_seconds": {}, "kernels": {}, "loading": {},
        "bytes_read": {"store": 0, "stage": 0, "input": 0}, **sections,
    }  # fmt: skip


def follower():
    nothing = {"prompt": 0, "output": 0}
    return rank(seconds={}, finish_reasons={}, errors={}, rows={"finished": 0}, tokens=nothing)


def lines_of(*ranks, **run):
    return {line.split()[0]: line for line in summary_lines({**RUN, **run}, list(ranks))}


def test_summary_adds_up_all_ranks():
    lines = lines_of(rank(), follower(), rank())
    assert lines["output"].endswith("10 rows, 2 of them errors")
    assert "10 rows of a jsonl input; finish reasons: length 2, stop 6; errors: invalid_json 2" in lines["this"]
    assert "120 prompt, 80 output; 20.0 output tokens/s, 50.0 total tokens/s" in lines["tokens"]
    assert "dp=2 pp=1 tp=1, 2 ranks; KV cache 1.0 MiB per rank" in lines["mesh"]
    assert lines["time"].endswith("load 1.5 s, run 4.0 s, merge 0.2 s") and "forward 2.0 s" in lines["steps"]
    assert lines["defaults"].split(None, 1)[1] == (
        "temperature=0.0 (generation_config.json), top_p=1.0 (hpcinfer), min_p=0.1 (command line),"
        " max_tokens=256 (hpcinfer)"
    )
    assert "warning" not in lines
    assert "40.0 output tokens/s" in lines_of(rank(), rank(), loaded_s=2.0)["tokens"], "loading is not counted"
    assert "20.0 output tokens/s" in lines_of(rank(), rank(), loaded_s=4.5)["tokens"], "over before it was loaded"


def test_nothing_done_is_said_without_dividing_by_zero():
    lines = lines_of(follower(), seconds={"run": 0.0})
    assert "finish reasons: none" in lines["this"] and "warning" not in lines
    assert "0.0 output tokens/s" in lines["tokens"]


@pytest.mark.parametrize(("stops", "lengths", "warns"), [(1, 1, False), (1, 2, True), (0, 1, True), (0, 0, False)])
def test_many_cut_completions_are_warned_of(stops, lengths, warns):
    lines = lines_of(rank(stops, lengths))
    assert ("warning" in lines) == warns
    if warns:
        assert f"{lengths} of {stops + lengths} completions" in lines["warning"]
        assert "max_tokens (256)" in lines["warning"]


def test_first_row_of_each_error_is_shown_and_many_errors_are_warned_of():
    lines = lines_of(rank(examples={"bad": "row 3: why"}), num_failed=9)
    assert lines["error"].endswith("bad, row 3: why") and "most rows" in lines["warning"]


def test_slow_ranks_are_named():
    place, counts = {"replica": 0, "pp_rank": 0, "share": 0.5}, {"steps": 5, "tokens": 100}
    lines = lines_of(*(rank(place={**place, "tp_rank": i}, host=f"n{i}", counts=counts,
                            rank=i, kernels={"products": 10.0 * i + 10.0}) for i in range(2)))  # fmt: skip
    assert "rank 1 on n1 takes 2.0 times as long" in lines["warning"]


def test_missing_sections_count_nothing():
    assert merge_counts([{}, {"errors": {"a": 2}}, {"errors": {"a": 1, "b": 1}}], "errors") == {"a": 3, "b": 1}


def test_bound_and_page_have_a_line_each():
    run, ranks = made_up_run(), [made_up_rank(counts={"steps": 100, "tokens": 6_400})]
    lines = {line.split()[0]: line for line in summary_lines(run, ranks, Path("out.job/report.html"))}
    assert lines["bound"].startswith("bound     compute in the run (compute 75 %")
    assert "what would help most: more ranks (-dp)" in lines["bound"]
    assert lines["report"] == "report    out.job/report.html"
    assert "bound" not in lines_of(rank()) and "report" not in lines_of(rank())
