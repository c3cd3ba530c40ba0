/* Sixteen logical lanes on every machine: what a file simd_*.h defines, in these exact meanings.
 *
 *   vf, vi, vm                 16 float32; 16 int32 (or 64 bytes); a mask of 16 lanes
 *   vf_set1 vf_zero vf_load vf_store vf_load_tail(p, n) vf_store_tail(p, a, n)   1 <= n <= 16; a tail loads zeros
 *   vf_add sub mul div fma(a, b, c) = a * b + c     each rounded once (IEEE 754); vf_round: to nearest even
 *   vf_max(a, b) = a > b ? a : b; vf_min(a, b) = a < b ? a : b        b if either is NaN
 *   vf_lt vi_lt vm_and vf_select(m, yes, no)             comparisons with NaN are false
 *   vi_set1 vi_iota (0 .. 15) vi_load vi_store vi_add vi_and vi_shl(a, constant) vi_shr (logical)
 *   vf_of_vi vi_of_vf (to nearest even; the caller keeps values in range) vf_bits vi_bits (reinterpret)
 *   vf_load_bf16(p) vf_load_s8(p) vi_store_s8(p, a)      16 values; stored lanes lie in -128 .. 127
 *   vi_dot(acc, b, s)          acc[i] += sum of 4 products of unsigned bytes b[4i + j] and signed bytes s[4i + j], exact
 *   DOT_STEPS                  1 if that is an instruction. 2 if not: vi_dot then takes b and s as 2 numbers of 16 bits a
 *                              lane, and 4 inputs take two steps of it
 *   vi_bytes(u, step)          what a step takes of unsigned bytes: all, or those at places 0 and 2, at 1 and 3
 *   vi_store_codes(p, a)       16 codes for s, DOT_STEPS bytes each: four of a lane together, step by step
 *   vi_dot_nibbles(acc, b, s)  vi_dot of bytes up to 15 with bytes: one step on every machine, up to 8 times from
 *   vi_begin_nibbles(x)        on, and vi_end_nibbles(acc, x) is their sums + x in every lane
 *   vf_sum(a) vf_largest(a)    lanes combined in one tree: i with i + 8, then i + 4, i + 2, i + 1 (vf_add, vf_max)
 *   TILE_ROWS TILE_ROWS_INT8 TILE_ROWS_INT4 TILE_VECS   register tiles of products.h: rows, vf across (1 or 2)
 *   FLOAT32_BLOCK_BYTES        of float32 rows that products take through all panels: more of them ask less of memory, fewer
 *                              stay nearer to cores that are fast beside it
 */
#ifndef HPC_SIMD_H
#define HPC_SIMD_H
#define INLINE static inline __attribute__((always_inline))
#endif
