/* Threads, scratch memory and stopwatches: see runtime.h. */
#define _GNU_SOURCE /* CPU_SET, pthread_setaffinity_np */
#include "runtime.h"

#include <stdlib.h>
#include <time.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif
#if defined(__linux__) && defined(_OPENMP)
#include <pthread.h>
#include <sched.h>
#endif

enum { ALIGNMENT = 64 };

void hpc_use_default_rounding(void) {
#if defined(__x86_64__)
    enum { FLAGS = 0x3F, DEFAULT = 0x1F80 }; /* exceptions that have been; all masked, to nearest, nothing flushed */
    const unsigned found = _mm_getcsr();
    if ((found & ~FLAGS) != DEFAULT) _mm_setcsr(DEFAULT | (found & FLAGS));
#elif defined(__aarch64__)
    uint64_t found;
    __asm__ volatile("mrs %0, fpcr" : "=r"(found));
    if (found) __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
#endif
}

/* Threads that a team of so many really gets. */
static int team_size(int threads) {
    int size = 1;
#ifdef _OPENMP
    omp_set_dynamic(0);
#endif
#pragma omp parallel num_threads(threads)
    {
        hpc_use_default_rounding();
#pragma omp single
        size = TEAM;
    }
    return size;
}

hpc_runtime *hpc_runtime_new(int threads) {
    hpc_runtime *runtime = calloc(1, sizeof *runtime);
    if (runtime) runtime->threads = team_size(threads);
    return runtime;
}

void hpc_runtime_free(hpc_runtime *runtime) {
    if (!runtime) return;
    for (int buffer = 0; buffer < HPC_NUM_BUFFERS; buffer++) free(runtime->buffers[buffer]);
    free(runtime);
}

int hpc_runtime_threads(const hpc_runtime *runtime) { return runtime->threads; }

const double *hpc_seconds(const hpc_runtime *runtime) { return runtime->seconds; }

void *hpc_scratch(hpc_runtime *runtime, int buffer, int64_t bytes) {
    if (bytes > runtime->sizes[buffer]) {
        const int64_t size = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        free(runtime->buffers[buffer]);
        runtime->buffers[buffer] = aligned_alloc(ALIGNMENT, (size_t)size);
        runtime->sizes[buffer] = runtime->buffers[buffer] ? size : 0;
        if (!runtime->buffers[buffer]) runtime->lacks_scratch = 1;
    }
    return runtime->buffers[buffer];
}

double hpc_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int hpc_pin(int threads, const int64_t *cpus) {
#if defined(__linux__) && defined(_OPENMP)
    int failures = 0;
    hpc_use_default_rounding();
#pragma omp parallel num_threads(threads) reduction(+ : failures)
    {
        const int thread = THREAD;
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET((size_t)cpus[thread], &set);
        if (thread > 0) failures += pthread_setaffinity_np(pthread_self(), sizeof set, &set) != 0;
    }
    return failures;
#else
    (void)cpus;
    return threads - 1;
#endif
}
