/* A register tile of an int4 product: some rows of codes times one panel of one grain, by groups of inputs with a scale
 * per output. The sum of a group is an exact integer; groups are added in ascending order. */

/* sums += a group's codes times 16 * TILE_VECS columns of the weights, taken apart in registers: vi_dot_nibbles. */
INLINE void int4_group(
    int num_rows, const uint8_t *packed, const int8_t *codes, int64_t row_codes, vi (*sums)[TILE_VECS]
) {
    UNROLL for (int i = 0; i < HPC_GROUP / 8; i++) {
        vi both[TILE_VECS];
        UNROLL for (int j = 0; j < TILE_VECS; j++) both[j] = vi_load(packed + i * STRIPE + j * 4 * HPC_LANES);
        UNROLL for (int half = 0; half < 2; half++) {
            vi columns[TILE_VECS];
            UNROLL for (int j = 0; j < TILE_VECS; j++)
                columns[j] = vi_and(half ? vi_shr(both[j], 4) : both[j], vi_set1(0x0F0F0F0F));
            UNROLL for (int row = 0; row < num_rows; row++) {
                const vi four = vi_set1(int32_at(codes + row * row_codes + 8 * i + 4 * half));
                UNROLL for (int j = 0; j < TILE_VECS; j++)
                    sums[row][j] = vi_dot_nibbles(sums[row][j], columns[j], four);
            }
        }
    }
}

/* 16 * TILE_VECS columns of out [num_rows][HPC_PANEL], which stay in registers to the end. */
INLINE void int4_columns(int num_rows, const tile_input *input, int64_t grain, int column, float *out) {
    const uint8_t *packed = (const uint8_t *)grain_panel(input, grain);
    const char *ahead = ahead_of(input, grain);
    const hpc_rows *rows = input->rows;
    const int64_t num_groups = rows->padded_in / HPC_GROUP, run = input->first_row * rows->grains + grain;
    const int64_t row_codes = rows->grains * rows->padded_in, row_sums = rows->grains * (num_groups + 1);
    const int8_t *codes = rows->codes + run * rows->padded_in;
    const int32_t *totals = rows->sums + run * (num_groups + 1), *last = totals + inputs_of(input, grain) / HPC_GROUP;
    const int64_t ahead_bytes = INT4_GROUP_BYTES * input->ahead_step / STRIPE;
    vf results[TILE_ROWS_INT4][TILE_VECS];
    UNROLL for (int row = 0; row < num_rows; row++)
        UNROLL for (int j = 0; j < TILE_VECS; j++) results[row][j] = vf_zero();
    for (; totals < last; totals++, packed += INT4_GROUP_BYTES, codes += HPC_GROUP, ahead += ahead_bytes) {
        vi sums[TILE_ROWS_INT4][TILE_VECS];
        if (num_rows <= 2)
            UNROLL for (int i = 0; i < INT4_GROUP_BYTES; i += CACHE_LINE) __builtin_prefetch(ahead + i);
        else
            for (int64_t i = 0; i < ahead_bytes; i += CACHE_LINE) __builtin_prefetch(ahead + i);
        UNROLL for (int row = 0; row < num_rows; row++)
            UNROLL for (int j = 0; j < TILE_VECS; j++) sums[row][j] = vi_begin_nibbles(-8 * totals[row * row_sums]);
        int4_group(num_rows, packed + 4 * column, codes, row_codes, sums);
        UNROLL for (int j = 0; j < TILE_VECS; j++) {
            const uint16_t *scales = (const uint16_t *)(packed + HPC_GROUP / 2 * HPC_PANEL);
            const vf scale = vf_load_bf16(scales + column + j * HPC_LANES);
            UNROLL for (int row = 0; row < num_rows; row++) {
                const vi sum = vi_end_nibbles(sums[row][j], -8 * totals[row * row_sums]);
                results[row][j] = vf_fma(vf_of_vi(sum), scale, results[row][j]);
            }
        }
    }
    UNROLL for (int row = 0; row < num_rows; row++) {
        const vf scale = vf_set1(rows->scales[run + row * rows->grains]);
        UNROLL for (int j = 0; j < TILE_VECS; j++)
            vf_store(out + row * HPC_PANEL + column + j * HPC_LANES, vf_mul(results[row][j], scale));
    }
}

INLINE void int4_rows(int num_rows, const tile_input *input, int64_t grain, float *out) {
    for (int column = 0; column < HPC_PANEL; column += TILE_VECS * HPC_LANES)
        int4_columns(num_rows, input, grain, column, out);
}

static void int4_tile(const tile_input *input, int64_t grain, float *out) {
    FOR_CONSTANT_ROWS(TILE_ROWS_INT4, input->num_rows, int4_rows, input, grain, out)
}
