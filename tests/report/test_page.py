"""The page is whole, opens without a network, and has what a reader looks for."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from made_up_report import BEGAN, made_up_measured, made_up_rank, made_up_run

from hpcinfer.report.document import FORMAT, complete_report
from hpcinfer.report.files import write_report
from hpcinfer.report.page import render_page
from hpcinfer.report.rates import loaded_s
from hpcinfer.report.svg import shorten, tick_names, ticks

VOID = {"meta"}


class Reader(HTMLParser):
    """Checks that elements are closed in order, and collects tags, addresses and words."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def fault(replica=1, **values):
    return {"replica": replica, "cause": "rank 3 of the world has died", "found_time": BEGAN + 40.0, "members": 1,
            "mesh": "dp=1 pp=1 tp=1", "first_token_time": BEGAN + 41.5, **values}  # fmt: skip


def report_of(*ranks, **values):
    return complete_report(made_up_measured(ranks or None, **values), 120.0)


def test_page_is_whole_and_needs_nothing_else():
    text = render_page(report_of())
    found = Reader(text)
    assert not found.addresses and not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", text)
    assert found.tags.count("svg") == 7


def test_drawings_are_whole_and_hold_numbers_only():
    for drawing in re.findall(r"<svg.*?</svg>", render_page(report_of()), re.DOTALL):
        root = ElementTree.fromstring(drawing)
        width, height = float(root.get("width")), float(root.get("height"))
        for element in root.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "width", "height"):
                value = float(element.get(name, 0))
                assert -1 <= value <= max(width, height), (element.tag, element.attrib)


def test_page_says_what_a_reader_looks_for():
    ranks = [made_up_rank(0), made_up_rank(1, host="n1", until_s=60.0, recoveries=[fault()])]
    words = "".join(Reader(render_page(report_of(*ranks))).words)
    for expected in ("tiny: 1000 rows as dp=2", "What bounds it", "storage", "replica 1", "communication",
                     "rank 3 of the world has died; 1 rank went on", "next token after 1.5 s", "--stage DIR",
                     "not readable here", "d1d1", "cdcd", "seed is 11", "node-hours", "fault", "<end>"):  # fmt: skip
        assert expected in words, expected


def test_what_users_give_is_not_read_as_html():
    text = render_page(report_of(asked={"output": "<b>&out"}, run=made_up_run(2, mesh="<i>")))
    assert "&lt;b&gt;&amp;out" in text and "<i>" not in text


@pytest.mark.parametrize("ranks", [
    [made_up_rank(place={}, phases={}, loading={})],
    [made_up_rank(until_s=0.0, phases={"run": 0.0}, tokens={"prompt": 0, "output": 0, "resumed": 0})],
    [made_up_rank(replica, host=f"a-long-name-of-a-node-{replica}.cluster.example") for replica in range(40)],
], ids=["spare ranks only", "nothing done", "many replicas"])  # fmt: skip
def test_unusual_runs_have_a_page(ranks):
    Reader(render_page(report_of(*ranks, run=made_up_run(len(ranks), [rank["host"] for rank in ranks]))))


def test_report_has_its_keys_and_the_page_is_beside_it(tmp_path):
    paths = {write_report(tmp_path, report_of()) for _ in range(2)}
    assert paths == {tmp_path / "report.html"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["format"] == FORMAT and report["run"]["num_rows"] == 1000 and len(report["ranks"]) == 2
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert len(names) == 4 and names[-2:] == ["report.html", "report.json"], "each run keeps its own, nothing is left"


def test_energy_and_its_price():
    joules = {"joules": 360.0, "parts": {"RAPL 0": 300.0, "GPU 0": 60.0}, "why_not": ""}
    ranks = [made_up_rank(0, energy=joules), made_up_rank(0, 0, 1, energy=None)]
    found = report_of(*ranks)
    assert found["energy"] == {"joules": 360.0, "counted": "processors and memory and GPUs",
                               "by_kind": {"RAPL": 300.0, "GPU": 60.0}, "nodes_measured": 1,
                               "why_not": ""}  # fmt: skip
    used = found["usage"]
    assert used["nodes"] == 1 and used["node_hours"] == pytest.approx(120 / 3600)
    assert used["joules_per_million_output_tokens"] == pytest.approx(360e6 / 3920)
    assert "360 J of processors and memory and GPUs" in found["methods"]


def test_gpus_alone_are_not_the_nodes():
    found = report_of(made_up_rank(energy={"joules": 60.0, "parts": {"GPU 0": 60.0}, "why_not": "no RAPL"}))
    words = "".join(Reader(render_page(found)).words)
    assert "energy of GPUs" in words and "60 J; others: no RAPL" in words and "60 J of GPUs" in found["methods"]


def test_ranks_that_died_are_counted_and_keep_their_names():
    hosts = ["n0", "n1", "n2"]
    ranks = [made_up_rank(rank=rank, host=f"n{rank}") for rank in (0, 2)]
    found = report_of(*ranks, run=made_up_run(2, hosts))
    assert found["usage"]["nodes"] == 3 and [node["host"] for node in found["nodes"]] == hosts
    assert "took 3 MPI ranks" in found["methods"] and "; 1 rank died." in found["methods"]
    words = "".join(Reader(render_page(found)).words)
    assert "rank 2 (n2)" in words and "rank 1 (" not in words


def test_rate_leaves_out_the_loading():
    ranks = [made_up_rank(loading={**made_up_rank()["loading"], "last_layer_s": last}) for last in (1.0, 22.0)]
    assert loaded_s(ranks) == 20.0 and loaded_s(ranks[:1]) == 0.0
    used = report_of(*ranks, run=made_up_run(2, ["n0", "n0"], loaded_s=20.0))["usage"]
    assert used["output_tokens_per_s"] == 2 * 40 * (98 - 20) / 80  # what came before does not count


def test_node_that_nobody_measured_makes_the_sum_unknown():
    joules = {"joules": 360.0, "parts": {"RAPL 0": 360.0}, "why_not": ""}
    found = report_of(made_up_rank(0, energy=joules), made_up_rank(1, host="n1", energy=None))
    assert found["energy"]["joules"] is None and "not every node" in found["energy"]["why_not"]
    assert [node["host"] for node in found["nodes"]] == ["n0", "n1"]


def test_run_that_was_stopped_says_so():
    files = {**made_up_measured()["files"], "output": {"path": "o", "size_bytes": 0, "digest": None, "sha256": None}}
    report = report_of(run=made_up_run(2, stopped="time limit", num_done=400), files=files)
    assert "stopped (time limit) when 400 of them were finished" in report["methods"]
    assert "stopped early (time limit)" in render_page(report) and "stopped" not in render_page(report_of())


def test_methods_paragraph_names_what_others_need():
    text = report_of()["methods"]
    for expected in ("hpcinfer 1.2.3 (MPI Open MPI 5.0.11, numpy 2.0)", "the model tiny (TinyForCausalLM, 0.125 b",
                     "KV cache in int8", "SHA-256 " + "cd" * 32, "ef" * 32 + " (over the SHA-256 of each 16 MiB)",
                     "temperature 0.5", "the seed is 11", "1 node with Made-up CPU (64 CPUs, 256.0 GiB)",
                     "energy could not be measured"):  # fmt: skip
        assert expected in text, text


def test_each_recovery_is_told_once():
    ranks = [made_up_rank(1, recoveries=[fault()]), made_up_rank(1, 0, 1, recoveries=[fault(first_token_time=None)])]
    (event,) = report_of(*ranks)["events"]
    assert (event["time_s"], event["replica"], event["seconds"]) == (40.0, 1, 1.5)


@pytest.mark.parametrize(("stop", "names"), [
    (0.9, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]), (7, ["0", "2", "4", "6", "8"]),
    (100, ["0", "20", "40", "60", "80", "100"]),
    (60_000, ["0", "10k", "20k", "30k", "40k", "50k", "60k"]), (0, ["0", "1"]),
])  # fmt: skip
def test_axes_have_round_numbers(stop, names):
    assert list(tick_names(ticks(stop))) == names


def test_long_words_are_cut():
    assert shorten("node", 100) == "node" and shorten("a" * 50, 70).endswith("…")
