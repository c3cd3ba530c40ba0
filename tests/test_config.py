import dataclasses
import json
import math

import pytest

from hpcinfer.config import ModelConfig, RopeScaling, SamplingParams
from hpcinfer.errors import RequestError

MODEL = ModelConfig(
    "Qwen2ForCausalLM", 896, 3, 14, 2, 64, 4864, 151936, 32768, 1e-6, 1e6,
    rope_scaling=RopeScaling("llama3", 8.0, original_max_position_embeddings=8192), tie_word_embeddings=True,
    qkv_bias=True, windows=(0, 12, 0), bos_token_id=None, eos_token_ids=(7, 9),
)  # fmt: skip
NAN, INF = math.nan, math.inf

RIGHT = [
    {}, {"temperature": 0.0}, {"temperature": 1e300}, {"top_p": 1e-9}, {"top_k": -1}, {"min_p": 1.0},
    {"seed": -(2**63)},
    {"repetition_penalty": 1e-9}, {"presence_penalty": -2.0}, {"frequency_penalty": 2.0}, {"n": 128}, {"logprobs": 20},
    {"max_tokens": 0, "echo": True}, {"max_tokens": 4, "min_tokens": 4}, {"logit_bias": ((0, -100.0), (9, 100.0))},
    {"stop": (" ",)}, {"stop_token_ids": (0,)},
]  # fmt: skip
WRONG = {
    "temperature": [-0.1, NAN, INF, -INF], "top_p": [0.0, -0.5, 1.0001, NAN], "top_k": [-2], "min_p": [-0.1, 1.1, NAN],
    "repetition_penalty": [0.0, -1.0, NAN, INF], "presence_penalty": [-2.1, 2.1, NAN],
    "frequency_penalty": [-2.1, INF, NAN],
    "logit_bias": [((-1, 1.0),), ((1, NAN),), ((1, INF),), ((1, 0.0), (2, -101.0))], "max_tokens": [0, -1],
    "min_tokens": [-1, 257], "stop": [("",), ("a", "")], "stop_token_ids": [(3, -1)], "n": [0, -1, 129],
    "logprobs": [-1, 21], "seed": [2**63, -(2**63) - 1],
}  # fmt: skip


@pytest.mark.parametrize("values", RIGHT)
def test_ranges_include_their_ends(values):
    SamplingParams(**values).validate()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value}).validate()
    error = caught.value
    assert (error.param, error.code) == (name, "invalid_value")
    assert error.found.startswith(f"{name}={value!r}: expected ")


def test_every_value_but_switches_has_a_range():
    switches = {"ignore_eos", "echo"}
    assert set(WRONG) == {field.name for field in dataclasses.fields(SamplingParams)} - switches


def test_min_tokens_stay_below_max_tokens():
    with pytest.raises(RequestError, match="min_tokens=5"):
        SamplingParams(max_tokens=4, min_tokens=5).validate()


def test_no_output_is_for_scoring_only():
    with pytest.raises(RequestError, match="max_tokens=0: expected at least 1"):
        SamplingParams(max_tokens=0).validate()
    assert SamplingParams(echo=True, logprobs=0).scores_prompt
    assert not SamplingParams(echo=True).scores_prompt and not SamplingParams(logprobs=3).scores_prompt
    assert SamplingParams(temperature=0).is_greedy and not SamplingParams(temperature=1e-9).is_greedy


def test_unknown_values_are_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)
    with pytest.raises(TypeError, match="layers"):
        ModelConfig.from_dict({**MODEL.to_dict(), "layers": 3})


def test_model_survives_json():
    again = ModelConfig.from_dict(json.loads(json.dumps(MODEL.to_dict())))
    assert again == MODEL and hash(again) == hash(MODEL)


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODEL.num_layers = 4  # type: ignore[misc]
