"""A rank that refills takes weights from a sister, which gives them between its steps."""

from types import SimpleNamespace

import numpy as np
import pytest
from mortal_ranks import Network
from random_weights import DTYPES, random_weight

from hpcinfer.config import ModelConfig
from hpcinfer.kernels.protocol import Weight
from hpcinfer.model.refill import held_units
from hpcinfer.model.shard import ShardPlan
from hpcinfer.partition.layout import Layout, ReplicaLayout
from hpcinfer.partition.mesh import Mesh
from hpcinfer.recovery.failover import giving, sister
from hpcinfer.recovery.failover.giving import END, TAG_ASK, TAG_GIVE, WANT, Giver, Note
from hpcinfer.recovery.failover.sister import Sisters, sisters_of

GRAINS, OUTS, HIDDEN = 4, 48, 64
NAME = "layers.1.up_proj.weight"
CONFIG = ModelConfig("LlamaForCausalLM", HIDDEN, 2, 4, 4, 16, GRAINS * OUTS, 512, 128, 1e-5, 1e4)


class Held:
    """Weights that a rank could hold: made up, the same for every name."""

    config = CONFIG

    def __init__(self, dtype, run=range(GRAINS)):
        self.plan = ShardPlan(range(2), run, GRAINS, is_first=True, is_last=True)
        self.weight = random_weight(np.random.default_rng(5), dtype, GRAINS, OUTS, HIDDEN)

    def held(self, name):
        return held_units(CONFIG, self.plan, name)

    def fetch(self, name, units, outs):
        if name.startswith("layers.0.down"):
            return None  # as of kernels that keep it in another form
        rows, (values, dtype, scales) = (slice(units.start, units.stop), slice(outs.start, outs.stop)), self.weight
        return Weight(values[rows], dtype, None if scales is None else scales[rows])


STORE = SimpleNamespace(config=CONFIG, spec=lambda name: SimpleNamespace(shape=(GRAINS, OUTS, HIDDEN)))


@pytest.fixture
def network(monkeypatch):
    """Two ranks: the first refills, the second serves; slices are small."""

    def make(seed, deaths=None):
        network = Network(2, seed, deaths or {})
        for module in (giving, sister):
            monkeypatch.setattr(module, "time", network)
        monkeypatch.setattr(giving, "_SLICE_BYTES", 10 * 4 * HIDDEN)  # 10 outputs
        return network

    return make


def run(network, refill, weights, results=None):
    """What `refill(sisters)` returns on the first rank, and the giver of the second, which may be deaf for a while."""
    results = {} if results is None else results

    def serve(line):
        results["giver"] = giver = Giver(line, weights)
        while not results.get("is_done"):
            if not results.get("is_deaf"):
                giver.turn()
            line.pause()()

    def ask(line):
        sisters = Sisters(line, STORE, [1], is_forced=False)
        results["found"], results["is_deaf"] = refill(sisters), False
        while sisters._owing - line.failed():
            sisters.clear_up()
            line.pause()()
        results["is_done"] = True

    network.run(lambda line: serve(line) if line.rank else ask(line))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("units", [range(GRAINS), range(1, 3)], ids=str)
def test_units_come_as_they_are_held(network, dtype, units):
    held = Held(dtype)

    def refill(sisters):
        assert sisters.all[0].bytes_per_s == 0 and not sisters.all[0].held(NAME)  # it has said nothing yet
        sisters.wait()
        assert sisters.all[0].held(NAME) == range(GRAINS)
        found = sisters.all[0].fetch(NAME, units)
        assert 0 < sisters.all[0].bytes_per_s < float("inf")
        return found

    found = run(network(1), refill, held)["found"]
    rows = slice(units.start, units.stop)
    assert found.dtype == held.weight.dtype and (found.values == held.weight.values[rows]).all()
    if held.weight.scales is not None:
        assert (found.scales == held.weight.scales[rows]).all()


def test_what_a_sister_does_not_hold_is_refused(network):
    def refill(sisters):
        sisters.wait()
        rank = sisters.all[0]
        return [rank.held(NAME), rank.fetch(NAME, range(4)), rank.fetch("layers.0.down_proj.weight", range(1)),
                rank.fetch(NAME, range(2, 3)).values, rank.is_silent]  # fmt: skip

    held = Held("float32", range(2, 4))
    found = run(network(2), refill, held)["found"]
    assert found[:3] == [range(2, 4), None, None] and (found[3] == held.weight.values[2:3]).all() and not found[4]


def test_a_silent_sister_costs_a_moment_and_is_asked_no_more(network):
    results = {}

    def refill(sisters):
        sisters.wait()
        sisters.all[0].said = 1e9
        begin, results["is_deaf"] = sister.time.monotonic(), True
        found = sisters.all[0].fetch(NAME, range(GRAINS))
        return found, sister.time.monotonic() - begin, sisters.all[0].bytes_per_s

    run(network(3), refill, Held("float32"), results)
    found, seconds, rate = results["found"]
    assert found is None and seconds < 2 * sister._PATIENCE_S and rate == 0
    assert not results["giver"]._orders  # it has heard that nobody wants it


@pytest.mark.parametrize("seed", range(12))
def test_a_dying_sister_is_no_harm(network, seed):
    held = Held("int8")

    def refill(sisters):
        sisters.wait()
        return [sisters.all[0].fetch(NAME, range(GRAINS)) for _ in range(4)]

    for found in run(network(seed, {1: 20 + 9 * seed}), refill, held)["found"]:
        assert found is None or (found.values == held.weight.values).all()


class Clock:
    """Time that passes when a slice is sent; a line of two ranks."""

    def __init__(self, slice_s):
        self.now, self.slice_s, self.asked, self.num_sent = 0.0, slice_s, [], 0

    def monotonic(self):
        return self.now

    def probe_bytes(self, tag):
        return (1, self.asked.pop(0).to_bytes()) if self.asked and tag == TAG_ASK else None

    def send_bytes(self, data, rank, tag):
        assert tag == TAG_GIVE
        self.now += self.slice_s
        self.num_sent += 1
        return SimpleNamespace(test=lambda: True)

    def failed(self):
        return frozenset()

    def pause(self):
        return lambda: None


@pytest.mark.parametrize("step_s", [0.001, 0.02, 0.3])
def test_a_tenth_of_the_time_is_given_away(monkeypatch, step_s):
    clock = Clock(slice_s=0.0008)
    monkeypatch.setattr(giving, "time", clock)
    giver = Giver(clock, Held("float32"))
    clock.asked = [Note(WANT, 1, {"name": NAME, "units": [0, 4], "outs": OUTS, "rows": 1})] * 60
    longest = 0.0
    for _ in range(200):
        clock.now += step_s
        begin = clock.now
        giver.turn()
        longest = max(longest, clock.now - begin)
    given = clock.num_sent * clock.slice_s
    assert longest <= 0.01 + clock.slice_s
    assert given <= 0.12 * 200 * step_s + 0.01 and (given >= 0.05 * 200 * step_s or longest >= 0.01)


def test_nothing_is_given_after_the_end(monkeypatch):
    clock = Clock(slice_s=0.004)
    monkeypatch.setattr(giving, "time", clock)
    giver = Giver(clock, Held("float32"))
    clock.asked = [Note(WANT, 1, {"name": NAME, "units": [0, 4], "outs": OUTS, "rows": 1}), Note(END, 2, {})]
    for _ in range(5):
        clock.now += 1
        giver.turn()
    assert clock.num_sent == 1  # the answer to the last word


def test_the_next_replicas_that_live_are_asked():
    layout = Layout(tuple(ReplicaLayout(Mesh(1, 1, 2), (2 * i, 2 * i + 1)) for i in range(4)), (8,))
    assert sisters_of(layout, 2, frozenset()) == [6, 7, 0, 1]
    assert sisters_of(layout, 2, frozenset({6, 7, 1})) == [0, 2, 3]
    assert sisters_of(Layout(layout.replicas[:1], ()), 0, frozenset()) == []
