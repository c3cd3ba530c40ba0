"""What a workload needs at least, counted: operations of linear layers and bytes of weights. Attention is left out."""

from typing import Any, NamedTuple

from workload import Workload

from hpcinfer.dtypes import GROUP

_WEIGHT_BYTES = {"f32": 4.0, "int8": 1.0, "int4": 0.5 + 2 / GROUP}  # int4 with a scale of two bytes for each group
_SCALE_BYTES = {"f32": 0, "int8": 4, "int4": 0}  # for each output of a linear layer
PEAK_OF = {"f32": "f32", "int8": "int8", "int4": "int8"}  # arithmetic that bounds products with such weights


class LinearSize(NamedTuple):
    """Sizes of the linear layers of a model."""

    weights: int  # of all decoder layers
    outputs: int
    head_weights: int
    head_outputs: int

    def operations(self, workload: Workload) -> int:
        """Operations (a multiplication or an addition each) of a workload, a shared prefix counted once.

        Every token passes the layers but the last one of each output; the head is needed for output tokens alone."""
        repeated = workload.prefix_tokens * (len(workload.prompts) - 1)
        tokens = workload.prompt_tokens - repeated + workload.all_output_tokens - len(workload.prompts)
        return 2 * (tokens * self.weights + workload.all_output_tokens * self.head_weights)

    def bytes_per_token(self, precision: str) -> float:
        """Bytes of weights that one token of one sequence reads."""
        weights, outputs = self.weights + self.head_weights, self.outputs + self.head_outputs
        return weights * _WEIGHT_BYTES[precision] + outputs * _SCALE_BYTES[precision]


def linear_size(config: dict[str, Any]) -> LinearSize:
    """Read the sizes of a dense decoder from its config.json."""
    hidden, mlp, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    num_heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or hidden // num_heads
    heads, kv_heads = num_heads * head_size, config["num_key_value_heads"] * head_size
    weights = 2 * hidden * heads + 2 * hidden * kv_heads + 3 * hidden * mlp
    outputs = heads + 2 * kv_heads + 2 * mlp + 2 * hidden
    vocabulary = config["vocab_size"]
    return LinearSize(layers * weights, layers * outputs, vocabulary * hidden, vocabulary)
