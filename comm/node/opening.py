"""Where the ranks of a group share nodes: a channel on each."""

from hpcinfer.comm.node.channel import SLOT_BYTES, NodeChannel
from hpcinfer.comm.protocol import Collectives
from hpcinfer.partition.topology import by_node

_LITTLE_BYTES = 1 << 16


def open_channel(
    group: Collectives, room_bytes: int = 0, *, is_for_messages: bool = False
) -> NodeChannel | None:
    """Open shared memory among the ranks of each node, if any has several.

    Collective over the group.

    Args:
        group: all ranks call this.
        room_bytes: of each of the two rooms of a rank.
        is_for_messages: little memory for collectives.

    Returns:
        None on every rank, if locations are unknown, no two ranks share a node, or some cannot share memory.
    """
    where = group.locations
    if where is None or len(by_node(where)) == group.size:
        return None
    here = [rank for rank in range(group.size) if where[rank].node == where[group.rank].node]
    return NodeChannel.open(group, here, room_bytes, slot_bytes=_LITTLE_BYTES if is_for_messages else SLOT_BYTES)
