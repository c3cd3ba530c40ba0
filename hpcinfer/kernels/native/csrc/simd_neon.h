/* 16 lanes in NEON: four registers each. See simd.h for what every file of this kind defines. */
#include <arm_neon.h>
#include <string.h>

#define TILE_ROWS 6
#define TILE_ROWS_INT8 4
#define TILE_ROWS_INT4 2
#define TILE_VECS 1
#define FLOAT32_BLOCK_BYTES (256 * 1024)

typedef struct { float32x4_t a, b, c, d; } vf;
typedef struct { int32x4_t a, b, c, d; } vi;
typedef struct { uint32x4_t a, b, c, d; } vm;

#define EACH_1(type, f, x) ((type){f((x).a), f((x).b), f((x).c), f((x).d)})
#define EACH_2(type, f, x, y) ((type){f((x).a, (y).a), f((x).b, (y).b), f((x).c, (y).c), f((x).d, (y).d)})
#define EACH_3(type, f, x, y, z) \
    ((type){f((x).a, (y).a, (z).a), f((x).b, (y).b, (z).b), f((x).c, (y).c, (z).c), f((x).d, (y).d, (z).d)})

/* The machine's own maximum and minimum treat NaN and zeros in another way. */
INLINE float32x4_t max_of_4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
INLINE float32x4_t min_of_4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }

INLINE vf vf_set1(float x) { return (vf){vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
INLINE vf vf_zero(void) { return vf_set1(0); }
INLINE vf vf_load(const float *p) {
    return (vf){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
INLINE void vf_store(float *p, vf x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
INLINE vf vf_load_tail(const float *p, int64_t n) {
    float lanes[16] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return vf_load(lanes);
}
INLINE void vf_store_tail(float *p, vf x, int64_t n) {
    float lanes[16];
    vf_store(lanes, x);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}
INLINE vf vf_add(vf x, vf y) { return EACH_2(vf, vaddq_f32, x, y); }
INLINE vf vf_sub(vf x, vf y) { return EACH_2(vf, vsubq_f32, x, y); }
INLINE vf vf_mul(vf x, vf y) { return EACH_2(vf, vmulq_f32, x, y); }
INLINE vf vf_div(vf x, vf y) { return EACH_2(vf, vdivq_f32, x, y); }
INLINE vf vf_fma(vf x, vf y, vf z) { return EACH_3(vf, vfmaq_f32, z, x, y); }
INLINE vf vf_max(vf x, vf y) { return EACH_2(vf, max_of_4, x, y); }
INLINE vf vf_min(vf x, vf y) { return EACH_2(vf, min_of_4, x, y); }
INLINE vf vf_round(vf x) { return EACH_1(vf, vrndnq_f32, x); }

INLINE vm vf_lt(vf x, vf y) { return EACH_2(vm, vcltq_f32, x, y); }
INLINE vm vi_lt(vi x, vi y) { return EACH_2(vm, vcltq_s32, x, y); }
INLINE vm vm_and(vm x, vm y) { return EACH_2(vm, vandq_u32, x, y); }
INLINE vf vf_select(vm m, vf yes, vf no) { return EACH_3(vf, vbslq_f32, m, yes, no); }

INLINE vi vi_set1(int32_t x) { return (vi){vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}; }
INLINE vi vi_iota(void) {
    return (vi){(int32x4_t){0, 1, 2, 3}, (int32x4_t){4, 5, 6, 7}, (int32x4_t){8, 9, 10, 11},
                (int32x4_t){12, 13, 14, 15}};
}
/* By bytes: the address may have any alignment. */
INLINE int32x4_t load_4(const void *p) { return vreinterpretq_s32_s8(vld1q_s8((const int8_t *)p)); }
INLINE vi vi_load(const void *p) {
    const char *q = p;
    return (vi){load_4(q), load_4(q + 16), load_4(q + 32), load_4(q + 48)};
}
INLINE void vi_store(void *p, vi x) {
    int8_t *q = p;
    vst1q_s8(q, vreinterpretq_s8_s32(x.a));
    vst1q_s8(q + 16, vreinterpretq_s8_s32(x.b));
    vst1q_s8(q + 32, vreinterpretq_s8_s32(x.c));
    vst1q_s8(q + 48, vreinterpretq_s8_s32(x.d));
}
INLINE vi vi_add(vi x, vi y) { return EACH_2(vi, vaddq_s32, x, y); }
INLINE vi vi_and(vi x, vi y) { return EACH_2(vi, vandq_s32, x, y); }
INLINE vi vi_shl(vi x, int n) {
    const vi by = vi_set1(n);
    return EACH_2(vi, vshlq_s32, x, by);
}
INLINE int32x4_t shift_right_4(int32x4_t x, int32x4_t by) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x), by));
}
INLINE vi vi_shr(vi x, int n) {
    const vi by = vi_set1(-n);
    return EACH_2(vi, shift_right_4, x, by);
}
INLINE vf vf_of_vi(vi x) { return EACH_1(vf, vcvtq_f32_s32, x); }
INLINE vi vi_of_vf(vf x) { return EACH_1(vi, vcvtnq_s32_f32, x); }
INLINE vf vf_bits(vi x) { return EACH_1(vf, vreinterpretq_f32_s32, x); }
INLINE vi vi_bits(vf x) { return EACH_1(vi, vreinterpretq_s32_f32, x); }

INLINE float32x4_t bf16_of_4(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
INLINE vf vf_load_bf16(const uint16_t *p) {
    const uint16x8_t low = vld1q_u16(p), high = vld1q_u16(p + 8);
    return (vf){bf16_of_4(vget_low_u16(low)), bf16_of_4(vget_high_u16(low)), bf16_of_4(vget_low_u16(high)),
                bf16_of_4(vget_high_u16(high))};
}
INLINE vf vf_load_s8(const int8_t *p) {
    const int8x16_t all = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(all)), high = vmovl_s8(vget_high_s8(all));
    return vf_of_vi((vi){vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                         vmovl_s16(vget_high_s16(high))});
}
INLINE void vi_store_s8(int8_t *p, vi x) {
    const int16x8_t low = vcombine_s16(vmovn_s32(x.a), vmovn_s32(x.b));
    const int16x8_t high = vcombine_s16(vmovn_s32(x.c), vmovn_s32(x.d));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

INLINE int32x4_t dot_of_4(int32x4_t acc, int32x4_t unsigned_bytes, int32x4_t signed_bytes) {
    const uint8x16_t u = vreinterpretq_u8_s32(unsigned_bytes);
    const int8x16_t s = vreinterpretq_s8_s32(signed_bytes);
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(acc, u, s);
#elif defined(__ARM_FEATURE_DOTPROD)
    /* Of signed bytes only: u is (u - 128) + 64 + 64. */
    const int8x16_t less = vreinterpretq_s8_u8(veorq_u8(u, vdupq_n_u8(0x80))), rest = vdupq_n_s8(64);
    return vdotq_s32(vdotq_s32(vdotq_s32(acc, less, s), rest, s), rest, s);
#else
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(u))), low_s = vmovl_s8(vget_low_s8(s));
    const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(u))), high_s = vmovl_s8(vget_high_s8(s));
    const int32x4_t first = vpaddq_s32(
        vmull_s16(vget_low_s16(low), vget_low_s16(low_s)), vmull_s16(vget_high_s16(low), vget_high_s16(low_s)));
    const int32x4_t second = vpaddq_s32(
        vmull_s16(vget_low_s16(high), vget_low_s16(high_s)), vmull_s16(vget_high_s16(high), vget_high_s16(high_s)));
    return vaddq_s32(acc, vpaddq_s32(first, second));
#endif
}
INLINE vi vi_dot(vi acc, vi unsigned_bytes, vi signed_bytes) {
    return EACH_3(vi, dot_of_4, acc, unsigned_bytes, signed_bytes);
}
#include "simd_one_step.h"

INLINE float vf_sum(vf x) {
    const float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE float vf_largest(vf x) {
    const float32x4_t four = max_of_4(max_of_4(x.a, x.c), max_of_4(x.b, x.d));
    const float32x4_t two = max_of_4(four, vextq_f32(four, four, 2));
    const float32x4_t one = max_of_4(two, vextq_f32(two, two, 1));
    return vgetq_lane_f32(one, 0);
}
