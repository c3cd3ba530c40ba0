from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, Finding, fold, host_ranges, ranges, render

HOSTS = {rank: f"node{rank // 8:02}" for rank in range(1000)}


def expand(text):
    bounds = (part.partition("-") for part in text.split(","))
    return {number for first, _, last in bounds for number in range(int(first), int(last or first) + 1)}


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_say_all_numbers_and_no_others(numbers):
    text = ranges(numbers)
    assert expand(text) == numbers
    assert all(number + 1 not in numbers for number in map(int, (part.split("-")[-1] for part in text.split(","))))


def test_hosts_are_written_as_slurm_does():
    assert host_ranges(["node01", "node02", "node03", "node07"]) == "node[01-03,07]"
    assert host_ranges(["node9", "node10"]) == "node10,node9"  # of two widths
    assert host_ranges(["login", "gpu3"]) == "gpu3,login"
    assert host_ranges(["c2.example.org", "c1.example.org"]) == "c[1-2].example.org"
    assert host_ranges(["rack1-a", "rack2-a"]) == "rack1-a,rack2-a"
    assert host_ranges([]) == ""


def test_a_line_names_few_of_many_runs():
    hosts = {rank: f"n{rank}" for rank in range(800)}
    line = render(Finding(WARNING, "x", "odd", ranks=tuple(range(0, 800, 16))), hosts)
    assert "ranks 0,16,32," in line and " ... (50 ranks) on n0," in line and len(line) < 200


def test_equal_findings_become_one_and_keep_their_order():
    first = [Finding(WARNING, "limits", "few", "more", (rank,)) for rank in (4, 2, 3)]
    other = Finding(OK, "world", "one world")
    assert fold([*first, other, first[0]]) == [Finding(WARNING, "limits", "few", "more", (2, 3, 4)), other]
    assert len(fold([first[0], first[0]._replace(level=ERROR)])) == 2


def test_a_line_says_level_check_ranks_hosts_text_and_hint():
    finding = Finding(ERROR, "model", "not there", "mount it", (8, 9, 10, 17))
    assert render(finding, HOSTS) == "error    model         ranks 8-10,17 on node[01-02]: not there; hint: mount it"
    assert render(finding._replace(ranks=(3,)), HOSTS).startswith("error    model         rank 3 on node00: ")


def test_what_is_true_of_all_names_nobody():
    finding = Finding(OK, "kernels", "native")
    for ranks in ((), tuple(HOSTS)):
        assert render(finding._replace(ranks=ranks), HOSTS) == "ok       kernels       native"


@given(st.text(), st.text())
def test_a_line_is_one_line(found, hint):
    assert len(render(Finding(OK, "x", found, hint), HOSTS).splitlines()) == 1
