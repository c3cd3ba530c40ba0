"""Where a sampling value comes from: the request, the command line, generation_config.json, or hpcinfer itself."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpcinfer.config import SamplingParams
from hpcinfer.data.fields import integer, number
from hpcinfer.data.model_files import read_json
from hpcinfer.data.request import RowRequest
from hpcinfer.errors import ConfigError, ModelError, RequestError

COMMAND_LINE = "command line"
GENERATION_CONFIG = "generation_config.json"
HPCINFER = "hpcinfer"

_ALWAYS = {"repetition_penalty": ("repetition_penalty", number), "max_new_tokens": ("max_tokens", integer),
           "min_new_tokens": ("min_tokens", integer)}  # fmt: skip
_WHEN_SAMPLING = {"temperature": ("temperature", number), "top_p": ("top_p", number), "top_k": ("top_k", integer),
                  "min_p": ("min_p", number)}  # fmt: skip


@dataclass(frozen=True)
class SamplingDefaults:
    """What rows get that say nothing, and who said it."""

    values: SamplingParams
    origins: dict[str, str]  # field of SamplingParams -> COMMAND_LINE, GENERATION_CONFIG or HPCINFER


def read_generation_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Parse a model's generation_config.json; empty if there is none."""
    return read_json(files, GENERATION_CONFIG)


def resolve_defaults(cli: Mapping[str, Any], generation_config: Mapping[str, Any]) -> SamplingDefaults:
    """Resolve the job's sampling values.

    Args:
        cli: values given explicitly on the command line, by field of SamplingParams.
        generation_config: of the model. Its `do_sample: false` means temperature 0; where `do_sample` is not said, the
            values that are there count.

    Raises:
        ConfigError: a value out of its range.
    """
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    if unknown := sorted(set(cli) - set(names)):
        raise ConfigError(f"unknown sampling value {unknown[0]}", expected=", ".join(names))
    model = _model_values(generation_config)
    said = dict.fromkeys(names, HPCINFER) | dict.fromkeys(model, GENERATION_CONFIG) | dict.fromkeys(cli, COMMAND_LINE)
    values = SamplingParams(**{**model, **cli})
    try:
        values.validate()
    except RequestError as error:
        raise ConfigError(error.found, where=said[error.param]) from None
    return SamplingDefaults(values, said)


def sampling_for(request: RowRequest, defaults: SamplingDefaults) -> SamplingParams:
    """Resolve one request's sampling values: what it says, else the defaults.

    Raises:
        RequestError: a value out of its range, named.
    """
    params = dataclasses.replace(defaults.values, **request.options)
    if "min_tokens" not in request.options:
        params = dataclasses.replace(params, min_tokens=max(0, min(params.min_tokens, params.max_tokens)))
    params.validate()
    return params


def _model_values(config: Mapping[str, Any]) -> dict[str, Any]:
    is_greedy = config.get("do_sample") is False
    known = _ALWAYS if is_greedy else {**_ALWAYS, **_WHEN_SAMPLING}
    values: dict[str, Any] = {"temperature": 0.0} if is_greedy else {}
    for theirs, (ours, check) in known.items():
        if config.get(theirs) is not None:
            try:
                values[ours] = check(theirs, config[theirs])
            except RequestError as error:
                raise ModelError(error.found, where=GENERATION_CONFIG) from None
    return values
