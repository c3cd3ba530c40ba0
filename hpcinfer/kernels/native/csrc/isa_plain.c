/* The kernels without vector instructions: any machine. */
#include "runtime.h"
#include "simd.h"
#define HPC_TABLE hpc_plain
#include "simd_plain.h"
#include "body.h"
