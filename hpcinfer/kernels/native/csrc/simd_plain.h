/* 16 lanes in arrays, for any machine: correct, not fast. See simd.h for what every file of this kind defines. */
#include <math.h>
#include <string.h>

#define TILE_ROWS 2
#define TILE_ROWS_INT8 2
#define TILE_ROWS_INT4 1
#define TILE_VECS 1
#define FLOAT32_BLOCK_BYTES (256 * 1024)

typedef struct { float at[16]; } vf;
typedef struct { int32_t at[16]; } vi;
typedef struct { int32_t at[16]; } vm; /* 0 or 1 */

#define EACH_LANE(type, value) \
    type result; \
    for (int i = 0; i < 16; i++) result.at[i] = value; \
    return result;

INLINE vf vf_set1(float x) { EACH_LANE(vf, x) }
INLINE vf vf_zero(void) { EACH_LANE(vf, 0.0f) }
INLINE vf vf_load(const float *p) { EACH_LANE(vf, p[i]) }
INLINE void vf_store(float *p, vf a) { memcpy(p, a.at, sizeof a.at); }
INLINE vf vf_load_tail(const float *p, int64_t n) { EACH_LANE(vf, i < n ? p[i] : 0.0f) }
INLINE void vf_store_tail(float *p, vf a, int64_t n) { memcpy(p, a.at, (size_t)n * sizeof *p); }
INLINE vf vf_add(vf a, vf b) { EACH_LANE(vf, a.at[i] + b.at[i]) }
INLINE vf vf_sub(vf a, vf b) { EACH_LANE(vf, a.at[i] - b.at[i]) }
INLINE vf vf_mul(vf a, vf b) { EACH_LANE(vf, a.at[i] * b.at[i]) }
INLINE vf vf_div(vf a, vf b) { EACH_LANE(vf, a.at[i] / b.at[i]) }
INLINE vf vf_fma(vf a, vf b, vf c) { EACH_LANE(vf, fmaf(a.at[i], b.at[i], c.at[i])) }
INLINE vf vf_max(vf a, vf b) { EACH_LANE(vf, a.at[i] > b.at[i] ? a.at[i] : b.at[i]) }
INLINE vf vf_min(vf a, vf b) { EACH_LANE(vf, a.at[i] < b.at[i] ? a.at[i] : b.at[i]) }
INLINE vf vf_round(vf a) { EACH_LANE(vf, rintf(a.at[i])) }

INLINE vm vf_lt(vf a, vf b) { EACH_LANE(vm, a.at[i] < b.at[i]) }
INLINE vm vi_lt(vi a, vi b) { EACH_LANE(vm, a.at[i] < b.at[i]) }
INLINE vm vm_and(vm a, vm b) { EACH_LANE(vm, a.at[i] & b.at[i]) }
INLINE vf vf_select(vm m, vf yes, vf no) { EACH_LANE(vf, m.at[i] ? yes.at[i] : no.at[i]) }

INLINE vi vi_set1(int32_t x) { EACH_LANE(vi, x) }
INLINE vi vi_iota(void) { EACH_LANE(vi, i) }
INLINE vi vi_load(const void *p) {
    vi result;
    memcpy(result.at, p, sizeof result.at);
    return result;
}
INLINE void vi_store(void *p, vi a) { memcpy(p, a.at, sizeof a.at); }
INLINE vi vi_add(vi a, vi b) { EACH_LANE(vi, (int32_t)((uint32_t)a.at[i] + (uint32_t)b.at[i])) }
INLINE vi vi_and(vi a, vi b) { EACH_LANE(vi, a.at[i] & b.at[i]) }
INLINE vi vi_shl(vi a, int n) { EACH_LANE(vi, (int32_t)((uint32_t)a.at[i] << n)) }
INLINE vi vi_shr(vi a, int n) { EACH_LANE(vi, (int32_t)((uint32_t)a.at[i] >> n)) }
INLINE vf vf_of_vi(vi a) { EACH_LANE(vf, (float)a.at[i]) }
INLINE vi vi_of_vf(vf a) { EACH_LANE(vi, (int32_t)rintf(a.at[i])) }
INLINE vf vf_bits(vi a) {
    vf result;
    memcpy(result.at, a.at, sizeof result.at);
    return result;
}
INLINE vi vi_bits(vf a) {
    vi result;
    memcpy(result.at, a.at, sizeof result.at);
    return result;
}

INLINE vf vf_load_bf16(const uint16_t *p) {
    vi bits;
    for (int i = 0; i < 16; i++) bits.at[i] = (int32_t)((uint32_t)p[i] << 16);
    return vf_bits(bits);
}
INLINE vf vf_load_s8(const int8_t *p) { EACH_LANE(vf, (float)p[i]) }
INLINE void vi_store_s8(int8_t *p, vi a) {
    for (int i = 0; i < 16; i++) p[i] = (int8_t)a.at[i];
}

INLINE vi vi_dot(vi acc, vi unsigned_bytes, vi signed_bytes) {
    uint8_t u[64];
    int8_t s[64];
    memcpy(u, unsigned_bytes.at, sizeof u);
    memcpy(s, signed_bytes.at, sizeof s);
    for (int i = 0; i < 64; i++) acc.at[i / 4] += u[i] * s[i];
    return acc;
}
#include "simd_one_step.h"

INLINE float vf_sum(vf a) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) a.at[i] += a.at[i + half];
    return a.at[0];
}
INLINE float vf_largest(vf a) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) a.at[i] = a.at[i] > a.at[i + half] ? a.at[i] : a.at[i + half];
    return a.at[0];
}
