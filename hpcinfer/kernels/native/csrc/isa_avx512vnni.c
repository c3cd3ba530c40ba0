/* The kernels for AVX512 with VNNI (Intel from Ice Lake on, AMD from Zen 4 on). */
#if defined(__x86_64__)
#include <immintrin.h>
#include "runtime.h"
#include "simd.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif
#define HPC_TABLE hpc_avx512vnni
#include "simd_avx512.h"
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
