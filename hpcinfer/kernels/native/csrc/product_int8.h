/* A register tile of an int8 product: some rows of codes times one panel of one grain. The sums are exact integers. */

/* sums += codes times 16 * TILE_VECS columns of the weights. */
INLINE void int8_columns(
    int num_rows, const uint8_t *weights, const int8_t *codes, int64_t stride, int64_t num_in, const char *ahead,
    int64_t ahead_step, vi (*sums)[TILE_VECS]
) {
    const int8_t *places[ADDRESSES(TILE_ROWS_INT8)];
    UNROLL for (int i = 0; i < ADDRESSES(num_rows); i++) places[i] = codes + 3 * i * stride;
    for (const uint8_t *end = weights + num_in * HPC_PANEL; weights < end; weights += STRIPE, ahead += ahead_step) {
        UNROLL for (int i = 0; i < TILE_VECS; i++) __builtin_prefetch(ahead + i * 4 * HPC_LANES);
        UNROLL for (int step = 0; step < DOT_STEPS; step++) {
            vi columns[TILE_VECS];
            KEEP_ADDRESS(weights); /* read again: registers would not do for the bytes of both steps */
            UNROLL for (int i = 0; i < TILE_VECS; i++)
                columns[i] = vi_bytes(vi_load(weights + i * 4 * HPC_LANES), step);
            UNROLL for (int i = 0; i < ADDRESSES(num_rows); i++) KEEP_ADDRESS(places[i]);
            UNROLL for (int row = 0; row < num_rows; row++) {
                const vi four = vi_set1(int32_at(places[row / 3] + row % 3 * stride)); /* or two, of two steps */
                UNROLL for (int i = 0; i < TILE_VECS; i++) sums[row][i] = vi_dot(sums[row][i], columns[i], four);
            }
            UNROLL for (int i = 0; i < ADDRESSES(num_rows); i++) places[i] += 4;
        }
    }
}

/* Weights are stored as code + 128: what that adds is taken off at the end. */
INLINE void int8_rows(int num_rows, const tile_input *input, int64_t grain, float *out) {
    const hpc_rows *rows = input->rows;
    const int64_t grains = rows->grains, run = input->first_row * grains + grain, padded_in = rows->padded_in;
    const int64_t num_sums = padded_in / HPC_GROUP + 1;
    const int32_t *totals = rows->sums + (run + 1) * num_sums - 1;
    const float *row_scales = rows->scales + run;
    const uint8_t *weights = (const uint8_t *)grain_panel(input, grain);
    const float *scales = (const float *)(weights + padded_in * HPC_PANEL);
    for (int column = 0; column < HPC_PANEL; column += TILE_VECS * HPC_LANES) {
        vi sums[TILE_ROWS_INT8][TILE_VECS];
        UNROLL for (int row = 0; row < num_rows; row++)
            UNROLL for (int i = 0; i < TILE_VECS; i++) sums[row][i] = vi_set1(0);
        int8_columns(
            num_rows, weights + 4 * column, rows->codes + run * padded_in * DOT_STEPS, grains * padded_in * DOT_STEPS,
            inputs_of(input, grain), ahead_of(input, grain) + 4 * column, input->ahead_step, sums);
        vf column_scales[TILE_VECS];
        UNROLL for (int i = 0; i < TILE_VECS; i++) column_scales[i] = vf_load(scales + column + i * HPC_LANES);
        UNROLL for (int row = 0; row < num_rows; row++) {
            const vi added = vi_set1(-128 * totals[row * grains * num_sums]);
            const vf scale = vf_set1(row_scales[row * grains]);
            UNROLL for (int i = 0; i < TILE_VECS; i++) {
                const vf sum = vf_mul(vf_of_vi(vi_add(sums[row][i], added)), column_scales[i]);
                vf_store(out + row * HPC_PANEL + column + i * HPC_LANES, vf_mul(sum, scale));
            }
        }
    }
}

static void int8_tile(const tile_input *input, int64_t grain, float *out) {
    FOR_CONSTANT_ROWS(TILE_ROWS_INT8, input->num_rows, int8_rows, input, grain, out)
}
