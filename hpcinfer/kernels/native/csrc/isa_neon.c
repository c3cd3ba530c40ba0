/* The kernels for NEON (64-bit Arm), which the compiler takes as given there. */
#if defined(__aarch64__)
#include "runtime.h"
#include "simd.h"
#define HPC_TABLE hpc_neon
#include "simd_neon.h"
#include "body.h"
#endif
