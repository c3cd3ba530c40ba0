/* A channel, and waiting: see channel.h. */
#define _GNU_SOURCE /* syscall */
#include "channel.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>
#endif

hpc_channel *hpc_channel_new(void *base, const hpc_geometry *geometry, int64_t rank, hpc_patience patience) {
    hpc_channel *channel = calloc(1, sizeof *channel);
    if (!channel) return NULL;
    channel->base = base;
    channel->geometry = *geometry;
    channel->patience = patience;
    channel->rank = rank;
    channel->size = geometry->size;
    return channel;
}

void hpc_channel_free(hpc_channel *channel) { free(channel); }

int hpc_is_tmpfs(int file) {
#ifdef __linux__
    struct statfs found;
    return !fstatfs(file, &found) && (unsigned long)found.f_type == 0x01021994ul;
#else
    (void)file;
    return 0;
#endif
}

hpc_part *hpc_part_of(const hpc_channel *channel, int64_t rank) {
    return (hpc_part *)(channel->base + channel->geometry.first_part + rank * channel->geometry.part_bytes);
}

int hpc_room_is_free(const hpc_channel *channel, int64_t room) {
    const uint64_t last = channel->room_round[room];
    for (int64_t rank = 0; last && rank < channel->size; rank++)
        if (rank != channel->rank && hpc_load(&hpc_part_of(channel, rank)->posted) < last + 1) return 0;
    return 1;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void sleep_on(uint32_t *bell, uint32_t seen, int64_t ns) {
    const struct timespec time = {ns / 1000000000, ns % 1000000000};
#ifdef __linux__
    syscall(SYS_futex, bell, FUTEX_WAIT, seen, &time, NULL, 0);
#else
    const struct timespec nap = {0, ns < 50000 ? ns : 50000};
    (void)bell, (void)seen, (void)time;
    nanosleep(&nap, NULL);
#endif
}

/* The order matters: who sleeps says so, and then looks once more; who posts counts, and then looks for sleepers. */
static int fall_asleep(hpc_channel *channel, const uint64_t *counter, uint64_t least, uint32_t peer, int64_t ns) {
    hpc_part *mine = hpc_part_of(channel, channel->rank);
    const uint32_t seen = __atomic_load_n(&mine->bell, __ATOMIC_ACQUIRE);
    __atomic_store_n(&mine->waits_for, peer, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (hpc_load(counter) < least) sleep_on(&mine->bell, seen, ns);
    __atomic_store_n(&mine->waits_for, 0, __ATOMIC_RELAXED);
    return hpc_load(counter) >= least;
}

int hpc_wait(hpc_channel *channel, const uint64_t *counter, uint64_t least, uint32_t peer, hpc_deadline *deadline) {
    if (hpc_load(counter) >= least) return 1;
    for (int64_t look = 0; look < channel->patience.spins; look++) {
        relax();
        if (hpc_load(counter) >= least) return 1;
    }
    for (int64_t look = 0; look < channel->patience.yields; look++) {
        sched_yield();
        if (hpc_load(counter) >= least) return 1;
    }
    int64_t now = now_ns();
    if (!deadline->end_ns) deadline->end_ns = now + deadline->timeout_ns;
    for (; now < deadline->end_ns; now = now_ns())
        if (fall_asleep(channel, counter, least, peer, deadline->end_ns - now)) return 1;
    return 0;
}

void hpc_wake(hpc_channel *channel, int64_t peer) {
    hpc_part *part = hpc_part_of(channel, peer);
    const uint32_t awaited = __atomic_load_n(&part->waits_for, __ATOMIC_RELAXED);
    if (awaited != (uint32_t)channel->rank + 1 && awaited != HPC_ANYBODY) return;
    __atomic_fetch_add(&part->bell, 1, __ATOMIC_RELEASE);
#ifdef __linux__
    syscall(SYS_futex, &part->bell, FUTEX_WAKE, 1, NULL, NULL, 0);
#endif
}
