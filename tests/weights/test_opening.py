"""One rank reads the index, few ask HDF5 where the chunks stand, and all read the same weights."""

from pathlib import Path
from typing import Any

import pytest
from thread_group import run_ranks

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.errors import PeerError, StoreError
from hpcinfer.weights import opening, reader
from hpcinfer.weights.opening import open_store
from hpcinfer.weights.reader import Store
from hpcinfer.weights.store_index import pack_index, read_index, unpack_index


def contents(store: Store) -> dict[str, bytes]:
    return {name: store.read(name).values.tobytes() for name in store.parameters}


def test_a_packed_index_is_the_index(tiny_store: Path) -> None:
    index = read_index(tiny_store)
    assert unpack_index(pack_index(index)) == index and index.tokenizer_files


def test_all_ranks_read_what_one_reads(tiny_store: Path) -> None:
    expected = contents(Store.open(tiny_store))
    stores = run_ranks(3, lambda group: open_store(tiny_store, group))
    assert [contents(store) for store in [*stores, open_store(tiny_store, SerialGroup())]] == [expected] * 4
    assert {store.digest for store in stores} == {Store.open(tiny_store).digest}


@pytest.mark.parametrize("files_per_rank", [16, 2, 1])
def test_hdf5_is_asked_once_for_each_file(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch, files_per_rank: int
) -> None:
    asked, find = list[str](), reader.find_places

    def note(path: Path, datasets: Any) -> Any:
        asked.append(path.name)
        return find(path, datasets)

    monkeypatch.setattr(reader, "find_places", note)
    monkeypatch.setattr(opening, "_FILES_PER_RANK", files_per_rank)
    run_ranks(4, lambda group: contents(open_store(tiny_store, group)))
    assert sorted(asked) == sorted(Store.open(tiny_store).file_names)


@pytest.mark.parametrize("name", ["index.h5", "layer-0001.h5"])
def test_a_missing_file_fails_on_all_ranks(store_copy: Path, name: str) -> None:
    (store_copy / name).unlink()
    errors = run_ranks(3, lambda group: open_store(store_copy, group))
    assert [type(error) for error in errors] == [StoreError, PeerError, PeerError]
    assert f"no {name}" in str(errors[2])
