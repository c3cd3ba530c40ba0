/* Register tiles of attention: some rows with the keys of one tile. See attention.h for the expressions. */
enum { ATTEND_ROWS = 6, ATTEND_VECTORS = 4, PANELS = HPC_TILE / HPC_LANES };

/* Vectors of a register tile of so many rows: what the registers of a product's tile (simd.h) hold, 1 to 4. */
#define VECTORS_OF(rows) \
    (TILE_ROWS * TILE_VECS >= 4 * (rows) ? 4 : TILE_ROWS * TILE_VECS >= 2 * (rows) ? TILE_ROWS * TILE_VECS / (rows) : 1)

/* Keys [first, last] of the tile that starts at position `base`. */
typedef struct {
    int64_t base, first, last;
    int64_t dtype; /* of the panels: they are decoded in registers */
    stored_panel panels[PANELS];
    int is_ahead;
    stored_panel ahead[PANELS]; /* if is_ahead: of the next tile, to be asked for meanwhile; same dtype */
} key_tile;

/* Asks memory for `vectors` vectors from element `first` on. */
INLINE void prefetch_at(int64_t dtype, const int vectors, const char *panel, int64_t first) {
    const int64_t bytes = element_bytes(dtype);
#pragma GCC unroll 4
    for (int64_t i = 0; i < vectors * HPC_LANES * bytes; i += CACHE_LINE) __builtin_prefetch(panel + first * bytes + i);
}

/* Scores of some rows with 16 * vectors keys, unmasked. */
INLINE void score_rows(
    const int64_t dtype, const int rows, const int vectors, const float *q, int64_t head_size,
    const key_tile *tile, int64_t first, float *scores
) {
    const stored_panel *panels = tile->panels + first;
    vf sums[ATTEND_ROWS][ATTEND_VECTORS], scales[ATTEND_VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) scales[v] = dtype == HPC_INT8 ? vf_load(panels[v].key_scales) : vf_zero();
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = vf_zero();
    for (int64_t h = 0; h < head_size; h++) {
        vf key[ATTEND_VECTORS];
        if (tile->is_ahead && h * HPC_LANES * element_bytes(dtype) % CACHE_LINE == 0)
#pragma GCC unroll 4
            for (int j = 0; j < PANELS; j++) prefetch_at(dtype, 1, tile->ahead[j].keys, h * HPC_LANES);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) key[v] = read_back(dtype, panels[v].keys, h * HPC_LANES, scales[v]);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            vf x = vf_set1(q[r * head_size + h]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[r][v] = vf_fma(x, key[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) vf_store(scores + r * HPC_TILE + v * HPC_LANES, sums[r][v]);
}

/* 16 * vectors head columns of some rows: values * decay, plus the weighted values of keys [first, last]. */
INLINE void value_rows(
    const int64_t dtype, const int rows, const int vectors, const float *weights, const float *decay,
    const key_tile *tile, int64_t first, int64_t last, int64_t column, int64_t padded, float *values
) {
    vf sums[ATTEND_ROWS][ATTEND_VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sums[r][v] = vf_mul(vf_load(values + r * padded + column + v * HPC_LANES), vf_set1(decay[r]));
    for (int64_t i = first; i <= last; i++) {
        const stored_panel *panel = tile->panels + i / HPC_LANES;
        const int64_t lane = i % HPC_LANES, place = lane * padded + column;
        if (tile->is_ahead) prefetch_at(dtype, vectors, tile->ahead[i / HPC_LANES].values, place);
        vf part[ATTEND_VECTORS], scale = dtype == HPC_INT8 ? vf_set1(panel->value_scales[lane]) : vf_zero();
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) part[v] = read_back(dtype, panel->values, place + v * HPC_LANES, scale);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            vf weight = vf_set1(weights[r * HPC_TILE + i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[r][v] = vf_fma(weight, part[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) vf_store(values + r * padded + column + v * HPC_LANES, sums[r][v]);
}

/* CALL(rows, vectors) with both as constants, so that a register tile lives in registers. */
#define SHAPE(r, v, CALL) \
    case (r) * 8 + (v): if ((v) <= VECTORS_OF(r)) CALL(r, v); break;
#define SHAPES(r, CALL) SHAPE(r, 1, CALL) SHAPE(r, 2, CALL) SHAPE(r, 3, CALL) SHAPE(r, 4, CALL)
#define FOR_SHAPE(rows, vectors, CALL) \
    switch ((rows) * 8 + (vectors)) { \
        SHAPES(1, CALL) SHAPES(2, CALL) SHAPES(3, CALL) SHAPES(4, CALL) SHAPES(5, CALL) SHAPES(6, CALL) \
    }

INLINE void score_panels(
    const int64_t dtype, int rows, const float *q, int64_t head_size, const key_tile *tile, int64_t last, float *scores
) {
    const int64_t stop = last / HPC_LANES + 1, most = VECTORS_OF(rows);
    for (int64_t v = 0; v < stop; v += most) {
        const int vectors = (int)(stop - v < most ? stop - v : most);
#define CALL(R, V) score_rows(dtype, R, V, q, head_size, tile, v, scores + v * HPC_LANES)
        FOR_SHAPE(rows, vectors, CALL)
#undef CALL
    }
}

INLINE void value_columns(
    const int64_t dtype, int rows, const float *weights, const float *decay, const key_tile *tile, int64_t first,
    int64_t last, int64_t padded, float *values
) {
    const int64_t most = VECTORS_OF(rows);
    for (int64_t column = 0; column < padded; column += most * HPC_LANES) {
        const int64_t left = (padded - column) / HPC_LANES;
        const int vectors = (int)(left < most ? left : most);
#define CALL(R, V) value_rows(dtype, R, V, weights, decay, tile, first, last, column, padded, values)
        FOR_SHAPE(rows, vectors, CALL)
#undef CALL
    }
}

/* What the register tiles decode; others come decoded to float32. */
static int is_direct(int64_t dtype) { return dtype == HPC_BFLOAT16 || dtype == HPC_INT8; }

/* CALL(dtype) with the dtype of a tile's panels as a constant. */
#define FOR_DTYPE(dtype, CALL) \
    switch (dtype) { \
        case HPC_BFLOAT16: CALL(HPC_BFLOAT16); break; \
        case HPC_INT8: CALL(HPC_INT8); break; \
        default: CALL(HPC_FLOAT32); \
    }

static void score_tile(int rows, const float *q, int64_t head_size, const key_tile *tile, int64_t last, float *scores) {
#define CALL(dtype) score_panels(dtype, rows, q, head_size, tile, last, scores)
    FOR_DTYPE(tile->dtype, CALL)
#undef CALL
}

static void value_tile(
    int rows, const float *weights, const float *decay, const key_tile *tile, int64_t first, int64_t last,
    int64_t padded, float *values
) {
#define CALL(dtype) value_columns(dtype, rows, weights, decay, tile, first, last, padded, values)
    FOR_DTYPE(tile->dtype, CALL)
#undef CALL
}

/* Hides all but keys [first, last] of a row and returns the largest score. */
static float mask_row(float *scores, int64_t first, int64_t last) {
    const int is_open = first <= 0 && last >= HPC_TILE - 1;
    vf largest = vf_set1(-INFINITY);
    for (int v = 0; v < PANELS; v++) {
        vf score = vf_load(scores + v * HPC_LANES);
        if (!is_open) {
            vi key = vi_add(vi_iota(), vi_set1(v * HPC_LANES));
            vm seen = vm_and(vi_lt(vi_set1((int32_t)first - 1), key), vi_lt(key, vi_set1((int32_t)last + 1)));
            score = vf_select(seen, score, vf_set1(-INFINITY));
            vf_store(scores + v * HPC_LANES, score);
        }
        largest = vf_max(largest, score);
    }
    return vf_largest(largest);
}

/* Weights of a row in place of its scores; returns their sum. */
static float weigh_row(float *scores, float maximum) {
    vf weights[PANELS], shift = vf_set1(maximum);
    for (int v = 0; v < PANELS; v++) {
        weights[v] = vf_exp(vf_sub(vf_load(scores + v * HPC_LANES), shift));
        vf_store(scores + v * HPC_LANES, weights[v]);
    }
    return vf_sum(vf_add(vf_add(weights[0], weights[2]), vf_add(weights[1], weights[3])));
}

static int64_t first_key(int64_t position, int64_t window) {
    return window && position >= window ? position - window + 1 : 0;
}

/* Scores of a register tile to weights; brings maxima and denominators up to date and returns the decay in `decay`.
 * A row that has seen no key yet has the maximum -inf; 0 in its place makes all its weights and its decay 0. */
static void weigh_tile(
    int rows, float *scores, const int64_t *positions, int64_t base, int64_t window, float *maxima, float *sums,
    float *decay
) {
    float fallen[HPC_LANES] = {0}, added[ATTEND_ROWS];
    for (int r = 0; r < rows; r++) {
        float *row = scores + r * HPC_TILE;
        const float largest = mask_row(row, first_key(positions[r], window) - base, positions[r] - base);
        const float maximum = maxima[r] > largest ? maxima[r] : largest, shift = maximum > -INFINITY ? maximum : 0;
        fallen[r] = maxima[r] - shift;
        maxima[r] = maximum;
        added[r] = weigh_row(row, shift);
    }
    vf_store(decay, vf_exp(vf_load(fallen)));
    for (int r = 0; r < rows; r++) sums[r] = fmaf(sums[r], decay[r], added[r]);
}
