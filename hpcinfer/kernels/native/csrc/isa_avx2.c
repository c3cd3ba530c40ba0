/* The kernels for AVX2 with FMA. */
#if defined(__x86_64__)
#include <immintrin.h>
#include "runtime.h"
#include "simd.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define HPC_TABLE hpc_avx2
#include "simd_avx2.h"
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
