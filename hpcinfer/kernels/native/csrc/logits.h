/* Rows around the layers: embedding, residuals, and what sampling asks of logits. */

enum { TEAM_ROWS = 8, TEAM_VALUES = 4096 }; /* fewer are done before a team has come together */

/* A row of a table as float32, -0 as 0: as it is when ranks add their zeros. */
static void embed_row(int64_t dtype, const char *table, float scale, int64_t first, int64_t n, float *out) {
    const vf factor = vf_set1(scale);
    int64_t i = 0;
    for (; i + HPC_LANES <= n; i += HPC_LANES)
        vf_store(out + i, vf_add(vf_mul(decode(dtype, table, first + i), factor), vf_zero()));
    if (i < n) {
        char rest[HPC_LANES * 4] = {0};
        const int64_t bytes = element_bytes(dtype);
        memcpy(rest, table + (first + i) * bytes, (size_t)((n - i) * bytes));
        vf_store_tail(out + i, vf_add(vf_mul(decode(dtype, rest, 0), factor), vf_zero()), n - i);
    }
}

/* Row of a table [G][U] that holds an id; -1 if none does. */
static int64_t row_of_id(int64_t id, const int64_t *starts, const int64_t *sizes, int64_t grains, int64_t units) {
    for (int64_t grain = 0; grain < grains; grain++)
        if (id >= starts[grain] && id < starts[grain] + sizes[grain]) return grain * units + id - starts[grain];
    return -1;
}

static void embed(
    hpc_runtime *runtime, int64_t dtype, const char *table, const float *scales, int64_t rows_per_grain,
    int64_t num_columns, const int64_t *grain_starts, const int64_t *grain_sizes, int64_t grains,
    const int64_t *token_ids, int64_t num_tokens, float *out
) {
    begin_phase(runtime);
#pragma omp parallel for num_threads(runtime->threads) if (num_tokens >= TEAM_ROWS)
    for (int64_t token = 0; token < num_tokens; token++) {
        const int64_t row = row_of_id(token_ids[token], grain_starts, grain_sizes, grains, rows_per_grain);
        float *target = out + token * num_columns;
        if (row < 0) memset(target, 0, (size_t)num_columns * 4);
        else embed_row(dtype, table, scales ? scales[row] : 1.0f, row * num_columns, num_columns, target);
    }
    add_seconds(runtime, HPC_OTHER);
}

/* x + (total + bias), or x + total. */
INLINE vf residual_lanes(vf x, vf total, const float *bias, int64_t n) {
    return vf_add(x, bias ? vf_add(total, load_up_to(bias, n)) : total);
}

static void add_residual_row(const float *x, const float *total, const float *bias, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + HPC_LANES <= n; i += HPC_LANES)
        vf_store(out + i, residual_lanes(vf_load(x + i), vf_load(total + i), bias ? bias + i : NULL, HPC_LANES));
    if (i < n) {
        const vf a = vf_load_tail(x + i, n - i), b = vf_load_tail(total + i, n - i);
        vf_store_tail(out + i, residual_lanes(a, b, bias ? bias + i : NULL, n - i), n - i);
    }
}

static void add_residual(
    hpc_runtime *runtime, const float *x, const float *total, const float *bias, int64_t num_rows, int64_t num_columns,
    float *out
) {
    begin_phase(runtime);
#pragma omp parallel for num_threads(runtime->threads) if (num_rows >= TEAM_ROWS)
    for (int64_t row = 0; row < num_rows; row++) {
        const int64_t first = row * num_columns;
        add_residual_row(x + first, total + first, bias, num_columns, out + first);
    }
    add_seconds(runtime, HPC_OTHER);
}

/* The largest of n values; -inf if there are none, or only NaN. */
static float largest_value(const float *x, int64_t n) {
    vf largest = vf_set1(-INFINITY);
    int64_t i = 0;
    for (; i + HPC_LANES <= n; i += HPC_LANES) largest = vf_max(vf_load(x + i), largest);
    float result = vf_largest(largest);
    for (; i < n; i++) result = x[i] > result ? x[i] : result;
    return result;
}

/* The largest true logit of a row [G][U], and its place among the true ones; the lowest of equals. */
static void argmax_row(
    const float *row, const int64_t *sizes, int64_t grains, int64_t columns, float *value, int64_t *place
) {
    int64_t first = 0;
    *value = -INFINITY;
    *place = 0;
    for (int64_t grain = 0; grain < grains; first += sizes[grain++], row += columns) {
        const float largest = largest_value(row, sizes[grain]);
        if (!(largest > *value)) continue;
        int64_t i = 0;
        while (row[i] != largest) i++;
        *value = row[i];
        *place = first + i;
    }
}

static void argmax(
    hpc_runtime *runtime, const float *logits, const int64_t *sizes, int64_t num_rows, int64_t grains, int64_t columns,
    float *values, int64_t *places
) {
    begin_phase(runtime);
#pragma omp parallel for num_threads(runtime->threads) if (num_rows > 1)
    for (int64_t row = 0; row < num_rows; row++)
        argmax_row(logits + row * grains * columns, sizes, grains, columns, values + row, places + row);
    add_seconds(runtime, HPC_SAMPLING);
}

/* Sum of exp(x - maximum); lane i adds elements i, i + 16, ... in order. */
static float exp_sum(const float *x, int64_t n, float maximum) {
    const vf shift = vf_set1(maximum);
    vf sum = vf_zero();
    int64_t i = 0;
    for (; i + HPC_LANES <= n; i += HPC_LANES) sum = vf_add(sum, vf_exp(vf_sub(vf_load(x + i), shift)));
    if (i < n) {
        float rest[HPC_LANES];
        vf_store(rest, vf_set1(-INFINITY)); /* whose exponential is 0 */
        memcpy(rest, x + i, (size_t)(n - i) * 4);
        sum = vf_add(sum, vf_exp(vf_sub(vf_load(rest), shift)));
    }
    return vf_sum(sum);
}

static void grain_stats(
    hpc_runtime *runtime, const float *logits, const int64_t *sizes, int64_t num_rows, int64_t grains, int64_t columns,
    float *maxima, float *sums
) {
    begin_phase(runtime);
#pragma omp parallel for num_threads(runtime->threads)
    for (int64_t i = 0; i < num_rows * grains; i++) {
        const float *x = logits + i * columns;
        const int64_t n = sizes[i % grains];
        maxima[i] = largest_value(x, n);
        sums[i] = exp_sum(x, n, maxima[i] == -INFINITY ? 0.0f : maxima[i]);
    }
    add_seconds(runtime, HPC_SAMPLING);
}

/* Whether a comes before b: value descending, place ascending, NaN last. */
static inline int comes_before(const float *row, int64_t a, int64_t b) {
    const float x = row[a], y = row[b];
    if (x > y || x < y) return x > y;
    const int x_is_nan = x != x, y_is_nan = y != y;
    return x_is_nan != y_is_nan ? y_is_nan : a < b;
}

/* Let the place at the top of a heap sink until no child comes after it. */
static void sink(const float *row, int64_t *heap, int64_t size, int64_t node) {
    const int64_t place = heap[node];
    for (int64_t child; (child = 2 * node + 1) < size; node = child) {
        if (child + 1 < size && comes_before(row, heap[child], heap[child + 1])) child++;
        if (!comes_before(row, place, heap[child])) break;
        heap[node] = heap[child];
    }
    heap[node] = place;
}

/* A heap of the best so far, the last of them on top; then it is sorted in place. */
static void largest_places(const float *row, int64_t size, int64_t count, int64_t *places) {
    if (count == 0) return;
    for (int64_t i = 0; i < count; i++) places[i] = i;
    for (int64_t node = count / 2; node-- > 0;) sink(row, places, count, node);
    for (int64_t i = count; i < size; i++)
        if (comes_before(row, i, places[0])) {
            places[0] = i;
            sink(row, places, count, 0);
        }
    for (int64_t left = count - 1; left > 0; left--) {
        const int64_t last = places[0];
        places[0] = places[left];
        places[left] = last;
        sink(row, places, left, 0);
    }
}

static void largest(hpc_runtime *runtime, const float *row, int64_t size, int64_t count, int64_t *places) {
    begin_phase(runtime);
    largest_places(row, size, count, places);
    add_seconds(runtime, HPC_SAMPLING);
}

static void exp_array(hpc_runtime *runtime, float *values, int64_t size) {
    begin_phase(runtime);
#pragma omp parallel for num_threads(runtime->threads) if (size >= TEAM_VALUES)
    for (int64_t i = 0; i < size; i += HPC_LANES) {
        const int64_t n = size - i < HPC_LANES ? size - i : HPC_LANES;
        vf_store_tail(values + i, vf_exp(vf_load_tail(values + i, n)), n);
    }
    add_seconds(runtime, HPC_SAMPLING);
}
