"""The request beats the command line, which beats generation_config.json, which beats hpcinfer."""

import dataclasses

import pytest

from hpcinfer.config import SamplingParams
from hpcinfer.data.request import RowRequest
from hpcinfer.data.sampling_defaults import read_generation_config, resolve_defaults, sampling_for
from hpcinfer.errors import ConfigError, ModelError, RequestError


def request(**options: object) -> RowRequest:
    return RowRequest(0, "completions", "simple", prompt="p", options=options)


def test_order_of_origins() -> None:
    config = {"do_sample": True, "top_p": 0.9, "temperature": 0.6, "max_new_tokens": 7}
    defaults = resolve_defaults({"top_p": 0.5}, config)
    assert (defaults.values.top_p, defaults.origins["top_p"]) == (0.5, "command line")
    assert (defaults.values.temperature, defaults.origins["temperature"]) == (0.6, "generation_config.json")
    assert (defaults.values.max_tokens, defaults.origins["max_tokens"]) == (7, "generation_config.json")
    assert (defaults.values.n, defaults.origins["n"]) == (1, "hpcinfer")
    params = sampling_for(request(top_p=0.7), defaults)
    assert (params.top_p, params.temperature) == (0.7, 0.6)


def test_every_value_has_an_origin() -> None:
    defaults = resolve_defaults({}, {})
    assert defaults.values == SamplingParams()
    assert list(defaults.origins) == [field.name for field in dataclasses.fields(SamplingParams)]
    assert set(defaults.origins.values()) == {"hpcinfer"}


def test_no_sampling_means_greedy() -> None:
    config = {"do_sample": False, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1, "eos_token_id": [1, 2]}
    defaults = resolve_defaults({}, config)
    assert defaults.values == SamplingParams(temperature=0.0, repetition_penalty=1.1)
    assert defaults.origins["temperature"] == "generation_config.json"
    assert resolve_defaults({"temperature": 0.3}, config).values.temperature == 0.3


def test_values_count_where_do_sample_is_not_said() -> None:
    assert resolve_defaults({}, {"temperature": 0.6, "top_k": None}).values == SamplingParams(temperature=0.6)


def test_default_min_tokens_yields_to_a_smaller_request() -> None:
    defaults = resolve_defaults({"min_tokens": 50}, {})
    assert sampling_for(request(max_tokens=8), defaults).min_tokens == 8
    assert sampling_for(request(max_tokens=0, echo=True), defaults).min_tokens == 0
    with pytest.raises(RequestError, match="min_tokens=9"):
        sampling_for(request(max_tokens=8, min_tokens=9), defaults)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -2), ("min_p", 2.0), ("repetition_penalty", 0.0),
     ("presence_penalty", 3.0), ("frequency_penalty", -3.0), ("max_tokens", 0), ("max_tokens", -1), ("min_tokens", -1),
     ("n", 0), ("n", 1000), ("logprobs", 21), ("logprobs", -1)],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(RequestError) as caught:
        sampling_for(request(**{name: value}), resolve_defaults({}, {}))
    assert (caught.value.code, caught.value.param) == ("invalid_value", name)
    with pytest.raises(ConfigError, match=name):
        resolve_defaults({name: value}, {})


def test_wrong_job_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="temprature"):
        resolve_defaults({"temprature": 1.0}, {})
    with pytest.raises(ModelError, match="temperature"):
        resolve_defaults({}, {"temperature": "hot"})
    with pytest.raises(ConfigError, match="generation_config.json"):
        resolve_defaults({}, {"top_p": 7})


def test_generation_config_is_read_or_named() -> None:
    assert read_generation_config({}) == {}
    assert read_generation_config({"generation_config.json": b'{"top_k": 3}'}) == {"top_k": 3}
    for content in (b"{", b"[]", b"\xff"):
        with pytest.raises(ModelError, match="generation_config.json"):
            read_generation_config({"generation_config.json": content})
