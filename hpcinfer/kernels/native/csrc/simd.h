/* Sixteen logical lanes on every machine: what a file simd_*.h defines, in these exact meanings.
 *
 *   vf, vi, vm                 16 float32; 16 int32 (or 64 bytes); a mask of 16 lanes
 *   vf_set1 vf_zero vf_load vf_store vf_load_tail(p, n) vf_store_tail(p, a, n)   1 <= n <= 16; a tail loads zeros
 *   vf_add sub mul div sqrt fma(a, b, c) = a * b + c     each rounded once (IEEE 754); vf_round: to nearest even
 *   vf_max(a, b) = a > b ? a : b; vf_min(a, b) = a < b ? a : b        b if either is NaN
 *   vf_lt vi_lt vm_and vf_select(m, yes, no)             comparisons with NaN are false
 *   vi_set1 vi_iota (0 .. 15) vi_load vi_store vi_add vi_and vi_shl(a, constant) vi_shr (logical)
 *   vf_of_vi vi_of_vf (to nearest even; the caller keeps values in range) vf_bits vi_bits (reinterpret)
 *   vf_load_bf16(p) vf_load_s8(p) vi_store_s8(p, a)      16 values; stored lanes lie in -128 .. 127
 *   vi_dot(acc, u, s)          acc[i] += sum of 4 products of unsigned byte u[4i + j] and signed byte s[4i + j], exact
 *   vf_sum(a) vf_largest(a)    lanes combined in one tree: i with i + 8, then i + 4, i + 2, i + 1 (vf_add, vf_max)
 *   TILE_ROWS TILE_ROWS_INT TILE_VECS   register tiles of products.h, float32 and codes: rows, vf across (1 or 2)
 *   HAS_DOT                    1 if vi_dot is one instruction
 */
#ifndef HPC_SIMD_H
#define HPC_SIMD_H
#define INLINE static inline __attribute__((always_inline))
#endif
