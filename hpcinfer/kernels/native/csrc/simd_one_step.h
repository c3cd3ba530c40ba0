/* Where vi_dot takes four inputs at a time: codes are bytes, and nibbles are bytes like others. See simd.h. */
#define DOT_STEPS 1

INLINE vi vi_bytes(vi x, int step) { return x; }
INLINE void vi_store_codes(int8_t *p, vi x) { vi_store_s8(p, x); }
INLINE vi vi_dot_nibbles(vi acc, vi nibbles, vi codes) { return vi_dot(acc, nibbles, codes); }
INLINE vi vi_begin_nibbles(int32_t x) { return vi_set1(x); }
INLINE vi vi_end_nibbles(vi acc, int32_t x) { return acc; }
