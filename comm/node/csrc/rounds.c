/* Collectives, in rounds.
 *
 * In a round each rank writes a piece of its data into one of its two slots and posts that; then it reads what it wants
 * of the others' pieces. Who posts round n has read all it wants of round n - 1, so a slot that was used in round n - 2
 * is free as soon as all have posted round n - 1: no operation needs a barrier at its end. */
#include <string.h>

#include "channel.h"

enum { REDUCE, REDUCE_TWO_SHOT, GATHER, BROADCAST, ALL_TO_ALL };
enum { ALIGNMENT = HPC_LINE / (int)sizeof(float) };

static int64_t pieces_of(int64_t total, int64_t piece) { return (total + piece - 1) / piece; }

static char *slot(const hpc_channel *channel) {
    const hpc_geometry *geometry = &channel->geometry;
    const int64_t at = geometry->slots + (int64_t)(channel->round & 1) * geometry->slot_bytes;
    return (char *)hpc_part_of(channel, channel->rank) + at;
}

/* Data of a rank in this round, or (1) in the round before. */
static const char *data_of(const hpc_channel *channel, int64_t rank, int before) {
    return channel->base + hpc_part_of(channel, rank)->places[(channel->round - (uint64_t)before) & 1];
}

/* Where private data stand in the region, if they do: -1, or bytes from its beginning. */
static int64_t place_in_rooms(const hpc_channel *channel, const void *data, int64_t num_bytes) {
    const hpc_geometry *geometry = &channel->geometry;
    const char *rooms = (const char *)hpc_part_of(channel, channel->rank) + geometry->rooms;
    const uintptr_t at = (uintptr_t)data - (uintptr_t)rooms; /* enormous if it is before them */
    const uintptr_t end = (uintptr_t)(2 * geometry->room_bytes);
    return at < end && (uintptr_t)num_bytes <= end - at ? (const char *)data - channel->base : -1;
}

static void post(hpc_channel *channel, int64_t place, int64_t stride) {
    hpc_part *mine = hpc_part_of(channel, channel->rank);
    if (place >= 0) {
        mine->places[channel->round & 1] = place;
        mine->strides[channel->round & 1] = stride;
    }
    hpc_store(&mine->posted, channel->round + 1);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (int64_t rank = 0; rank < channel->size; rank++)
        if (rank != channel->rank) hpc_wake(channel, rank);
}

/* Reductions. */

static int64_t piece_start(const hpc_operation *operation, int64_t segment, int64_t piece) {
    return operation->bounds[segment] + piece * operation->width;
}

static int64_t piece_length(const hpc_operation *operation, int64_t segment, int64_t piece) {
    const int64_t left = operation->bounds[segment + 1] - piece_start(operation, segment, piece);
    return left < 0 ? 0 : hpc_least(left, operation->width);
}

/* Write the pieces of all segments that others evaluate: [node][segment][width]. */
static void copy_in(const hpc_channel *channel, int64_t piece) {
    const hpc_operation *operation = &channel->operation;
    const int64_t segments = operation->num_segments;
    float *out = (float *)slot(channel);
    for (int64_t node = 0; node < operation->num_nodes; node++)
        for (int64_t segment = 0; segment < segments; segment++, out += operation->width)
            if (segments == 1 || segment != channel->rank) {
                const float *from = operation->nodes[node] + piece_start(operation, segment, piece);
                memcpy(out, from, (size_t)piece_length(operation, segment, piece) * sizeof(float));
            }
}

/* Evaluate this rank's segment of a piece whose data were written in this round, or in the one before. */
static void evaluate(const hpc_channel *channel, int64_t piece, float *const *outs, int before) {
    const hpc_operation *operation = &channel->operation;
    const hpc_program *program = operation->program;
    const int64_t segment = operation->num_segments == 1 ? 0 : channel->rank;
    const int64_t start = piece_start(operation, segment, piece);
    const int which = (int)((channel->round - (uint64_t)before) & 1);
    const float *inputs[program->num_inputs];
    for (int64_t i = 0; i < program->num_inputs; i++) {
        const int64_t rank = program->inputs[2 * i], node = program->inputs[2 * i + 1];
        const float *data = (const float *)data_of(channel, rank, before);
        const int64_t stride = hpc_part_of(channel, rank)->strides[which];
        if (rank == channel->rank)
            inputs[i] = operation->nodes[node] + start;
        else if (stride)
            inputs[i] = data + node * stride + start;
        else
            inputs[i] = data + (node * operation->num_segments + segment) * operation->width;
    }
    hpc_evaluate(program, inputs, outs, piece_length(operation, segment, piece));
}

static void evaluate_into_outs(const hpc_channel *channel, int64_t piece) {
    const hpc_operation *operation = &channel->operation;
    float *outs[operation->program->num_outputs];
    for (int64_t i = 0; i < operation->program->num_outputs; i++)
        outs[i] = operation->outs[i] + piece * operation->width;
    evaluate(channel, piece, outs, 0);
}

/* Results follow the pieces in a slot: [output][width]. */
static int64_t results_at(const hpc_operation *operation) {
    return operation->program->max_nodes * operation->num_segments * operation->width;
}

static void evaluate_into_slot(const hpc_channel *channel, int64_t piece) {
    const hpc_operation *operation = &channel->operation;
    float *outs[operation->program->num_outputs], *results = (float *)slot(channel) + results_at(operation);
    for (int64_t i = 0; i < operation->program->num_outputs; i++) outs[i] = results + i * operation->width;
    evaluate(channel, piece, outs, 1);
}

static void copy_results_out(const hpc_channel *channel, int64_t piece) {
    const hpc_operation *operation = &channel->operation;
    const hpc_geometry *geometry = &channel->geometry;
    const int64_t at = geometry->slots + (int64_t)(channel->round & 1) * geometry->slot_bytes;
    for (int64_t step = 0; step < channel->size; step++) {
        const int64_t rank = (channel->rank + step) % channel->size;
        const float *results = (const float *)((char *)hpc_part_of(channel, rank) + at) + results_at(operation);
        const size_t num_bytes = (size_t)piece_length(operation, rank, piece) * sizeof(float);
        for (int64_t i = 0; i < operation->program->num_outputs; i++)
            memcpy(operation->outs[i] + piece_start(operation, rank, piece), results + i * operation->width, num_bytes);
    }
}

static void write_reduce(hpc_channel *channel) {
    const hpc_operation *operation = &channel->operation;
    const int is_late = operation->kind == REDUCE_TWO_SHOT && operation->round > 0; /* results of the piece before */
    if (is_late) evaluate_into_slot(channel, operation->round - 1);
    if (operation->place >= 0) {
        post(channel, operation->place, operation->stride);
        return;
    }
    if (operation->round < operation->num_pieces) copy_in(channel, operation->round);
    post(channel, slot(channel) - channel->base, 0);
}

/* All others. */

static void write_part(hpc_channel *channel, const char *data, int64_t total) {
    const hpc_operation *operation = &channel->operation;
    const int64_t start = operation->round * operation->piece_bytes;
    const int64_t num_bytes = hpc_least(operation->piece_bytes, total - start);
    if (operation->place >= 0) {
        post(channel, operation->place + start, 0);
        return;
    }
    if (num_bytes > 0) memcpy(slot(channel), data + start, (size_t)num_bytes);
    post(channel, slot(channel) - channel->base, 0);
}

static int is_receiver(const hpc_channel *channel) {
    return channel->operation.root < 0 || channel->operation.root == channel->rank;
}

static void read_part(const hpc_channel *channel, int64_t rank, char *receive, int64_t total) {
    const hpc_operation *operation = &channel->operation;
    const int64_t start = operation->round * operation->piece_bytes;
    const int64_t num_bytes = hpc_least(operation->piece_bytes, total - start);
    if (num_bytes > 0) memcpy(receive + start, data_of(channel, rank, 0), (size_t)num_bytes);
}

static void read_parts(const hpc_channel *channel) {
    const hpc_operation *operation = &channel->operation;
    const int64_t *starts = operation->receive_starts;
    for (int64_t step = 1; step < channel->size; step++) {
        const int64_t rank = (channel->rank + step) % channel->size;
        read_part(channel, rank, operation->receive + starts[rank], starts[rank + 1] - starts[rank]);
    }
}

static int64_t exchanged_bytes(const hpc_operation *operation, const int64_t *starts, int64_t rank) {
    const int64_t left = starts[rank + 1] - starts[rank] - operation->round * operation->piece_bytes;
    return left < 0 ? 0 : hpc_least(left, operation->piece_bytes);
}

static void write_exchange(hpc_channel *channel) {
    const hpc_operation *operation = &channel->operation;
    const int64_t *starts = operation->send_starts, done = operation->round * operation->piece_bytes;
    for (int64_t rank = 0; rank < channel->size; rank++)
        if (rank != channel->rank)
            memcpy(slot(channel) + rank * operation->piece_bytes, operation->send + starts[rank] + done,
                   (size_t)exchanged_bytes(operation, starts, rank));
    post(channel, slot(channel) - channel->base, 0);
}

static void read_exchange(const hpc_channel *channel) {
    const hpc_operation *operation = &channel->operation;
    const int64_t *starts = operation->receive_starts, done = operation->round * operation->piece_bytes;
    for (int64_t step = 1; step < channel->size; step++) {
        const int64_t rank = (channel->rank + step) % channel->size;
        const char *data = data_of(channel, rank, 0) + channel->rank * operation->piece_bytes;
        memcpy(operation->receive + starts[rank] + done, data, (size_t)exchanged_bytes(operation, starts, rank));
    }
}

/* Rounds. */

static void write_round(hpc_channel *channel) {
    const hpc_operation *operation = &channel->operation;
    const int64_t *starts = operation->receive_starts, rank = channel->rank;
    switch (operation->kind) {
    case REDUCE:
    case REDUCE_TWO_SHOT: write_reduce(channel); break;
    case GATHER: write_part(channel, operation->send, starts[rank + 1] - starts[rank]); break;
    case BROADCAST:
        if (rank == operation->root)
            write_part(channel, operation->send, operation->num_bytes);
        else
            post(channel, -1, 0);
        break;
    default: write_exchange(channel);
    }
}

static void read_round(const hpc_channel *channel) {
    const hpc_operation *operation = &channel->operation;
    switch (operation->kind) {
    case REDUCE: evaluate_into_outs(channel, operation->round); break;
    case REDUCE_TWO_SHOT:
        if (operation->round > 0) copy_results_out(channel, operation->round - 1);
        break;
    case GATHER:
        if (is_receiver(channel)) read_parts(channel);
        break;
    case BROADCAST:
        if (channel->rank != operation->root)
            read_part(channel, operation->root, operation->receive, operation->num_bytes);
        break;
    default: read_exchange(channel);
    }
}

/* Whether a rank must have posted before this one writes, or reads. In a broadcast only root writes, in a gather that
 * has a root only root reads. */
static int must_wait_for(const hpc_channel *channel, int64_t rank) {
    const hpc_operation *operation = &channel->operation;
    if (rank == channel->rank) return 0;
    if (operation->kind == GATHER) return !operation->is_written || is_receiver(channel);
    if (operation->kind != BROADCAST) return 1;
    return operation->is_written ? rank == operation->root : channel->rank == operation->root;
}

static int wait_for_all(hpc_channel *channel, uint64_t least, hpc_deadline *deadline) {
    hpc_operation *operation = &channel->operation;
    for (; operation->awaited < channel->size; operation->awaited++) {
        const int64_t rank = (channel->rank + 1 + operation->awaited) % channel->size;
        const uint64_t *posted = &hpc_part_of(channel, rank)->posted;
        if (must_wait_for(channel, rank) && !hpc_wait(channel, posted, least, (uint32_t)rank + 1, deadline)) return 0;
    }
    operation->awaited = 0;
    return 1;
}

static void finish(hpc_channel *channel) {
    const int64_t room_bytes = channel->geometry.room_bytes, place = channel->operation.place;
    if (place < 0 || !room_bytes) return;
    const char *rooms = (char *)hpc_part_of(channel, channel->rank) + channel->geometry.rooms;
    channel->room_round[(place - (rooms - channel->base)) / room_bytes] = channel->round;
}

int hpc_continue(hpc_channel *channel, int64_t timeout_ns) {
    hpc_operation *operation = &channel->operation;
    hpc_deadline deadline = {0, timeout_ns};
    for (; operation->round < operation->num_rounds; operation->round++) {
        if (!operation->is_written) {
            if (!wait_for_all(channel, channel->round, &deadline)) return 0;
            write_round(channel);
            operation->is_written = 1;
        }
        if (!wait_for_all(channel, channel->round + 1, &deadline)) return 0;
        read_round(channel);
        operation->is_written = 0;
        channel->round++;
    }
    finish(channel);
    return 1;
}

/* What the nodes of a reduction are apart, if they stand in a room, evenly; else -1. */
static int64_t stride_in_rooms(hpc_operation *operation, const hpc_channel *channel, int64_t count) {
    const float *const *nodes = operation->nodes;
    const int64_t last = operation->num_nodes - 1;
    int64_t stride = count;
    if (last < 0) return -1;
    if (last > 0) stride = nodes[1] - nodes[0];
    for (int64_t node = 1; node <= last; node++)
        if (nodes[node] - nodes[node - 1] != stride) return -1;
    if (stride < count) return -1;
    const int64_t num_bytes = (last * stride + count) * (int64_t)sizeof(float);
    operation->place = place_in_rooms(channel, nodes[0], num_bytes);
    return stride;
}

int hpc_reduce(
    hpc_channel *channel, int64_t form, const hpc_program *program, const float *const *nodes, int64_t num_nodes,
    const int64_t *bounds, float *const *outs, int64_t timeout_ns
) {
    const int64_t size = channel->size, count = bounds[size];
    hpc_operation *operation = &channel->operation;
    *operation = (hpc_operation){.kind = form == HPC_TWO_SHOT ? REDUCE_TWO_SHOT : REDUCE, .place = -1};
    operation->program = program, operation->nodes = nodes, operation->outs = outs, operation->num_nodes = num_nodes;
    operation->num_segments = form == HPC_ONE_SHOT ? 1 : size;
    operation->one_segment[1] = count;
    operation->bounds = form == HPC_ONE_SHOT ? operation->one_segment : bounds;
    int64_t longest = 0;
    for (int64_t segment = 0; segment < operation->num_segments; segment++) {
        const int64_t length = operation->bounds[segment + 1] - operation->bounds[segment];
        if (length > longest) longest = length;
    }
    const int64_t values = program->max_nodes * operation->num_segments + program->num_outputs;
    const int64_t most = channel->geometry.slot_bytes / (int64_t)sizeof(float) / values;
    operation->width = hpc_least(most, longest + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    operation->num_pieces = longest ? pieces_of(longest, operation->width) : 0;
    operation->num_rounds = operation->num_pieces + (form == HPC_TWO_SHOT && longest);
    if (count) operation->stride = stride_in_rooms(operation, channel, count);
    return hpc_continue(channel, timeout_ns);
}

int hpc_gather(
    hpc_channel *channel, const char *send, char *receive, const int64_t *starts, int64_t root, int64_t timeout_ns
) {
    hpc_operation *operation = &channel->operation;
    const int64_t *own = starts + channel->rank, num_bytes = own[1] - own[0];
    *operation = (hpc_operation){.kind = GATHER, .send = send, .receive = receive, .receive_starts = starts};
    operation->root = root;
    operation->place = place_in_rooms(channel, send, num_bytes);
    operation->piece_bytes = channel->geometry.slot_bytes;
    for (int64_t rank = 0; rank < channel->size; rank++) {
        const int64_t rounds = pieces_of(starts[rank + 1] - starts[rank], operation->piece_bytes);
        if (rounds > operation->num_rounds) operation->num_rounds = rounds;
    }
    if (num_bytes && is_receiver(channel) && send != receive + *own)
        memmove(receive + *own, send, (size_t)num_bytes);
    return hpc_continue(channel, timeout_ns);
}

int hpc_broadcast(hpc_channel *channel, char *buffer, int64_t num_bytes, int64_t root, int64_t timeout_ns) {
    hpc_operation *operation = &channel->operation;
    *operation = (hpc_operation){.kind = BROADCAST, .send = buffer, .receive = buffer, .root = root};
    operation->place = channel->rank == root ? place_in_rooms(channel, buffer, num_bytes) : -1;
    operation->num_bytes = num_bytes;
    operation->piece_bytes = channel->geometry.slot_bytes;
    operation->num_rounds = pieces_of(num_bytes, operation->piece_bytes);
    return hpc_continue(channel, timeout_ns);
}

int hpc_all_to_all(
    hpc_channel *channel, const char *send, const int64_t *send_starts, char *receive, const int64_t *receive_starts,
    int64_t largest, int64_t timeout_ns
) {
    hpc_operation *operation = &channel->operation;
    const int64_t rank = channel->rank, num_bytes = send_starts[rank + 1] - send_starts[rank];
    *operation = (hpc_operation){.kind = ALL_TO_ALL, .send = send, .receive = receive, .place = -1};
    operation->send_starts = send_starts, operation->receive_starts = receive_starts;
    operation->piece_bytes = channel->geometry.slot_bytes / channel->size / HPC_LINE * HPC_LINE;
    operation->num_rounds = pieces_of(largest, operation->piece_bytes);
    if (num_bytes) memcpy(receive + receive_starts[rank], send + send_starts[rank], (size_t)num_bytes);
    return hpc_continue(channel, timeout_ns);
}
