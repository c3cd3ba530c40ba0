/* Threads, scratch memory and stopwatches. */
#ifndef HPC_RUNTIME_H
#define HPC_RUNTIME_H
#include "native.h"

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#define TEAM omp_get_num_threads() /* may be fewer than asked for: only the team itself knows who shares the work */
#else
#define THREAD 0
#define TEAM 1
#endif

/* Buffers: two sets of rows (input of the first and of the second product of a call), two matrices, and
 * rows of logits. */
enum { HPC_ROWS, HPC_CODES, HPC_SCALES, HPC_SUMS, HPC_TAKEN, HPC_PER_SET };
enum { HPC_WIDE = 2 * HPC_PER_SET, HPC_HEADS, HPC_DRAWING, HPC_NUM_BUFFERS };

struct hpc_runtime {
    int threads;
    int lacks_scratch;
    double seconds[HPC_NUM_PHASES], stamp;
    void *buffers[HPC_NUM_BUFFERS];
    int64_t sizes[HPC_NUM_BUFFERS];
};

/* Scratch memory of at least `bytes`, aligned to 64; its content is lost by the next call for the same buffer. NULL
 * where there is no memory, which `has_all_scratch` tells once. */
void *hpc_scratch(hpc_runtime *runtime, int buffer, int64_t bytes);
static inline int has_all_scratch(hpc_runtime *runtime) {
    const int has_all = !runtime->lacks_scratch;
    runtime->lacks_scratch = 0;
    return has_all;
}

/* Let this thread, and workers that it begins, round as IEEE 754 does by default: a library that was loaded may have it
 * flush small numbers to zero, and results would depend on that, and on which thread computes them. */
void hpc_use_default_rounding(void);
double hpc_now(void); /* monotonic seconds */

static inline void begin_phase(hpc_runtime *runtime) { runtime->stamp = hpc_now(); }

/* What happened since the last call was `phase`. */
static inline void add_seconds(hpc_runtime *runtime, int phase) {
    double now = hpc_now();
    runtime->seconds[phase] += now - runtime->stamp;
    runtime->stamp = now;
}

/* Wait for all threads of the team; what they did was `phase`. */
static inline void end_phase(hpc_runtime *runtime, int thread, int phase) {
#pragma omp barrier
    if (thread == 0) add_seconds(runtime, phase);
}

/* Where a panel lies among all panels of a weight. */
static inline int64_t place_of(const hpc_weight *weight, int64_t panel) {
    const int64_t num_gates = weight->num_out / HPC_PANEL / 2;
    return !weight->is_gated ? panel : panel < num_gates ? 2 * panel : 2 * (panel - num_gates) + 1;
}

/* A thread's part of `count` things: [first, last), contiguous, sizes differ by at most one. */
typedef struct { int64_t first, last; } hpc_part;
static inline hpc_part part_of(int64_t count, int thread, int threads) {
    return (hpc_part){count * thread / threads, count * (thread + 1) / threads};
}

/* The next thing of a thread's part, counted from 0, for whoever asks: `taken` has a cache line for each thread. */
enum { TAKEN_STRIDE = 8 };
static inline int64_t take_next(int64_t *taken, int owner) {
    return __atomic_fetch_add(taken + owner * TAKEN_STRIDE, 1, __ATOMIC_RELAXED);
}
#endif
