/* A register tile of an int8 product: some rows of codes times one panel of one grain. The sums are exact integers. */

INLINE void int8_columns(
    int num_rows, const uint8_t *weights, const int8_t *codes, int64_t stride, int64_t padded_in, vi (*sums)[TILE_VECS]
) {
    for (int64_t input = 0; input < padded_in; input += 4, weights += 4 * HPC_PANEL) {
        vi columns[TILE_VECS];
        UNROLL for (int i = 0; i < TILE_VECS; i++) columns[i] = vi_load(weights + i * 4 * HPC_LANES);
        if (num_rows <= FEW_ROWS)
            UNROLL for (int i = 0; i < TILE_VECS; i++) prefetch(weights + i * 4 * HPC_LANES);
        UNROLL for (int row = 0; row < num_rows; row++) {
            const vi four = vi_set1(four_codes(codes + row * stride + input));
            UNROLL for (int i = 0; i < TILE_VECS; i++) sums[row][i] = vi_dot(sums[row][i], columns[i], four);
        }
    }
}

/* Weights are stored as code + 128: the sum starts from what that adds. */
INLINE void int8_rows(int num_rows, const tile_input *input, int64_t grain, float *out) {
    const hpc_rows *rows = input->rows;
    const int64_t run = input->first_row * rows->grains + grain, num_groups = rows->padded_in / HPC_GROUP;
    const uint8_t *weights = (const uint8_t *)grain_panel(input, grain);
    const float *scales = (const float *)(weights + rows->padded_in * HPC_PANEL);
    for (int column = 0; column < HPC_PANEL; column += TILE_VECS * HPC_LANES) {
        vi sums[TILE_ROWS_INT][TILE_VECS];
        UNROLL for (int row = 0; row < num_rows; row++) {
            const int32_t total = rows->sums[(run + row * rows->grains) * (num_groups + 1) + num_groups];
            UNROLL for (int i = 0; i < TILE_VECS; i++) sums[row][i] = vi_set1(-128 * total);
        }
        int8_columns(
            num_rows, weights + 4 * column, rows->codes + run * rows->padded_in, rows->grains * rows->padded_in,
            rows->padded_in, sums);
        UNROLL for (int row = 0; row < num_rows; row++) {
            const vf scale = vf_set1(rows->scales[run + row * rows->grains]);
            UNROLL for (int i = 0; i < TILE_VECS; i++) {
                const int at = column + i * HPC_LANES;
                const vf sum = vf_mul(vf_of_vi(sums[row][i]), vf_load(scales + at));
                vf_store(out + row * HPC_PANEL + at, vf_mul(sum, scale));
            }
        }
    }
}

static void int8_tile(const tile_input *input, int64_t grain, float *out) {
    FOR_CONSTANT_ROWS(TILE_ROWS_INT, input->num_rows, int8_rows, input, grain, out)
}
