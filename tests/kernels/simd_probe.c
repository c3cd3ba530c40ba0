/* Every function of a simd_*.h, for test_native_simd.py: reads blocks of three times 16 numbers, writes 16 a function.
 *
 * SIMD_FILE is the file, COUNT the number of blocks. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "simd.h"
#include SIMD_FILE

static void put(const void *lanes) { fwrite(lanes, 4, 16, stdout); }
static void put_floats(vf lanes) {
    float out[16];
    vf_store(out, lanes);
    put(out);
}
static void put_integers(vi lanes) {
    int32_t out[16];
    vi_store(out, lanes);
    put(out);
}
static void put_one(float number) { put_floats(vf_set1(number)); }
static vf if_less(vm mask) { return vf_select(mask, vf_set1(1), vf_set1(2)); }

static void put_arithmetic(vf a, vf b, vf c) {
    put_floats(vf_add(a, b));
    put_floats(vf_sub(a, b));
    put_floats(vf_mul(a, b));
    put_floats(vf_div(a, b));
    put_floats(vf_fma(a, b, c));
    put_floats(vf_round(a));
    put_floats(vf_max(a, b));
    put_floats(vf_min(a, b));
    put_floats(if_less(vf_lt(a, b)));
    put_one(vf_sum(a));
    put_one(vf_largest(a));
}

/* a + the dot product of bytes; the signed ones as rows store them. */
static vi dot(vi a, vi b, vi c) {
    int8_t bytes[64], stored[64 * DOT_STEPS];
    vi_store(bytes, c);
    for (int i = 0; i < 64; i += 16) {
        int32_t codes[16];
        for (int j = 0; j < 16; j++) codes[j] = bytes[i + j];
        vi_store_codes(stored + i * DOT_STEPS, vi_load(codes));
    }
    for (int step = 0; step < DOT_STEPS; step++) {
        int32_t of_step[16];
        for (int lane = 0; lane < 16; lane++) memcpy(of_step + lane, stored + 4 * (lane * DOT_STEPS + step), 4);
        a = vi_dot(a, vi_bytes(b, step), vi_load(of_step));
    }
    return a;
}

static vi dot_nibbles(vi b, vi c) {
    vi sums = vi_begin_nibbles(-40);
    for (int i = 0; i < 8; i++) sums = vi_dot_nibbles(sums, vi_and(b, vi_set1(0x0F0F0F0F)), c);
    return vi_end_nibbles(sums, -40);
}

static void put_integer_arithmetic(vi a, vi b, vi c) {
    put_integers(vi_add(a, b));
    put_integers(vi_and(a, b));
    put_integers(vi_shl(a, 23));
    put_integers(vi_shr(a, 4));
    put_integers(dot(vi_shr(a, 4), b, c));
    put_integers(dot_nibbles(b, c));
    put_floats(if_less(vi_lt(a, b)));
    put_floats(if_less(vm_and(vi_lt(a, b), vi_lt(b, c))));
    put_floats(vf_of_vi(a));
    put_integers(vi_add(vi_iota(), vi_set1(-7)));
}

/* From `bytes`, at an odd address. */
static void put_memory(const void *bytes, const float *floats, int64_t tail) {
    char moved[65];
    float out[16] = {0};
    int8_t codes[64] = {0};
    memcpy(moved + 1, bytes, 64);
    put_integers(vi_load(moved + 1));
    put_floats(vf_load_s8((const int8_t *)moved + 1));
    put_floats(vf_load_bf16(bytes));
    put_floats(vf_load_tail(floats, tail));
    vf_store_tail(out, vf_load(floats), tail);
    put(out);
    const vf small = vf_max(vf_min(vf_load(floats), vf_set1(127)), vf_set1(-128));
    put_integers(vi_of_vf(small));
    vi_store_s8(codes, vi_of_vf(small));
    put(codes);
}

int main(void) {
    float block[3][16];
    for (int i = 0; i < COUNT; i++) {
        if (fread(block, sizeof block, 1, stdin) != 1) return 1;
        const vf a = vf_load(block[0]), b = vf_load(block[1]), c = vf_load(block[2]);
        put_arithmetic(a, b, c);
        put_integer_arithmetic(vi_bits(a), vi_bits(b), vi_bits(c));
        put_memory(block[1], block[0], 1 + i % 16);
    }
    return 0;
}
