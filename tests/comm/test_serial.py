import numpy as np
import pytest

from hpcinfer.comm.serial import SerialGroup


def test_messages_to_oneself_keep_their_order_by_tag():
    group = SerialGroup()
    for tag, data in ((1, b"a"), (2, b"b"), (1, b"c"), (1, b"")):
        assert group.send_bytes(data, 0, tag).test()
    assert group.probe_bytes(2) == (0, b"b") and group.probe_bytes(2) is None
    assert [group.receive_bytes(0, 1), group.probe_bytes(1), group.receive_bytes(0, 1)] == [b"a", (0, b"c"), b""]
    assert group.probe_bytes(3) is None


def test_a_sent_buffer_may_be_reused_at_once():
    group, buffer, received = SerialGroup(), np.arange(6, dtype=np.int64), np.zeros((2, 3), np.int64)
    group.send(buffer, 0, 5).wait()
    buffer[:] = -1
    group.receive(received, 0, 5)
    assert received.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_groups_of_one_do_not_share_mail():
    group = SerialGroup()
    other = group.split(0, 0)
    group.send_bytes(b"mine", 0)
    assert other.probe_bytes(0) is None and (other.rank, other.size) == (0, 1)


def test_abort_ends_the_process_with_the_code():
    with pytest.raises(SystemExit) as caught:
        SerialGroup().abort(75)
    assert caught.value.code == 75
