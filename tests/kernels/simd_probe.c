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
    put_floats(vf_sqrt(a));
    put_floats(vf_round(a));
    put_floats(vf_max(a, b));
    put_floats(vf_min(a, b));
    put_floats(if_less(vf_lt(a, b)));
    put_one(vf_sum(a));
    put_one(vf_largest(a));
}

static void put_integer_arithmetic(vi a, vi b, vi c) {
    put_integers(vi_add(a, b));
    put_integers(vi_and(a, b));
    put_integers(vi_shl(a, 23));
    put_integers(vi_shr(a, 4));
    put_integers(vi_dot(vi_shr(a, 4), b, c));
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
