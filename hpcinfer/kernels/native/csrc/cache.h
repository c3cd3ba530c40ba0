/* The KV cache: rotary embedding and writing; reading panels of 16 slots back as float32. See cache_layout.h.
 *
 * What the cache's precision cannot hold is stored as its largest finite value, and NaN as 0. int8 has a scale per
 * slot and KV head: largest |x| / 127, code = round(x * (127 / largest)). */
#include "cache_layout.h"

#define LARGEST_FLOAT32 3.40282347e38f
#define LARGEST_BFLOAT16 3.38953139e38f
#define LARGEST_FLOAT16 65504.0f
#define LARGEST_INT8 3.4e38f /* 127 * (largest / 127) must stay finite, however it is rounded */

/* x within -limit .. limit; NaN is 0. */
INLINE vf vf_finite(vf x, float limit) {
    vm is_number = vf_lt(vf_set1(-1), vf_abs(x));
    return vf_select(is_number, vf_max(vf_min(x, vf_set1(limit)), vf_set1(-limit)), vf_zero());
}

/* The upper 32 - n bits of `bits`, rounded to nearest even. */
#define ROUND_BITS(bits, n) \
    vi_shr(vi_add(vi_add(bits, vi_set1((1 << ((n) - 1)) - 1)), vi_and(vi_shr(bits, n), vi_set1(1))), n)

INLINE vi bfloat16_bits(vf x) {
    vi bits = vi_bits(vf_finite(x, LARGEST_BFLOAT16));
    return ROUND_BITS(bits, 16);
}

INLINE vi float16_bits(vf x) {
    x = vf_finite(x, LARGEST_FLOAT16);
    vf size = vf_abs(x);
    vi sign = vi_and(vi_shr(vi_bits(x), 16), vi_set1(0x8000));
    vi normal = vi_add(ROUND_BITS(vi_bits(size), 13), vi_set1(-(112 << 10)));
    vi subnormal = vi_add(vi_bits(vf_add(size, vf_set1(0.5f))), vi_set1(-0x3f000000)); /* in units of 2 ** -24 */
    vm is_subnormal = vf_lt(size, vf_set1(6.103515625e-5f));
    return vi_add(vi_bits(vf_select(is_subnormal, vf_bits(subnormal), vf_bits(normal))), sign);
}

INLINE vf load_float16(const uint16_t *p) {
    vi bits = vi_bits(vf_load_bf16(p)); /* shifted left by 16 */
    vi size = vi_shr(vi_and(bits, vi_set1(0x7fff0000)), 3);
    vf value = vf_mul(vf_bits(size), vf_set1(5.192296858534828e33f)); /* 2 ** 112: the difference of the biases */
    return vf_bits(vi_add(vi_bits(value), vi_and(bits, vi_set1(INT32_MIN))));
}

INLINE vi encode(int64_t dtype, vf x, float inverse) {
    switch (dtype) {
        case HPC_BFLOAT16: return bfloat16_bits(x);
        case HPC_FLOAT16: return float16_bits(x);
        case HPC_INT8: return vi_of_vf(vf_mul(vf_finite(x, LARGEST_INT8), vf_set1(inverse)));
        default: return vi_bits(vf_finite(x, LARGEST_FLOAT32));
    }
}

/* 16 elements from element `first` on, before any scale. */
INLINE vf decode(int64_t dtype, const char *base, int64_t first) {
    switch (dtype) {
        case HPC_BFLOAT16: return vf_load_bf16((const uint16_t *)base + first);
        case HPC_FLOAT16: return load_float16((const uint16_t *)base + first);
        case HPC_INT8: return vf_load_s8((const int8_t *)base + first);
        default: return vf_load((const float *)base + first);
    }
}

static float largest_finite(const float *row, int64_t n) {
    vf largest = vf_zero();
    for (int64_t i = 0; i < n; i += HPC_LANES)
        largest = vf_max(largest, vf_abs(vf_finite(load_up_to(row + i, n - i), LARGEST_INT8)));
    return vf_largest(largest);
}

/* Codes to every stride-th element from `first` on. */
static void scatter(char *base, int64_t bytes, int64_t first, int64_t stride, const int32_t *codes, int64_t n) {
    if (bytes == 4)
        for (int64_t i = 0; i < n; i++) ((int32_t *)base)[first + i * stride] = codes[i];
    else if (bytes == 2)
        for (int64_t i = 0; i < n; i++) ((uint16_t *)base)[first + i * stride] = (uint16_t)codes[i];
    else
        for (int64_t i = 0; i < n; i++) ((int8_t *)base)[first + i * stride] = (int8_t)codes[i];
}

/* One row of K or V of one head into its slot. */
static void store_row(
    const hpc_cache *cache, const float *row, char *base, int64_t first, int64_t stride, float *scale
) {
    const int64_t head_size = cache->head_size, bytes = element_bytes(cache->dtype);
    float inverse = 0;
    if (scale) {
        const float largest = largest_finite(row, head_size);
        *scale = largest / 127;
        inverse = largest < TINY ? 0 : 127 / largest;
    }
    for (int64_t i = 0; i < head_size; i += HPC_LANES) {
        int32_t codes[HPC_LANES];
        const int64_t n = head_size - i < HPC_LANES ? head_size - i : HPC_LANES;
        vi_store(codes, encode(cache->dtype, load_up_to(row + i, n), inverse));
        scatter(base, bytes, first + i * stride, stride, codes, n);
    }
}

static void store_slot(const hpc_cache *cache, int64_t slot, int64_t head, const float *key, const float *value) {
    const int64_t panel = panel_of(cache, slot, head), lane = slot % HPC_LANES, place = panel * HPC_LANES + lane;
    const int64_t padded = padded_lanes(cache->head_size);
    float *key_scale = cache->key_scales ? cache->key_scales + place : NULL;
    float *value_scale = cache->value_scales ? cache->value_scales + place : NULL;
    store_row(cache, key, cache->keys, panel * cache->head_size * HPC_LANES + lane, HPC_LANES, key_scale);
    store_row(cache, value, cache->values, place * padded, 1, value_scale);
}

/* Rotates the pairs (i, i + half) of one head in place. */
static void rotate(float *head, int64_t half, const float *cosines, const float *sines) {
    for (int64_t i = 0; i < half; i += HPC_LANES) {
        const int64_t n = half - i < HPC_LANES ? half - i : HPC_LANES;
        vf first = vf_load_tail(head + i, n), second = vf_load_tail(head + half + i, n);
        vf cosine = vf_load_tail(cosines + i, n), sine = vf_load_tail(sines + i, n);
        vf_store_tail(head + i, vf_sub(vf_mul(first, cosine), vf_mul(second, sine)), n);
        vf_store_tail(head + half + i, vf_add(vf_mul(second, cosine), vf_mul(first, sine)), n);
    }
}

static void norm_and_rotate(const hpc_attention_layer *layer, float *head, const float *norm, const float *rope) {
    const int64_t half = layer->head_size / 2;
    if (norm) rms_norm_row(head, layer->head_size, norm, (float)layer->eps, head);
    rotate(head, half, rope, rope + half);
}

/* Asks memory for the slot of a token, in all KV heads: the rows of a key are far apart. */
static void ask_for_slot(const hpc_cache *cache, int64_t slot) {
    const int64_t bytes = element_bytes(cache->dtype), padded = padded_lanes(cache->head_size);
    for (int64_t head = 0; head < cache->num_kv_heads; head++) {
        const int64_t panel = panel_of(cache, slot, head), place = panel * HPC_LANES + slot % HPC_LANES;
        const char *keys = cache->keys + panel * cache->head_size * HPC_LANES * bytes;
        const char *values = cache->values + place * padded * bytes;
        for (int64_t i = 0; i < cache->head_size * HPC_LANES * bytes; i += CACHE_LINE) __builtin_prefetch(keys + i, 1);
        for (int64_t i = 0; i < padded * bytes; i += CACHE_LINE) __builtin_prefetch(values + i, 1);
    }
}

/* Norms and rotates q (in place) and k of each token, and writes k and v into the token's slot. */
static void rotate_and_store(
    const hpc_attention_layer *layer, const hpc_step *step, hpc_cache *cache, float *qkv, int thread, int threads
) {
    const int64_t head_size = layer->head_size, num_kv_heads = layer->num_kv_heads;
    const hpc_part part = part_of(step->num_tokens, thread, threads);
    for (int64_t token = part.first; token < part.last; token++) {
        const int64_t *next = step->slots + token + 1;
        if (token + 1 < part.last && next[0] != next[-1] + 1) ask_for_slot(cache, next[0]);
        float *q = qkv + token * layer->qkv->num_out, *k = q + layer->grains * layer->grain_columns;
        const float *v = k + num_kv_heads * head_size, *rope = layer->rope + step->positions[token] * head_size;
        for (int64_t head = 0; head < layer->num_heads; head++)
            norm_and_rotate(layer, q + layer->head_columns[head], layer->q_norm, rope);
        for (int64_t head = 0; head < num_kv_heads; head++, k += head_size, v += head_size) {
            norm_and_rotate(layer, k, layer->k_norm, rope);
            store_slot(cache, step->slots[token], head, k, v);
        }
    }
}

/* One panel of one head as it is stored. */
typedef struct {
    const char *keys, *values;              /* [H][16], [16][padded H] */
    const float *key_scales, *value_scales; /* [16], int8 only */
} stored_panel;

static stored_panel find_panel(const hpc_cache *cache, int64_t panel) {
    const int64_t row = HPC_LANES * element_bytes(cache->dtype), place = panel * HPC_LANES;
    return (stored_panel){
        cache->keys + panel * cache->head_size * row, cache->values + panel * padded_lanes(cache->head_size) * row,
        cache->key_scales ? cache->key_scales + place : NULL, cache->value_scales ? cache->value_scales + place : NULL
    };
}

/* 16 elements from element `first` on; only int8 has scales. */
INLINE vf read_back(int64_t dtype, const char *base, int64_t first, vf scale) {
    vf codes = decode(dtype, base, first);
    return dtype == HPC_INT8 ? vf_mul(codes, scale) : codes;
}

INLINE void decode_keys(int64_t dtype, const stored_panel *panel, int64_t head_size, float *out) {
    vf scale = dtype == HPC_INT8 ? vf_load(panel->key_scales) : vf_zero();
    for (int64_t i = 0; i < head_size * HPC_LANES; i += HPC_LANES)
        vf_store(out + i, read_back(dtype, panel->keys, i, scale));
}

INLINE void decode_values(int64_t dtype, const stored_panel *panel, int64_t padded, float *out) {
    for (int64_t lane = 0; lane < HPC_LANES; lane++) {
        vf scale = dtype == HPC_INT8 ? vf_set1(panel->value_scales[lane]) : vf_zero();
        for (int64_t i = lane * padded; i < (lane + 1) * padded; i += HPC_LANES)
            vf_store(out + i, read_back(dtype, panel->values, i, scale));
    }
}

#define DECODE_PANEL(dtype) \
    case dtype: \
        decode_keys(dtype, panel, cache->head_size, keys); \
        decode_values(dtype, panel, padded_lanes(cache->head_size), values); \
        break;

/* A panel in float32: in place, or decoded into `keys` and `values`. */
static stored_panel float32_panel(const hpc_cache *cache, const stored_panel *panel, float *keys, float *values) {
    switch (cache->dtype) {
        DECODE_PANEL(HPC_BFLOAT16)
        DECODE_PANEL(HPC_FLOAT16)
        DECODE_PANEL(HPC_INT8)
        default: return *panel;
    }
    return (stored_panel){(const char *)keys, (const char *)values, NULL, NULL};
}
