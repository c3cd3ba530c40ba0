import os
import random
import subprocess
import sys

import h5py
import numpy as np
import pytest

from hpcinfer.errors import StoreError
from hpcinfer.weights.reader import Store, is_store
from hpcinfer.weights.schema import param_specs

Q = "layers.1.q_proj.weight"


def contents(path):
    """Everything a store gives, or the error."""
    with Store.open(path) as store:
        arrays = {spec.name: store.read(spec.name).values.tobytes() for spec in param_specs(store.config, store.grains)}
        return store.config, store.grains, store.digest, store.tokenizer_files, arrays


def flip(path, offset, bit=1):
    data = bytearray(path.read_bytes())
    data[offset] ^= bit
    path.write_bytes(data)


def test_only_the_asked_units_are_read(tiny_store):
    with Store.open(tiny_store) as store:
        assert is_store(tiny_store) and store.bytes_read == 0
        whole = store.read(Q)
        assert whole.dtype == store.dtype == "bfloat16" and whole.values.dtype == np.uint16
        before = store.bytes_read
        part = store.read(Q, range(3, 5))
        assert store.bytes_read - before == part.values.nbytes == 2 * 8 * 56 * 2
        np.testing.assert_array_equal(part.values, whole.values[3:5])
        assert store.read(Q, range(0)).values.shape == (0, 8, 56)


def test_units_outside_the_store_are_an_error(tiny_store):
    with Store.open(tiny_store) as store, pytest.raises(IndexError):
        store.read(Q, range(7, 9))


@pytest.mark.parametrize("name", ["index.h5", "layer-0001.h5", "outer.h5"])
def test_flipped_byte_anywhere_is_found_or_harmless(tiny_store, store_copy, name):
    path, expected = store_copy / name, contents(tiny_store)
    whole, choose = path.read_bytes(), random.Random(0)
    offsets = [*range(0, 64, 7), *(choose.randrange(len(whole)) for _ in range(150))]
    found = 0
    for offset in offsets:
        flip(path, offset, 1 << choose.randrange(8))
        try:
            assert contents(store_copy) == expected
        except StoreError as error:
            found += 1
            assert name in str(error)
        path.write_bytes(whole)
    assert found > len(offsets) // 4


def test_flipped_weight_is_named_with_file_dataset_and_chunk(store_copy):
    path = store_copy / "layer-0001.h5"
    with h5py.File(path) as file:
        offset = file["q_proj.weight"].id.get_chunk_info(5).byte_offset
    flip(path, offset + 17)
    with Store.open(store_copy) as store:
        store.read(Q, range(5))
        with pytest.raises(StoreError, match=r"layer-0001\.h5, dataset q_proj\.weight, chunk 5"):
            store.read(Q)
        with pytest.raises(StoreError, match=r"chunk 5"):
            store.verify()


def test_weights_changed_with_h5py_are_found(store_copy):
    with h5py.File(store_copy / "layer-0001.h5", "r+") as file:
        file["q_proj.weight"][2, 0, 0] += 1
    with pytest.raises(StoreError, match="chunk 2"):
        contents(store_copy)


@pytest.mark.parametrize("name", ["index.h5", "layer-0001.h5", "outer.h5"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_file_is_named(store_copy, name, share):
    os.truncate(store_copy / name, int((store_copy / name).stat().st_size * share))
    with pytest.raises(StoreError, match=name):
        contents(store_copy)


def test_file_truncated_while_open_is_named(store_copy):
    with Store.open(store_copy) as store:
        store.read(Q, range(1))
        os.truncate(store_copy / "layer-0001.h5", 1000)
        with pytest.raises(StoreError, match=r"layer-0001\.h5, dataset q_proj\.weight, chunk 0"):
            store.read(Q)


def test_a_store_that_is_read_again_asks_hdf5_no_more(store_copy, monkeypatch):
    with Store.open(store_copy) as store:
        names = [spec.name for spec in param_specs(store.config, store.grains)]
        before = {name: store.read(name).values.tobytes() for name in names}
        store.close()
        monkeypatch.setattr(h5py, "File", None)
        assert {name: store.read(name).values.tobytes() for name in names} == before
        store.close()
        flip(store_copy / "layer-0001.h5", store._files["layer-0001.h5"].places[Q][2])
        with pytest.raises(StoreError, match=r"layer-0001\.h5, dataset q_proj\.weight, chunk 2"):
            store.read(Q)
        store.close()
        (store_copy / "layer-0001.h5").unlink()
        with pytest.raises(StoreError, match=r"layer-0001\.h5 cannot be opened"):
            store.read(Q)


@pytest.mark.parametrize("name", ["index.h5", "layer-0001.h5", "outer.h5"])
def test_missing_file_is_named(store_copy, name):
    (store_copy / name).unlink()
    with pytest.raises(StoreError, match=f"no {name}"):
        contents(store_copy)


def test_file_of_another_layer_is_found(store_copy):
    (store_copy / "layer-0000.h5").replace(store_copy / "layer-0001.h5")
    with Store.open(store_copy) as store, pytest.raises(StoreError, match=r"layer-0001\.h5"):
        store.read(Q)


def replace_dataset(path, name, **create):
    with h5py.File(path, "r+") as file:
        del file[name]
        if create:
            file.create_dataset(name, **create)


@pytest.mark.parametrize(
    "create",
    [
        {},
        {"data": np.zeros((8, 8, 57), "<u2"), "chunks": (1, 8, 57)},
        {"data": np.zeros((8, 8, 56), "<f4"), "chunks": (1, 8, 56)},
        {"data": np.zeros((8, 8, 56), "<u2"), "chunks": (2, 8, 56)},
        {"data": np.zeros((8, 8, 56), "<u2")},
        {"data": np.zeros((8, 8, 56), "<u2"), "chunks": (1, 8, 56), "compression": "gzip"},
        {"shape": (8, 8, 56), "dtype": "<u2", "chunks": (1, 8, 56)},
    ],
)
def test_dataset_that_is_missing_or_of_another_kind_is_named(store_copy, create):
    replace_dataset(store_copy / "layer-0001.h5", "q_proj.weight", **create)
    with Store.open(store_copy) as store, pytest.raises(StoreError, match=r"layer-0001\.h5, dataset q_proj\.weight"):
        store.read(Q)


def test_other_format_version_is_refused(store_copy):
    with h5py.File(store_copy / "index.h5", "r+") as file:
        file.attrs["format_version"] = 2
    with pytest.raises(StoreError, match="format version 2\n  expected: version 1"):
        Store.open(store_copy)


def test_other_hdf5_file_and_no_hdf5_file_are_refused(store_copy):
    index = store_copy / "index.h5"
    with h5py.File(index, "w") as file:
        file["x"] = 1
    with pytest.raises(StoreError, match="another kind"):
        Store.open(store_copy)
    index.write_text("hello")
    with pytest.raises(StoreError, match=r"index\.h5"):
        Store.open(store_copy)


def test_changed_config_in_the_index_is_found(store_copy):
    with h5py.File(store_copy / "index.h5", "r+") as file:
        text = bytes(file["config"][()]).replace(b'"rope_theta": 10000.0', b'"rope_theta": 20000.0')
        file["config"][:] = np.frombuffer(text, np.uint8)
    with pytest.raises(StoreError, match="digest"):
        Store.open(store_copy)


def test_reading_needs_neither_mpi_nor_torch(tiny_store):
    code = (
        "import sys; from pathlib import Path; from hpcinfer.weights.reader import Store;"
        "Store.open(Path(sys.argv[1])).verify(); assert not {'torch', 'mpi4py'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_store)], check=True)
