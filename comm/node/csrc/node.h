/* The types and functions of the node library that Python sees (through cffi).
 *
 * Ranks of one node share a region of memory: a part for each rank, written by it alone. A channel is one rank's way
 * of using it. Nothing here blocks for longer than it is told: who waits too long gives up and is called again, so that
 * Python can look for dead ranks in between. Sums are plain float32 additions in the order of a program. */
#ifndef HPC_NODE_H
#define HPC_NODE_H
#include <stdint.h>
#ifdef __FAST_MATH__
#error "the order of operations is a promise: build without -ffast-math"
#endif

/* Counted up with every change of what stands in a region, or of a function: Python refuses a library that has another
 * one, as a stale build has. */
enum { HPC_LAYOUT = 2 };
enum { HPC_REGISTERS = 32 };
enum { HPC_ONE_SHOT, HPC_TWO_SHOT, HPC_SLICES };

/* Additions in an order. Operands are numbered: inputs, then HPC_REGISTERS registers, then outputs. A step adds two
 * operands, or copies the left one if the right one is -1. */
typedef struct {
    int64_t num_inputs, num_steps, num_outputs, max_nodes;
    const int32_t *inputs; /* [num_inputs][2]: rank, index of the node */
    const int32_t *steps;  /* [num_steps][3]: where to, left, right */
} hpc_program;

/* Where things stand in a region: hpcinfer.comm.node.region. All are multiples of a cache line. */
typedef struct {
    int64_t size;                                   /* ranks */
    int64_t first_part, part_bytes;                 /* part of rank r: first_part + r * part_bytes */
    int64_t slots, slot_bytes;                      /* in a part: two slots */
    int64_t rooms, room_bytes;                      /* two rooms */
    int64_t rings, ring_bytes;                      /* a ring to each rank, with its head */
    int64_t total_bytes;
} hpc_geometry;

/* How to wait: so many looks without giving the core away, then so many with, then asleep. */
typedef struct {
    int64_t spins, yields;
} hpc_patience;

typedef struct hpc_channel hpc_channel;

/* channel.c. NULL without memory. */
hpc_channel *hpc_channel_new(void *base, const hpc_geometry *geometry, int64_t rank, hpc_patience patience);
void hpc_channel_free(hpc_channel *channel);
int hpc_is_tmpfs(int file);
/* Whether nobody reads from a room of this rank any more. */
int hpc_room_is_free(const hpc_channel *channel, int64_t room);

/* rounds.c: collectives. Each begins one and goes on with it; 1 when it is done, 0 when it waits for longer than
 * timeout_ns: then hpc_continue. What the pointers point to must live until it is done. */
int hpc_reduce(
    hpc_channel *channel, int64_t form, const hpc_program *program, const float *const *nodes, int64_t num_nodes,
    const int64_t *bounds, float *const *outs, int64_t timeout_ns);
/* To `root`, or to all if it is negative; who gets nothing needs nowhere to receive. */
int hpc_gather(
    hpc_channel *channel, const char *send, char *receive, const int64_t *starts, int64_t root, int64_t timeout_ns);
int hpc_broadcast(hpc_channel *channel, char *buffer, int64_t num_bytes, int64_t root, int64_t timeout_ns);
int hpc_all_to_all(
    hpc_channel *channel, const char *send, const int64_t *send_starts, char *receive, const int64_t *receive_starts,
    int64_t largest, int64_t timeout_ns);
int hpc_continue(hpc_channel *channel, int64_t timeout_ns);

/* ring.c: bytes from one rank to another, in order. They move what can be moved at once and say how much that was. */
int64_t hpc_ring_write(hpc_channel *channel, int64_t peer, const char *data, int64_t num_bytes);
int64_t hpc_ring_read(hpc_channel *channel, int64_t peer, char *data, int64_t num_bytes);
/* Wait until anything has come from a rank (is_reading), or there is room in the ring to it; 0 after timeout_ns. */
int hpc_ring_wait(hpc_channel *channel, int64_t peer, int is_reading, int64_t timeout_ns);

/* program.c: evaluate a program on private memory. */
void hpc_evaluate(const hpc_program *program, const float *const *inputs, float *const *outs, int64_t count);
#endif
