/* Products of rows with packed weights: register tiles of some rows and one panel of outputs, trees over grains. */

#define UNROLL _Pragma("GCC unroll 16")
/* Registers are for the sums of a tile: the compiler shall not carry `array` in them from one turn of a loop on. */
#define KEEP_IN_MEMORY(array) __asm__ volatile("" : : "r"(array) : "memory")

enum { FEW_ROWS = 8 };                /* up to so many rows wait for memory */
enum { PREFETCH_BYTES = 4096 };       /* how far ahead of use */
enum { INT4_GROUP_BYTES = HPC_PANEL * (HPC_GROUP / 2 + 2) };
enum { MOST_TILE_ROWS = TILE_ROWS > TILE_ROWS_INT ? TILE_ROWS : TILE_ROWS_INT };
enum { BLOCK_BYTES = 256 * 1024 };    /* of rows that stay in the second-level cache, beside the panels that pass by */

/* What one tile reads: `num_rows` rows from `first_row` on, and a panel's grains. */
typedef struct tile_input {
    const hpc_weight *weight;
    const hpc_rows *rows;
    const char *panel;
    int64_t first_row, num_rows;
    void (*tile)(const struct tile_input *, int64_t grain, float *out);   /* out [num_rows][HPC_PANEL] */
} tile_input;

INLINE const char *grain_panel(const tile_input *input, int64_t grain) {
    return input->panel + grain * input->weight->panel_bytes;
}

INLINE void prefetch(const void *weights) { __builtin_prefetch((const char *)weights + PREFETCH_BYTES); }

INLINE int32_t four_codes(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    return four;
}

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

/* All rows of [block.first, block.last) times one panel, in tiles of nearly equal size. */
static void multiply_panel(
    tile_input *input, int64_t panel, hpc_part block, int64_t tile_rows, const int64_t *spans, int64_t num_spans,
    const float *bias, float *nodes
) {
    const hpc_weight *weight = input->weight;
    const int64_t num_rows = block.last - block.first, num_tiles = (num_rows + tile_rows - 1) / tile_rows;
    float sums[MOST_TILE_ROWS * HPC_PANEL] __attribute__((aligned(64)));
    input->panel = weight->panels + panel * weight->grains * weight->panel_bytes;
    for (int64_t i = 0; i < num_tiles; i++) {
        const hpc_part part = part_of(num_rows, i, num_tiles);
        input->first_row = block.first + part.first;
        input->num_rows = part.last - part.first;
        for (int64_t span = 0; span < num_spans; span++) {
            sum_grains(input, spans[2 * span], spans[2 * span + 1], sums);
            store_tile(input, panel * HPC_PANEL, bias, sums, nodes + span * input->rows->num_rows * weight->num_out);
        }
    }
}

/* Rows of a block: as many as BLOCK_BYTES hold, in whole tiles. */
static int64_t rows_of_block(const hpc_weight *weight, int64_t tile_rows) {
    const int64_t row_bytes = weight->grains * weight->num_in * (weight->kind == HPC_FLOAT32 ? 4 : 1);
    const int64_t num_tiles = BLOCK_BYTES / (row_bytes * tile_rows + 1);
    return (num_tiles > 4 ? num_tiles : 4) * tile_rows;
}

static void product(
    const hpc_weight *weight, const hpc_rows *rows, const int64_t *spans, int64_t num_spans, const float *bias,
    float *nodes, int thread, int threads
) {
    tile_input input = {.weight = weight, .rows = rows};
    input.tile = weight->kind == HPC_FLOAT32 ? float32_tile : weight->kind == HPC_INT8 ? int8_tile : int4_tile;
    const int64_t tile_rows = weight->kind == HPC_FLOAT32 ? TILE_ROWS : TILE_ROWS_INT;
    const int64_t block_rows = rows_of_block(weight, tile_rows);
    const int64_t num_blocks = (rows->num_rows + block_rows - 1) / block_rows;
    const hpc_part panels = part_of((weight->num_out + HPC_PANEL - 1) / HPC_PANEL, thread, threads);
    for (int64_t i = 0; i < num_blocks; i++) {
        const hpc_part block = part_of(rows->num_rows, (int)i, (int)num_blocks);
        for (int64_t panel = panels.first; panel < panels.last; panel++)
            multiply_panel(&input, panel, block, tile_rows, spans, num_spans, bias, nodes);
    }
}
