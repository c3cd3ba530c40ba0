from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.config import ModelConfig
from hpcinfer.weights.layout import layout
from hpcinfer.weights.schema import param_specs, source_name, unit_ranges

CONFIGS = st.builds(
    lambda group, kv, head, hidden, mlp, vocab, layers, flags: ModelConfig(
        "LlamaForCausalLM", hidden, layers, group * kv, kv, head, mlp, vocab, 64, 1e-5, 1e4,
        tie_word_embeddings=flags[0], qkv_bias=flags[1], o_bias=flags[2], mlp_bias=flags[3], qk_norm=flags[4],
    ),
    st.integers(1, 7), st.integers(1, 5), st.sampled_from([2, 8, 16]), st.integers(1, 100), st.integers(1, 500),
    st.integers(1, 700), st.integers(1, 3), st.tuples(*[st.booleans()] * 5),
)  # fmt: skip
GRAINS = st.sampled_from([1, 2, 4, 8, 16])


@given(CONFIGS, GRAINS)
def test_units_cover_every_split_dimension_once_and_fit(config, grains):
    for spec in param_specs(config, grains):
        cut = layout(spec, config, grains)
        assert spec.shape[0] == len(cut.ranges)
        if cut.split_dim < 0:
            assert spec.shape == (1, *cut.full_shape)
            continue
        covered = [index for held in cut.ranges for index in held]
        assert covered == list(range(cut.full_shape[cut.split_dim]))
        assert max(len(held) for held in cut.ranges) <= spec.shape[1 + cut.split_dim]


@given(CONFIGS, GRAINS)
def test_names_are_unique_and_the_head_is_there_unless_tied(config, grains):
    names = [spec.name for spec in param_specs(config, grains)]
    assert len(set(names)) == len({source_name(name) for name in names}) == len(names)
    assert ("lm_head.weight" in names) != config.tie_word_embeddings


def test_query_heads_of_a_grain_are_uneven_where_they_must_be():
    config = ModelConfig("Qwen2ForCausalLM", 56, 1, 14, 2, 4, 100, 390, 64, 1e-5, 1e4)
    assert [len(held) // 4 for held in unit_ranges(config, "query_heads", 8)] == [2, 2, 2, 2, 2, 2, 1, 1]
    shapes = {spec.name: spec.shape for spec in param_specs(config, 8)}
    assert shapes["layers.0.q_proj.weight"] == (8, 8, 56)
    assert shapes["layers.0.o_proj.weight"] == (8, 56, 8)
    assert shapes["layers.0.down_proj.weight"] == (8, 56, 64)
    assert shapes["embed_tokens.weight"] == (8, 64, 56)
