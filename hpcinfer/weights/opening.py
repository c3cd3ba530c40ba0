"""Opening a store on many ranks: one reads the index, a few ask HDF5 where the chunks stand, and tell the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hpcinfer.agree import on_all, on_root
from hpcinfer.weights.reader import Store
from hpcinfer.weights.store_index import pack_index, read_index, unpack_index

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_FILES_PER_RANK = 16  # that a rank asks for the places of their chunks, as long as there are ranks


def open_store(path: Path, group: Collectives, stage: str | None = None) -> Store:
    """Open a store whose metadata leaves the file system once.

    Collective over `group`.

    Args:
        path: of the store.
        group: ranks that read it.
        stage: see `Store.open`.

    Raises:
        StoreError: no store, a missing file, or one whose metadata is damaged.
    """
    if group.size == 1:
        return on_all(group, lambda: Store.open(path, stage))
    store = Store(path, unpack_index(on_root(group, lambda: pack_index(read_index(path)))), stage)
    share_places(store, group)
    return store


def share_places(store: Store, group: Collectives) -> None:
    """Let every rank know where the chunks of all files stand.

    Collective over `group`.
    """
    names = store.file_names
    num_asking = min(group.size, -(-len(names) // _FILES_PER_RANK))
    mine = names[group.rank :: num_asking] if group.rank < num_asking else []
    found = on_all(group, lambda: json.dumps({name: store.places(name) for name in mine}).encode())
    for told in group.all_gather_bytes(found):
        for name, places in json.loads(told).items():
            store.learn(name, places)
