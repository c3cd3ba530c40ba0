"""Where the ranks of a group share nodes: a channel on each."""

from hpcinfer.comm.node.channel import NodeChannel
from hpcinfer.comm.protocol import Collectives
from hpcinfer.partition.topology import by_node


def open_channel(group: Collectives, room_bytes: int = 0) -> NodeChannel | None:
    """Open shared memory among the ranks of each node, if any has several.

    Collective over the group.

    Returns:
        None on every rank, if locations are unknown, no two ranks share a node, or some cannot share memory.
    """
    where = group.locations
    if where is None or len(by_node(where)) == group.size:
        return None
    here = [rank for rank in range(group.size) if where[rank].node == where[group.rank].node]
    return NodeChannel.open(group, here, room_bytes)
