/* A register tile of an int4 product: some rows of codes times one panel of one grain, by groups of inputs with a scale
 * per output. The sum of a group is an exact integer; groups are added in ascending order. */

/* A group's codes as int8 products have them, [HPC_GROUP / 4][HPC_PANEL][4] bytes of code + 8. */
INLINE void int4_unpack(const uint8_t *packed, uint8_t *codes) {
    const vi low = vi_set1(0x0F0F0F0F);
    UNROLL for (int i = 0; i < HPC_GROUP / 8; i++) {
        UNROLL for (int j = 0; j < HPC_PANEL / HPC_LANES; j++) {
            const vi both = vi_load(packed + i * 4 * HPC_PANEL + j * 4 * HPC_LANES);
            uint8_t *target = codes + 8 * i * HPC_PANEL + j * 4 * HPC_LANES;
            vi_store(target, vi_and(both, low));
            vi_store(target + 4 * HPC_PANEL, vi_and(vi_shr(both, 4), low));
        }
    }
}

/* Add the group's part to out [num_rows][HPC_PANEL]. */
INLINE void int4_group(
    int num_rows, const uint8_t *weights, const uint16_t *scales, const int8_t *codes, const int32_t *totals,
    const hpc_rows *rows, float *out
) {
    const int64_t run = rows->grains * rows->padded_in, sums_of_row = rows->grains * (rows->padded_in / HPC_GROUP + 1);
    for (int column = 0; column < HPC_PANEL; column += TILE_VECS * HPC_LANES) {
        vi sums[TILE_ROWS_INT][TILE_VECS];
        UNROLL for (int row = 0; row < num_rows; row++)
            UNROLL for (int i = 0; i < TILE_VECS; i++) sums[row][i] = vi_set1(-8 * totals[row * sums_of_row]);
        for (int input = 0; input < HPC_GROUP; input += 4) {
            UNROLL for (int row = 0; row < num_rows; row++) {
                const vi four = vi_set1(four_codes(codes + row * run + input));
                UNROLL for (int i = 0; i < TILE_VECS; i++) {
                    const vi columns = vi_load(weights + input * HPC_PANEL + 4 * (column + i * HPC_LANES));
                    sums[row][i] = vi_dot(sums[row][i], columns, four);
                }
            }
        }
        UNROLL for (int i = 0; i < TILE_VECS; i++) {
            const vf scale = vf_load_bf16(scales + column + i * HPC_LANES);
            UNROLL for (int row = 0; row < num_rows; row++) {
                float *target = out + row * HPC_PANEL + column + i * HPC_LANES;
                vf_store(target, vf_fma(vf_of_vi(sums[row][i]), scale, vf_load(target)));
            }
        }
    }
}

INLINE void int4_rows(int num_rows, const tile_input *input, int64_t grain, float *out) {
    const hpc_rows *rows = input->rows;
    const int64_t run = input->first_row * rows->grains + grain, num_groups = rows->padded_in / HPC_GROUP;
    const uint8_t *packed = (const uint8_t *)grain_panel(input, grain);
    UNROLL for (int i = 0; i < num_rows * HPC_PANEL; i += HPC_LANES) vf_store(out + i, vf_zero());
    for (int64_t group = 0; group < num_groups; group++, packed += INT4_GROUP_BYTES) {
        uint8_t weights[HPC_GROUP * HPC_PANEL] __attribute__((aligned(64)));
        UNROLL for (int i = 0; i < INT4_GROUP_BYTES; i += 64) prefetch(packed + i);
        int4_unpack(packed, weights);
        int4_group(
            num_rows, weights, (const uint16_t *)(packed + HPC_GROUP / 2 * HPC_PANEL),
            rows->codes + run * rows->padded_in + group * HPC_GROUP, rows->sums + run * (num_groups + 1) + group, rows,
            out);
        KEEP_IN_MEMORY(out);
    }
    UNROLL for (int row = 0; row < num_rows; row++) {
        const vf scale = vf_set1(rows->scales[run + row * rows->grains]);
        UNROLL for (int i = 0; i < HPC_PANEL; i += HPC_LANES)
            vf_store(out + row * HPC_PANEL + i, vf_mul(vf_load(out + row * HPC_PANEL + i), scale));
    }
}

static void int4_tile(const tile_input *input, int64_t grain, float *out) {
    FOR_CONSTANT_ROWS(TILE_ROWS_INT, input->num_rows, int4_rows, input, grain, out)
}
