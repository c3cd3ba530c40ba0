import argparse
import logging

import pytest

from hpcinfer import convert, inspect
from hpcinfer.errors import ConfigError, StoreError


@pytest.fixture(autouse=True)
def plain_logging():
    yield
    logger = logging.getLogger("hpcinfer")
    logger.handlers.clear()
    logger.propagate = True


def call(module, *argv):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.command(parser.parse_args([str(arg) for arg in argv]))


def test_convert_then_inspect_show_the_same_digest(tiny_model, tmp_path, capsys):
    assert call(convert, tiny_model, tmp_path / "store", "--grains", 4) == 0
    digest = capsys.readouterr().out.split()[-1]
    assert call(inspect, tmp_path / "store", "--verify") == 0
    shown = capsys.readouterr().out
    expected = ["Qwen2ForCausalLM", "14 query, 2 KV", "bfloat16", "tensor-parallel sizes 1 to 4", "layer-0001.h5"]
    for text in (digest, *expected, "all checksums agree"):
        assert text in shown


def test_convert_says_what_weights_became(tiny_model, tmp_path, capsys):
    assert call(convert, tiny_model, tmp_path / "store", "--quantize", "fp8") == 0
    assert "8 grains, fp8, digest" in capsys.readouterr().out
    assert call(inspect, tmp_path / "store") == 0
    shown = capsys.readouterr().out
    assert "bfloat16, float32, float8_e4m3, int8" in shown and "quantised to fp8" in shown


def test_inspect_tells_what_is_missing(store_copy, capsys):
    (store_copy / "layer-0001.h5").unlink()
    call(inspect, store_copy)
    assert "MISSING" in capsys.readouterr().out
    with pytest.raises(StoreError, match=r"layer-0001\.h5"):
        call(inspect, store_copy, "--verify")


def test_inspect_refuses_what_is_neither_store_nor_job(tmp_path):
    with pytest.raises(ConfigError, match="neither a store nor a job"):
        call(inspect, tmp_path)
