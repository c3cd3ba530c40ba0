/* A ring of bytes for each pair of ranks, in the sender's part. */
#include <string.h>

#include "channel.h"

typedef struct {
    uint64_t written; /* bytes ever, by the sender */
    char fill[HPC_LINE - 8];
    uint64_t read; /* by the receiver */
    char more_fill[HPC_LINE - 8];
} ring;

static ring *ring_of(const hpc_channel *channel, int64_t sender, int64_t receiver) {
    const hpc_geometry *geometry = &channel->geometry;
    char *rings = (char *)hpc_part_of(channel, sender) + geometry->rings;
    return (ring *)(rings + receiver * ((int64_t)sizeof(ring) + geometry->ring_bytes));
}

/* Copy between private memory and a ring from a position on, around its end. */
static void copy(char *data, char *bytes, int64_t ring_bytes, uint64_t position, int64_t num_bytes, int is_reading) {
    const int64_t at = (int64_t)(position % (uint64_t)ring_bytes), first = hpc_least(num_bytes, ring_bytes - at);
    if (is_reading) {
        memcpy(data, bytes + at, (size_t)first);
        memcpy(data + first, bytes, (size_t)(num_bytes - first));
    } else {
        memcpy(bytes + at, data, (size_t)first);
        memcpy(bytes, data + first, (size_t)(num_bytes - first));
    }
}

static void say(hpc_channel *channel, uint64_t *counter, uint64_t value, int64_t peer) {
    hpc_store(counter, value);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    hpc_wake(channel, peer);
}

int64_t hpc_ring_write(hpc_channel *channel, int64_t peer, const char *data, int64_t num_bytes) {
    ring *out = ring_of(channel, channel->rank, peer);
    const int64_t ring_bytes = channel->geometry.ring_bytes;
    const int64_t free_bytes = ring_bytes - (int64_t)(out->written - hpc_load(&out->read));
    const int64_t moved = hpc_least(num_bytes, free_bytes);
    if (moved <= 0) return 0;
    copy((char *)data, (char *)(out + 1), ring_bytes, out->written, moved, 0);
    say(channel, &out->written, out->written + (uint64_t)moved, peer);
    return moved;
}

int64_t hpc_ring_read(hpc_channel *channel, int64_t peer, char *data, int64_t num_bytes) {
    ring *in = ring_of(channel, peer, channel->rank);
    const int64_t moved = hpc_least(num_bytes, (int64_t)(hpc_load(&in->written) - in->read));
    if (moved <= 0) return 0;
    copy(data, (char *)(in + 1), channel->geometry.ring_bytes, in->read, moved, 1);
    say(channel, &in->read, in->read + (uint64_t)moved, peer);
    return moved;
}

int hpc_ring_wait(hpc_channel *channel, int64_t peer, int is_reading, int64_t timeout_ns) {
    hpc_deadline deadline = {0, timeout_ns};
    if (is_reading) {
        const ring *in = ring_of(channel, peer, channel->rank);
        return hpc_wait(channel, &in->written, in->read + 1, (uint32_t)peer + 1, &deadline);
    }
    const ring *out = ring_of(channel, channel->rank, peer);
    const uint64_t full = out->written - (uint64_t)channel->geometry.ring_bytes;
    return out->written < (uint64_t)channel->geometry.ring_bytes ||
           hpc_wait(channel, &out->read, full + 1, (uint32_t)peer + 1, &deadline);
}
