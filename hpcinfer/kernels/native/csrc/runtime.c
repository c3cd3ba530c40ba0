/* Threads, scratch memory and stopwatches: see runtime.h. */
#define _GNU_SOURCE /* CPU_SET, pthread_setaffinity_np */
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__linux__) && defined(_OPENMP)
#include <pthread.h>
#include <sched.h>
#endif

enum { ALIGNMENT = 64 };

/* Threads that a team of so many really gets: kernels that share work by number must not miss one. */
static int team_size(int threads) {
    int size = 1;
#ifdef _OPENMP
    omp_set_dynamic(0);
#pragma omp parallel num_threads(threads)
#pragma omp single
    size = omp_get_num_threads();
#else
    (void)threads;
#endif
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
    if (bytes <= runtime->sizes[buffer]) return runtime->buffers[buffer];
    const int64_t size = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    free(runtime->buffers[buffer]);
    runtime->buffers[buffer] = aligned_alloc(ALIGNMENT, (size_t)size);
    if (!runtime->buffers[buffer]) { /* no caller could go on */
        fprintf(stderr, "hpcinfer: no memory for %lld bytes of scratch\n", (long long)size);
        abort();
    }
    runtime->sizes[buffer] = size;
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
#pragma omp parallel num_threads(threads) reduction(+ : failures)
    {
        const int thread = omp_get_thread_num();
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
