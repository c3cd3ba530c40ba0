/* Norms, SiLU and quantisation of rows. Threads share rows. */

#define TINY 1e-35f /* runs below this are zeros in int8: 127 / largest must stay finite */

/* Lane i adds the squares of elements i, i + 16, ... in order. */
static float sum_of_squares(const float *x, int64_t n) {
    vf sum = vf_zero();
    int64_t i = 0;
    for (; i + HPC_LANES <= n; i += HPC_LANES) {
        const vf a = vf_load(x + i);
        sum = vf_fma(a, a, sum);
    }
    if (i < n) {
        const vf a = vf_load_tail(x + i, n - i);
        sum = vf_fma(a, a, sum);
    }
    return vf_sum(sum);
}

/* x * weight / sqrt(mean(x^2) + eps); `out` may be x. */
static void rms_norm_row(const float *x, int64_t n, const float *weight, float eps, float *out) {
    const vf scale = vf_set1(1.0f / sqrtf(sum_of_squares(x, n) / (float)n + eps));
    int64_t i = 0;
    for (; i + HPC_LANES <= n; i += HPC_LANES)
        vf_store(out + i, vf_mul(vf_mul(vf_load(x + i), scale), vf_load(weight + i)));
    if (i < n) {
        const vf a = vf_load_tail(x + i, n - i), w = vf_load_tail(weight + i, n - i);
        vf_store_tail(out + i, vf_mul(vf_mul(a, scale), w), n - i);
    }
}

/* The largest absolute value; NaN are passed over. */
static float largest_magnitude(const float *x, int64_t n) {
    vf largest = vf_zero(), other = vf_zero();
    int64_t i = 0;
    for (; i + 2 * HPC_LANES <= n; i += 2 * HPC_LANES) {
        largest = vf_max(vf_abs(vf_load(x + i)), largest);
        other = vf_max(vf_abs(vf_load(x + i + HPC_LANES)), other);
    }
    largest = vf_max(largest, other);
    for (; i + HPC_LANES <= n; i += HPC_LANES) largest = vf_max(vf_abs(vf_load(x + i)), largest);
    if (i < n) largest = vf_max(vf_abs(vf_load_tail(x + i, n - i)), largest);
    return vf_largest(largest);
}

/* Codes of 16 values, also returned. NaN gets the largest code. */
INLINE vi quantise_lanes(vf values, vf inverse, int is_for_int8, int8_t *codes) {
    const vf scaled = vf_max(vf_min(vf_mul(values, inverse), vf_set1(127.0f)), vf_set1(-127.0f));
    const vi rounded = vi_of_vf(scaled);
    if (is_for_int8) vi_store_codes(codes, rounded);
    else vi_store_s8(codes, rounded);
    return rounded;
}

/* Up to 16 values from p on; zeros where there are none. */
INLINE vf load_up_to(const float *p, int64_t n) {
    return n >= HPC_LANES ? vf_load(p) : n > 0 ? vf_load_tail(p, n) : vf_zero();
}

/* Quantise n values to -127 .. 127, with zeros up to `padded`, and add all codes; also of groups, if not for int8. */
INLINE void quantise_run(
    const float *run, int64_t n, int64_t padded, int is_for_int8, int8_t *codes, float *scale, int32_t *sums
) {
    const float largest = largest_magnitude(run, n);
    const int is_zero = largest < TINY;
    const vf inverse = vf_set1(is_zero ? 0.0f : 127.0f / largest);
    *scale = is_zero ? 0.0f : largest / 127.0f;
    const int64_t bytes = is_for_int8 ? DOT_STEPS : 1;
    vi lanes = vi_set1(0);
    for (int64_t i = 0; i < padded; i += HPC_GROUP) {
        int8_t *place = codes + i * bytes;
        const vi a = quantise_lanes(load_up_to(run + i, n - i), inverse, is_for_int8, place);
        const vf rest = load_up_to(run + i + HPC_LANES, n - i - HPC_LANES);
        const vi b = quantise_lanes(rest, inverse, is_for_int8, place + HPC_LANES * bytes);
        const vi both = vi_add(a, b);
        lanes = vi_add(lanes, both);
        if (!is_for_int8) sums[i / HPC_GROUP] = (int32_t)vf_sum(vf_of_vi(both)); /* exact: small integers */
    }
    int32_t of_lanes[HPC_LANES], total = 0;
    vi_store(of_lanes, lanes);
    for (int i = 0; i < HPC_LANES; i++) total += of_lanes[i];
    sums[padded / HPC_GROUP] = total;
}

/* Quantise run number `place` of [T][grains]. */
static void put_codes(const float *run, hpc_rows *out, int64_t place) {
    int8_t *codes = out->codes + place * out->padded_in * (out->is_for_int8 ? DOT_STEPS : 1);
    int32_t *sums = out->sums + place * (out->padded_in / HPC_GROUP + 1);
    if (out->is_for_int8) quantise_run(run, out->num_in, out->padded_in, 1, codes, out->scales + place, sums);
    else quantise_run(run, out->num_in, out->padded_in, 0, codes, out->scales + place, sums);
}

static void quantise_rows(const float *values, hpc_rows *out, int thread, int threads) {
    const hpc_part part = part_of(out->num_rows * out->grains, thread, threads);
    for (int64_t i = part.first; i < part.last; i++)
        put_codes(values + i * out->num_in, out, i);
}

static void rms_norm_rows(
    const float *x, const int64_t *index, const float *weight, float eps, hpc_rows *out, int thread, int threads
) {
    const int64_t n = out->num_in;
    const hpc_part part = part_of(out->num_rows, thread, threads);
    float buffer[out->values ? 1 : n + 1];
    for (int64_t row = part.first; row < part.last; row++) {
        float *normed = out->values ? out->values + row * out->stride : buffer;
        rms_norm_row(x + (index ? index[row] : row) * n, n, weight, eps, normed);
        if (!out->values) put_codes(normed, out, row);
    }
}

/* gate * sigmoid(gate) * up, with exponentials of negative numbers only. */
INLINE vf silu_mul_lanes(vf gate, vf up) {
    const vf decay = vf_exp(vf_sub(vf_zero(), vf_abs(gate))), one = vf_set1(1.0f);
    const vf value = vf_mul(vf_select(vf_lt(gate, vf_zero()), decay, one), gate);
    return vf_mul(vf_div(value, vf_add(decay, one)), up);
}
