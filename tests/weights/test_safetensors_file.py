import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hpcinfer.errors import ModelError
from hpcinfer.weights.safetensors_file import SafetensorsFile

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_bytes_that_were_saved(path, dtype):
    tensor = torch.randn(7, 3, 2).to(DTYPES[dtype])
    save_file({"other": torch.zeros(5), "a": tensor, "empty": torch.zeros(0, 2)}, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.dtype("a") == dtype and file.entries["a"].shape == (7, 3, 2)
    expected = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert file.read("a").tobytes() == expected
    assert file.read("a", range(2, 5)).tobytes() == expected[2 * len(expected) // 7 : 5 * len(expected) // 7]
    assert file.read("empty").shape == (0, 2)
    file.close()


def test_other_types_are_refused_by_name(path):
    save_file({"a": torch.zeros(3, dtype=torch.int8)}, path)
    file = SafetensorsFile(path)
    with pytest.raises(ModelError, match="tensor a has the type I8"):
        file.read("a")
    file.close()


def test_file_cut_anywhere_is_refused(path):
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            SafetensorsFile(path)


def header(**entry):
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "data",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        (10).to_bytes(8, "little") + b"not json!!" + bytes(20),
        (2).to_bytes(8, "little") + b"[]" + bytes(20),
        header(data_offsets=[0, 4]),
        header(data_offsets=[-4, 4]),
        header(data_offsets=[4, 12]),
        header(shape=[3]),
        header(shape="x"),
    ],
)
def test_corrupt_header_is_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        SafetensorsFile(path)


def test_missing_file_is_a_model_error(path):
    with pytest.raises(ModelError, match="No such file"):
        SafetensorsFile(path)


def test_read_returns_memory_of_its_own(path):
    save_file({"a": torch.ones(2)}, path)
    file = SafetensorsFile(path)
    file.read("a")[:] = 0
    np.testing.assert_array_equal(file.read("a"), [1, 1])
    file.close()
