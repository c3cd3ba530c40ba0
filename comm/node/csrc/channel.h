/* What a channel is made of, and how it waits. */
#ifndef HPC_CHANNEL_H
#define HPC_CHANNEL_H
#include "node.h"

enum { HPC_LINE = 64 };

/* The head of a rank's part; only that rank writes it, but for the bell. */
typedef struct {
    /* Rounds that this rank has posted: it has written what others read in them, and has read all it wants of the
     * round before the last. `places` says where the data of the last two rounds stand, from the region's beginning;
     * the nodes of a reduction are strides floats apart, or packed by segments if that is 0. */
    uint64_t posted;
    int64_t places[2], strides[2];
    char fill[HPC_LINE - 40];
    uint32_t bell;      /* others count it up to wake this rank */
    uint32_t waits_for; /* asleep until this rank + 1 does something; HPC_ANYBODY; 0 awake */
    char more_fill[HPC_LINE - 8];
} hpc_part;

enum { HPC_ANYBODY = 1 << 30 };

typedef struct {
    int64_t end_ns, timeout_ns; /* end is set when the first wait begins */
} hpc_deadline;

/* A collective under way. */
typedef struct {
    int64_t kind, round, num_rounds, is_written, awaited; /* awaited: ranks that need not be looked at again */
    /* Reductions. A piece is the columns [bounds[s] + i * width, …) of each segment s. */
    const hpc_program *program;
    const float *const *nodes;
    float *const *outs;
    const int64_t *bounds;
    int64_t num_nodes, num_segments, width, num_pieces, stride;
    int64_t one_segment[2];
    /* All others. */
    const char *send;
    char *receive;
    const int64_t *send_starts, *receive_starts;
    int64_t piece_bytes, num_bytes, root;
    int64_t place; /* of the data, if it stands in a room already; else -1 */
} hpc_operation;

struct hpc_channel {
    char *base;
    hpc_geometry geometry;
    hpc_patience patience;
    int64_t rank, size;
    uint64_t round;         /* rounds done */
    uint64_t room_round[2]; /* rounds done when a room was last read */
    hpc_operation operation;
};

hpc_part *hpc_part_of(const hpc_channel *channel, int64_t rank);
/* Wait until *counter is at least so much; `peer` counts it up and then calls hpc_wake. */
int hpc_wait(hpc_channel *channel, const uint64_t *counter, uint64_t least, uint32_t peer, hpc_deadline *deadline);
void hpc_wake(hpc_channel *channel, int64_t peer);

static inline uint64_t hpc_load(const uint64_t *counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }

static inline void hpc_store(uint64_t *counter, uint64_t value) { __atomic_store_n(counter, value, __ATOMIC_RELEASE); }

static inline int64_t hpc_least(int64_t a, int64_t b) { return a < b ? a : b; }
#endif
