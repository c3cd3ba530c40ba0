/* 16 lanes in AVX2 with FMA: two registers each. See simd.h for what every file of this kind defines. */
#include <immintrin.h>

#define TILE_ROWS 6
#define TILE_ROWS_INT8 6
#define TILE_ROWS_INT4 6
#define TILE_VECS 1
#define FLOAT32_BLOCK_BYTES (1024 * 1024)
#define DOT_STEPS 2

typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi;
typedef struct { __m256 a, b; } vm;

/* The first n of 16 lanes. */
INLINE vi vi_first(int64_t n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), count = _mm256_set1_epi32((int)n);
    return (vi){
        _mm256_cmpgt_epi32(count, lanes), _mm256_cmpgt_epi32(count, _mm256_add_epi32(lanes, _mm256_set1_epi32(8)))};
}

INLINE vf vf_set1(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vf vf_zero(void) { return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void vf_store(float *p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
INLINE vf vf_load_tail(const float *p, int64_t n) {
    const vi first = vi_first(n);
    return (vf){_mm256_maskload_ps(p, first.a), _mm256_maskload_ps(p + 8, first.b)};
}
INLINE void vf_store_tail(float *p, vf x, int64_t n) {
    const vi first = vi_first(n);
    _mm256_maskstore_ps(p, first.a, x.a);
    _mm256_maskstore_ps(p + 8, first.b, x.b);
}
INLINE vf vf_add(vf x, vf y) { return (vf){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE vf vf_sub(vf x, vf y) { return (vf){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE vf vf_mul(vf x, vf y) { return (vf){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE vf vf_div(vf x, vf y) { return (vf){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE vf vf_fma(vf x, vf y, vf z) {
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE vf vf_max(vf x, vf y) { return (vf){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE vf vf_min(vf x, vf y) { return (vf){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE vf vf_round(vf x) {
    return (vf){_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

INLINE vm vf_lt(vf x, vf y) {
    return (vm){_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)};
}
INLINE vm vi_lt(vi x, vi y) {
    return (vm){_mm256_castsi256_ps(_mm256_cmpgt_epi32(y.a, x.a)), _mm256_castsi256_ps(_mm256_cmpgt_epi32(y.b, x.b))};
}
INLINE vm vm_and(vm x, vm y) { return (vm){_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }
INLINE vf vf_select(vm m, vf yes, vf no) {
    return (vf){_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}

INLINE vi vi_set1(int32_t x) { return (vi){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE vi vi_iota(void) {
    return (vi){_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
INLINE vi vi_load(const void *p) {
    return (vi){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
INLINE void vi_store(void *p, vi x) {
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
INLINE vi vi_add(vi x, vi y) { return (vi){_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE vi vi_and(vi x, vi y) { return (vi){_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
INLINE vi vi_shl(vi x, int n) { return (vi){_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
INLINE vi vi_shr(vi x, int n) { return (vi){_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
INLINE vf vf_of_vi(vi x) { return (vf){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE vi vi_of_vf(vf x) { return (vi){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE vf vf_bits(vi x) { return (vf){_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
INLINE vi vi_bits(vf x) { return (vi){_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

INLINE vf vf_load_bf16(const uint16_t *p) {
    const __m128i low = _mm_loadu_si128((const __m128i *)p), high = _mm_loadu_si128((const __m128i *)p + 1);
    return vf_bits(vi_shl((vi){_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high)}, 16));
}
INLINE vf vf_load_s8(const int8_t *p) {
    const __m128i all = _mm_loadu_si128((const __m128i *)p);
    return vf_of_vi((vi){_mm256_cvtepi8_epi32(all), _mm256_cvtepi8_epi32(_mm_srli_si128(all, 8))});
}
INLINE void vi_store_s8(int8_t *p, vi x) {
    const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
    _mm_storeu_si128(
        (__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}

/* _mm256_maddubs_epi16 would saturate with bytes above 127, not with nibbles. */
INLINE vi vi_bytes(vi x, int step) {
    return step ? (vi){_mm256_srli_epi16(x.a, 8), _mm256_srli_epi16(x.b, 8)} : vi_and(x, vi_set1(0x00ff00ff));
}
/* Sums that the compiler may not reorder: gcc would add products of several steps first, and run out of registers. */
INLINE vi in_this_order(__m256i a, __m256i b) {
    __asm__("" : "+x"(a), "+x"(b));
    return (vi){a, b};
}
INLINE vi vi_dot(vi acc, vi bytes, vi codes) {
    return in_this_order(_mm256_add_epi32(acc.a, _mm256_madd_epi16(bytes.a, codes.a)),
                         _mm256_add_epi32(acc.b, _mm256_madd_epi16(bytes.b, codes.b)));
}
INLINE void vi_store_codes(int8_t *p, vi x) {
    const __m256i pairs = _mm256_packs_epi32(_mm256_shuffle_epi32(x.a, 0xD8), _mm256_shuffle_epi32(x.b, 0xD8));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(pairs, 0xD8));
}
INLINE vi vi_dot_nibbles(vi acc, vi nibbles, vi codes) {
    return in_this_order(_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(nibbles.a, codes.a)),
                         _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(nibbles.b, codes.b)));
}
INLINE vi vi_begin_nibbles(int32_t x) { return vi_set1(0); }
INLINE vi vi_end_nibbles(vi acc, int32_t x) {
    const __m256i ones = _mm256_set1_epi16(1);
    return vi_add((vi){_mm256_madd_epi16(acc.a, ones), _mm256_madd_epi16(acc.b, ones)}, vi_set1(x));
}

INLINE float vf_sum(vf x) {
    const __m256 b = _mm256_add_ps(x.a, x.b);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
INLINE float vf_largest(vf x) {
    const __m256 b = _mm256_max_ps(x.a, x.b);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}
