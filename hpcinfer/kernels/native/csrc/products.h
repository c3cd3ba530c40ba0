/* Products of rows with packed weights: register tiles of some rows and one panel of outputs, trees over grains. */

#define UNROLL _Pragma("GCC unroll 16")
/* An address for every three rows: with one for each the compiler would run out of registers. */
#define ADDRESSES(num_rows) (((num_rows) + 2) / 3)
#define KEEP_ADDRESS(pointer) __asm__("" : "+r"(pointer))

enum { CACHE_LINE = 64 };
enum { PREFETCH_BYTES = 8192 };       /* how far ahead of use, where a panel is used once */
enum { STRIPE = 4 * HPC_PANEL };      /* bytes of a panel that inner loops read at a time: floats, or 4 codes each */
enum { INT4_GROUP_BYTES = HPC_PANEL * (HPC_GROUP / 2 + 2) };
enum { MOST_TILE_ROWS = TILE_ROWS > TILE_ROWS_INT8 ? TILE_ROWS : TILE_ROWS_INT8 };
enum { BLOCK_BYTES = 256 * 1024 };    /* of rows with codes that stay in the cache, beside the panels that pass by */

struct tile_input;
typedef void (*tile_function)(const struct tile_input *, int64_t grain, float *out); /* out [num_rows][HPC_PANEL] */

/* What one tile reads: `num_rows` rows from `first_row` on, and a panel's grains. */
typedef struct tile_input {
    const hpc_weight *weight;
    const hpc_rows *rows;
    const char *panel, *next_panel;
    int64_t first_row, num_rows;
    const char *ahead;                  /* what to ask memory for while the panel's first stripe is used */
    int64_t ahead_step;                 /* and how far to go on with each stripe */
    tile_function tile;
} tile_input;

INLINE const char *grain_panel(const tile_input *input, int64_t grain) {
    return input->panel + grain * input->weight->panel_bytes;
}

/* Inputs of a grain that are not padding, rounded up to whole groups where they are codes. */
INLINE int64_t inputs_of(const tile_input *input, int64_t grain) {
    const hpc_weight *weight = input->weight;
    const int64_t inputs = weight->true_inputs ? weight->true_inputs[grain] : weight->num_in;
    return weight->kind == HPC_FLOAT32 ? inputs : (inputs + HPC_GROUP - 1) / HPC_GROUP * HPC_GROUP;
}

/* What to ask memory for while the first stripe of a grain is used. */
INLINE const char *ahead_of(const tile_input *input, int64_t grain) {
    return input->ahead + grain * input->weight->panel_bytes / STRIPE * input->ahead_step;
}

INLINE int32_t int32_at(const int8_t *codes) {
    int32_t bits;
    memcpy(&bits, codes, 4);
    return bits;
}

_Static_assert(TILE_ROWS_INT4 <= MOST_TILE_ROWS, "sums of a tile have room for MOST_TILE_ROWS");
_Static_assert(MOST_TILE_ROWS <= 12, "FOR_CONSTANT_ROWS has cases up to 12");

/* Call with a constant first argument, so that the loops over rows unroll and sums stay in registers. */
#define ROWS_CASE(most, n, function, ...) \
    case n: if (n <= most) function(n <= most ? n : 1, __VA_ARGS__); return;
#define FOR_CONSTANT_ROWS(most, num_rows, function, ...) \
    switch (num_rows) { \
        ROWS_CASE(most, 1, function, __VA_ARGS__) ROWS_CASE(most, 2, function, __VA_ARGS__) \
        ROWS_CASE(most, 3, function, __VA_ARGS__) ROWS_CASE(most, 4, function, __VA_ARGS__) \
        ROWS_CASE(most, 5, function, __VA_ARGS__) ROWS_CASE(most, 6, function, __VA_ARGS__) \
        ROWS_CASE(most, 7, function, __VA_ARGS__) ROWS_CASE(most, 8, function, __VA_ARGS__) \
        ROWS_CASE(most, 9, function, __VA_ARGS__) ROWS_CASE(most, 10, function, __VA_ARGS__) \
        ROWS_CASE(most, 11, function, __VA_ARGS__) ROWS_CASE(most, 12, function, __VA_ARGS__) \
    }

#include "product_float32.h"
#include "product_int8.h"
#include "product_int4.h"

/* The sum over grains [first, last): left half + right half. */
static void sum_grains(const tile_input *input, int64_t first, int64_t last, float *out) {
    if (last - first == 1) {
        input->tile(input, first, out);
        return;
    }
    const int64_t middle = first + (last - first) / 2;
    float right[MOST_TILE_ROWS * HPC_PANEL] __attribute__((aligned(64)));
    sum_grains(input, first, middle, out);
    sum_grains(input, middle, last, right);
    for (int64_t i = 0; i < input->num_rows * HPC_PANEL; i += HPC_LANES)
        vf_store(out + i, vf_add(vf_load(out + i), vf_load(right + i)));
}

/* Add the bias, if there is one, and store the true outputs. */
static void store_tile(const tile_input *input, int64_t first_out, const float *bias, const float *sums, float *node) {
    const int64_t num_out = input->weight->num_out;
    for (int64_t column = 0; column < HPC_PANEL && first_out + column < num_out; column += HPC_LANES) {
        const int64_t out = first_out + column, count = num_out - out < HPC_LANES ? num_out - out : HPC_LANES;
        const vf added = bias ? vf_load_tail(bias + out, count) : vf_zero();
        for (int64_t row = 0; row < input->num_rows; row++) {
            const vf sum = vf_load(sums + row * HPC_PANEL + column);
            float *target = node + (input->first_row + row) * num_out + out;
            if (count == HPC_LANES) vf_store(target, bias ? vf_add(sum, added) : sum);
            else vf_store_tail(target, bias ? vf_add(sum, added) : sum, count);
        }
    }
}

/* A panel that is used once comes just ahead of use. Tiles that share one bring the next, each a part of it. */
static void look_ahead_of_tile(tile_input *input, int64_t tile, int64_t num_tiles) {
    const int64_t bytes = input->weight->grains * input->weight->panel_bytes;
    input->ahead_step = STRIPE / num_tiles;
    input->ahead = num_tiles == 1 ? input->panel + PREFETCH_BYTES : input->next_panel + tile * bytes / num_tiles;
}

/* All rows of [block.first, block.last) times one panel, in tiles of nearly equal size. */
static void multiply_panel(
    tile_input *input, int64_t panel, hpc_part block, int64_t tile_rows, const int64_t *spans, int64_t num_spans,
    const float *bias, float *nodes
) {
    const hpc_weight *weight = input->weight;
    const int64_t num_rows = block.last - block.first, num_tiles = (num_rows + tile_rows - 1) / tile_rows;
    float sums[MOST_TILE_ROWS * HPC_PANEL] __attribute__((aligned(64)));
    for (int64_t i = 0; i < num_tiles; i++) {
        const hpc_part part = part_of(num_rows, i, num_tiles);
        input->first_row = block.first + part.first;
        input->num_rows = part.last - part.first;
        look_ahead_of_tile(input, i, num_tiles);
        for (int64_t span = 0; span < num_spans; span++) {
            sum_grains(input, spans[2 * span], spans[2 * span + 1], sums);
            store_tile(input, panel * HPC_PANEL, bias, sums, nodes + span * input->rows->num_rows * weight->num_out);
        }
    }
}

static tile_function tile_of(const hpc_weight *weight) {
    return weight->kind == HPC_FLOAT32 ? float32_tile : weight->kind == HPC_INT8 ? int8_tile : int4_tile;
}

static int64_t rows_of_tile(const hpc_weight *weight) {
    return weight->kind == HPC_FLOAT32 ? TILE_ROWS : weight->kind == HPC_INT8 ? TILE_ROWS_INT8 : TILE_ROWS_INT4;
}

static int64_t bytes_of_input(const hpc_weight *weight) {
    return weight->kind == HPC_FLOAT32 ? 4 : weight->kind == HPC_INT8 ? DOT_STEPS : 1;
}

/* Rows of a block, in whole tiles. */
static int64_t rows_of_block(const hpc_weight *weight, int64_t tile_rows) {
    const int64_t row_bytes = weight->grains * weight->num_in * bytes_of_input(weight);
    const int64_t num_bytes = weight->kind == HPC_FLOAT32 ? FLOAT32_BLOCK_BYTES : BLOCK_BYTES;
    const int64_t num_tiles = num_bytes / (row_bytes * tile_rows + 1);
    return (num_tiles > 4 ? num_tiles : 4) * tile_rows;
}

/* Number of the panel at a place of the list. */
static int64_t number_of(const hpc_weight *weight, int64_t place) {
    return weight->listed_panels ? weight->listed_panels[place] : place;
}

static const char *panel_at(const hpc_weight *weight, int64_t place) {
    return weight->panels + number_of(weight, place) * weight->grains * weight->panel_bytes;
}

/* Where a thread is: a panel and a block of rows. */
typedef struct {
    int thread, threads, num_done; /* num_done: threads whose parts are taken */
    int64_t place, next;           /* next: of this block or the next one */
    hpc_part block;
} panel_cursor;

/* Go on to the next panel: of the thread's own part, which lies near it, then of those that are behind. 0 at the end. */
static int take_panel(panel_cursor *at, const hpc_rows *rows, int64_t num_panels, int64_t num_blocks) {
    for (; at->num_done < at->threads; at->num_done++) {
        const int owner = (at->thread + at->num_done) % at->threads;
        const hpc_part part = part_of(num_panels, owner, at->threads);
        const int64_t size = part.last - part.first, taken = take_next(rows->taken, owner);
        if (taken >= size * num_blocks) continue;
        at->place = part.first + taken % size;
        at->next = at->place + 1 < part.last ? at->place + 1 : part.first;
        at->block = part_of(rows->num_rows, (int)(taken / size), (int)num_blocks);
        return 1;
    }
    return 0;
}

static void product(
    const hpc_weight *weight, const hpc_rows *rows, const int64_t *spans, int64_t num_spans, const float *bias,
    float *nodes, int thread, int threads
) {
    tile_input input = {.weight = weight, .rows = rows, .tile = tile_of(weight)};
    const int64_t tile_rows = rows_of_tile(weight), block_rows = rows_of_block(weight, tile_rows);
    const int64_t num_blocks = (rows->num_rows + block_rows - 1) / block_rows;
    const int64_t all_panels = (weight->num_out + HPC_PANEL - 1) / HPC_PANEL;
    const int64_t num_panels = weight->listed_panels ? weight->num_listed : all_panels;
    for (panel_cursor at = {.threads = threads, .thread = thread}; take_panel(&at, rows, num_panels, num_blocks);) {
        input.panel = panel_at(weight, at.place);
        input.next_panel = panel_at(weight, at.next);
        multiply_panel(&input, number_of(weight, at.place), at.block, tile_rows, spans, num_spans, bias, nodes);
    }
}

/* gate * sigmoid(gate) * what it multiplies, both with their bias: the true ones of a tile, to out [T][num_gates]. */
static void store_gated(
    const tile_input *input, int64_t panel, int64_t num_gates, const float *bias, const float *gates,
    const float *others, float *out
) {
    const int64_t first = panel * HPC_PANEL, last = first + HPC_PANEL < num_gates ? first + HPC_PANEL : num_gates;
    for (int64_t at = first; at < last; at += HPC_LANES) {
        const vf none = vf_zero(), gate_bias = bias ? vf_load(bias + at) : none;
        const vf other_bias = bias ? vf_load(bias + input->weight->num_out / 2 + at) : none;
        for (int64_t row = 0; row < input->num_rows; row++) {
            const int64_t place = row * HPC_PANEL + at - first;
            const vf gate = vf_load(gates + place), other = vf_load(others + place);
            const vf value = bias ? silu_mul_lanes(vf_add(gate, gate_bias), vf_add(other, other_bias))
                                  : silu_mul_lanes(gate, other);
            float *target = out + (input->first_row + row) * num_gates + at;
            if (last - at >= HPC_LANES) vf_store(target, value);
            else vf_store_tail(target, value, last - at);
        }
    }
}

/* The rows of a tile times a gate panel and the one that it multiplies, which lie side by side, and SiLU. */
static void multiply_pair(
    tile_input *input, int64_t pair, int64_t next, int64_t tile, int64_t num_tiles, int64_t num_gates,
    const float *bias, float *out
) {
    const int64_t bytes = input->weight->panel_bytes;
    const char *panels = input->weight->panels;
    float sums[2][MOST_TILE_ROWS * HPC_PANEL] __attribute__((aligned(64)));
    for (int side = 0; side < 2; side++) {
        input->panel = panels + (2 * pair + side) * bytes;
        input->next_panel = panels + (2 * next + side) * bytes;
        look_ahead_of_tile(input, tile, num_tiles);
        input->tile(input, 0, sums[side]);
    }
    store_gated(input, pair, num_gates, bias, sums[0], sums[1], out);
}

/* A product with a gated weight, and SiLU of its results while they are at hand: out [T][num_gates]. */
static void gated_product(
    const hpc_weight *weight, const hpc_rows *rows, const float *bias, int64_t num_gates, float *out, int thread,
    int threads
) {
    tile_input input = {.weight = weight, .rows = rows, .tile = tile_of(weight)};
    const int64_t tile_rows = rows_of_tile(weight), block_rows = rows_of_block(weight, tile_rows);
    const int64_t num_blocks = (rows->num_rows + block_rows - 1) / block_rows;
    const int64_t num_pairs = weight->num_out / HPC_PANEL / 2;
    for (panel_cursor at = {.threads = threads, .thread = thread}; take_panel(&at, rows, num_pairs, num_blocks);) {
        const int64_t num_rows = at.block.last - at.block.first, num_tiles = (num_rows + tile_rows - 1) / tile_rows;
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            const hpc_part part = part_of(num_rows, (int)tile, (int)num_tiles);
            input.first_row = at.block.first + part.first;
            input.num_rows = part.last - part.first;
            multiply_pair(&input, at.place, at.next, tile, num_tiles, num_gates, bias, out);
        }
    }
}
