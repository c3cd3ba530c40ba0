/* A register tile of a float32 product: some rows times one panel of one grain. */

/* out [num_rows][HPC_PANEL]; one chain of fused multiply-adds over the inputs per element, from 0. */
INLINE void float32_columns(
    int num_rows, const float *weights, const float *x, int64_t stride, int64_t num_in, const char *ahead,
    int64_t ahead_step, float *out
) {
    vf sums[TILE_ROWS][TILE_VECS];
    UNROLL for (int row = 0; row < num_rows; row++)
        UNROLL for (int i = 0; i < TILE_VECS; i++) sums[row][i] = vf_zero();
    const float *places[ADDRESSES(TILE_ROWS)];
    UNROLL for (int i = 0; i < ADDRESSES(num_rows); i++) places[i] = x + 3 * i * stride;
    for (int64_t input = 0; input < num_in; input++, weights += HPC_PANEL, ahead += ahead_step) {
        vf columns[TILE_VECS];
        UNROLL for (int i = 0; i < TILE_VECS; i++) columns[i] = vf_load(weights + i * HPC_LANES);
        UNROLL for (int i = 0; i < TILE_VECS; i++) __builtin_prefetch(ahead + i * 4 * HPC_LANES);
        UNROLL for (int i = 0; i < ADDRESSES(num_rows); i++) KEEP_ADDRESS(places[i]);
        UNROLL for (int row = 0; row < num_rows; row++) {
            const vf value = vf_set1(places[row / 3][row % 3 * stride]);
            UNROLL for (int i = 0; i < TILE_VECS; i++) sums[row][i] = vf_fma(value, columns[i], sums[row][i]);
        }
        UNROLL for (int i = 0; i < ADDRESSES(num_rows); i++) places[i]++;
    }
    UNROLL for (int row = 0; row < num_rows; row++)
        UNROLL for (int i = 0; i < TILE_VECS; i++) vf_store(out + row * HPC_PANEL + i * HPC_LANES, sums[row][i]);
}

INLINE void float32_rows(int num_rows, const tile_input *input, int64_t grain, float *out) {
    const hpc_rows *rows = input->rows;
    const float *weights = (const float *)grain_panel(input, grain);
    const float *x = rows->values + input->first_row * rows->stride + grain * rows->num_in;
    for (int column = 0; column < HPC_PANEL; column += TILE_VECS * HPC_LANES)
        float32_columns(
            num_rows, weights + column, x, rows->stride, inputs_of(input, grain), ahead_of(input, grain) + 4 * column,
            input->ahead_step, out + column);
}

static void float32_tile(const tile_input *input, int64_t grain, float *out) {
    FOR_CONSTANT_ROWS(TILE_ROWS, input->num_rows, float32_rows, input, grain, out)
}
