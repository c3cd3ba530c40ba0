"""Messages that come, or do not: who is silent, who speaks again, and which tags may be used again."""

import numpy as np
import pytest

from hpcinfer.model import transit
from hpcinfer.model.portions import Share
from hpcinfer.model.transit import FIRST_TAG, NUM_TAGS, PATIENCE_S, Senders, Tags, Way

SENDER = 1


class Message:
    """Comes when it is told to."""

    def __init__(self, tag):
        self.tag, self.has_come, self.is_cancelled = tag, False, False

    def test(self):
        return self.has_come

    def cancel(self):
        self.is_cancelled = True


class Scene:
    """A rank that receives, and its clock."""

    rank = 0

    def __init__(self, monkeypatch):
        monkeypatch.setattr(transit.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(transit, "PIECE_BYTES", 10)
        self.now, self.messages, self.tags = 1000.0, [], Tags()
        self.senders = Senders(self, self.tags)

    def start_receive(self, buffer, peer, tag):
        self.messages.append(Message(tag))
        return self.messages[-1]

    def begin(self, num_pieces=1):
        """A share that is to come; says whether it may be waited for."""
        way = Way(Share("name", range(1), SENDER, ()), np.empty(10 * num_pieces, np.uint8), {}, start=self.now)
        return way, self.senders.let_come(way, SENDER)

    def listen(self, way):
        return self.senders.listen(way, SENDER)


@pytest.fixture
def scene(monkeypatch):
    return Scene(monkeypatch)


def test_who_sends_piece_after_piece_is_not_silent(scene):
    way, _ = scene.begin(num_pieces=5)
    for message in scene.messages:
        scene.now += 0.9 * PATIENCE_S
        assert scene.listen(way) and way.receiving
        message.has_come = True
        assert scene.listen(way)
    assert not way.receiving


def test_who_is_silent_is_waited_for_again_when_it_speaks(scene):
    way, may_wait = scene.begin()
    assert may_wait
    scene.now += 1.1 * PATIENCE_S
    assert not scene.listen(way)
    later, may_wait = scene.begin()
    assert not may_wait and later.receiving, "it is read in the store, but may come"
    scene.messages[1].has_come = True
    assert scene.listen(later)
    assert scene.begin()[1]


def test_what_was_given_up_is_never_taken_for_another_message(scene):
    way, _ = scene.begin()
    scene.tags.spoil(SENDER, way.give_up())
    assert scene.messages[0].is_cancelled and scene.messages[0].tag == FIRST_TAG
    seen = [scene.begin() for _ in range(2 * NUM_TAGS)]
    assert [message.tag for message in scene.messages].count(FIRST_TAG) == 1
    refused = [number for number, (way, may_wait) in enumerate(seen, 1) if not (may_wait or way.receiving)]
    assert refused == [NUM_TAGS, 2 * NUM_TAGS]


def test_what_has_come_spoils_no_tag(scene):
    way, _ = scene.begin(num_pieces=3)
    scene.messages[1].has_come = True
    scene.listen(way)
    assert way.give_up() == [FIRST_TAG, FIRST_TAG + 2] and not scene.messages[1].is_cancelled
