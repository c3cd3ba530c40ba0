import json

from hpcinfer.diagnosis.examination import Examination
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, Finding
from hpcinfer.diagnosis.telling import START, last_words, report

FOUND = Examination([Finding(OK, "a", "fine"), Finding(WARNING, "b", "odd", "look", (1,)), Finding(ERROR, "c", "bad")],
                    {0: "node1", 1: "node2"})  # fmt: skip


def test_a_report_ends_with_who_was_looked_at_and_how_many_findings_are_bad():
    lines = report(FOUND, "2 ranks", 1.26, is_json=False).splitlines()
    assert len(lines) == 4 and lines[-1] == "2 ranks on node[1-2], 1.3 s: 1 error, 1 warning"
    assert lines[1] == "warning  b             rank 1 on node2: odd; hint: look"


def test_a_report_for_machines_has_the_same():
    values = json.loads(report(FOUND, "2 ranks", 1.26, is_json=True))
    assert (values["errors"], values["warnings"], values["hosts"]) == (1, 1, {"0": "node1", "1": "node2"})
    assert values["findings"][1] == {"level": WARNING, "check": "b", "found": "odd", "hint": "look", "ranks": [1]}


def test_last_words_are_one_line_with_rank_host_and_step(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "8")
    for has_ended, words in ((True, " ended: starting MPI"), (False, " still waits after 20 s: starting MPI")):
        said = last_words(START, 20.0, has_ended=has_ended, is_json=False)
        assert said.startswith("error    MPI ") and "rank 3/8 on " in said and words in said
        assert "mpirun (Open MPI)" in said and said.count("\n") == 1
    said = json.loads(last_words("measuring", 20.0, has_ended=False, is_json=True))
    assert said["findings"][0]["check"] == "time" and "measuring" in said["findings"][0]["found"]


def test_who_ends_after_the_start_leaves_it_to_the_launcher_to_tell():
    assert last_words("measuring", 20.0, has_ended=True, is_json=False) == ""
