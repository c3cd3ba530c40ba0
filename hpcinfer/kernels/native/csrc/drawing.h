/* The choice of an id from a row of logits. Operations and their order are those of hpcinfer.kernels.sampling: weights
 * in float32, sums in float64, each of them by one thread. */

enum { WEIGHT_BLOCK = 256 }; /* weights that are added together first */
enum { DIGITS = 256, NUM_DIGITS = 4 };

/* What a thread needs for a row of `size` logits, filled up to whole blocks with those of ids that are forbidden. */
typedef struct {
    int64_t size, num_blocks;
    float *values, *weights;      /* [num_blocks][WEIGHT_BLOCK] */
    float *peaks;                 /* [num_blocks] */
    double *sums;                 /* [num_blocks]: of this block and those before */
    uint64_t *order, *spare;      /* [size]: ids, to be sorted */
} draw_scratch;

static int64_t draw_scratch_bytes(int64_t size) {
    const int64_t num_blocks = (size + WEIGHT_BLOCK - 1) / WEIGHT_BLOCK;
    const int64_t bytes = num_blocks * (WEIGHT_BLOCK * 2 * 4 + 4 + 8) + size * 2 * 8;
    return (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
}

static draw_scratch draw_scratch_at(char *memory, int64_t size) {
    const int64_t num_blocks = (size + WEIGHT_BLOCK - 1) / WEIGHT_BLOCK;
    draw_scratch to = {.size = size, .num_blocks = num_blocks};
    to.order = (uint64_t *)memory;
    to.spare = to.order + size;
    to.sums = (double *)(to.spare + size);
    to.values = (float *)(to.sums + num_blocks);
    to.weights = to.values + num_blocks * WEIGHT_BLOCK;
    to.peaks = to.weights + num_blocks * WEIGHT_BLOCK;
    return to;
}

/* The true logits of a row [G][U], changed; NaN becomes -inf, and -0 becomes 0. */
static void take_row(
    const draw_scratch *to, const float *row, const int64_t *sizes, int64_t grains, int64_t columns,
    const hpc_changes *changes, int64_t number
) {
    float *values = to->values;
    for (int64_t grain = 0; grain < grains; values += sizes[grain++], row += columns)
        memcpy(values, row, (size_t)sizes[grain] * 4);
    for (int64_t i = changes ? changes->starts[number] : 0; changes && i < changes->starts[number + 1]; i++) {
        float *value = to->values + changes->places[i];
        const float biased = *value + changes->biases[i], factor = changes->factors[i];
        *value = (biased > 0 ? biased / factor : biased * factor) - changes->penalties[i];
    }
    for (int64_t i = to->size; i < to->num_blocks * WEIGHT_BLOCK; i++) to->values[i] = -INFINITY;
    for (int64_t block = 0; block < to->num_blocks; block++) {
        float *first = to->values + block * WEIGHT_BLOCK;
        vf largest = vf_set1(-INFINITY);
        for (int64_t i = 0; i < WEIGHT_BLOCK; i += HPC_LANES) {
            const vf x = vf_load(first + i);
            const vm is_number = vf_lt(vf_set1(-1), vf_abs(x));
            const vf value = vf_select(is_number, vf_add(x, vf_zero()), vf_set1(-INFINITY));
            vf_store(first + i, value);
            largest = vf_max(value, largest);
        }
        to->peaks[block] = vf_largest(largest);
    }
}

static double block_sum(const float *weights) {
    double sums[WEIGHT_BLOCK / 2];
    for (int i = 0; i < WEIGHT_BLOCK / 2; i++) sums[i] = (double)weights[i] + (double)weights[i + WEIGHT_BLOCK / 2];
    for (int half = WEIGHT_BLOCK / 4; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

/* What becomes weights: probabilities in units of the highest one, 0 below min_p. */
typedef struct {
    float peak, temperature, least;
} draw_scale;

INLINE vf weights_of(vf values, draw_scale scale) {
    const vf weights = vf_exp(vf_div(vf_sub(values, vf_set1(scale.peak)), vf_set1(scale.temperature)));
    return vf_select(vf_lt(weights, vf_set1(scale.least)), vf_zero(), weights);
}

/* The weights of all ids, and their sums. */
static void weigh_all(const draw_scratch *to, draw_scale scale) {
    double sum = 0;
    for (int64_t block = 0; block < to->num_blocks; block++) {
        const int64_t start = block * WEIGHT_BLOCK;
        for (int64_t i = start; i < start + WEIGHT_BLOCK; i += HPC_LANES)
            vf_store(to->weights + i, weights_of(vf_load(to->values + i), scale));
        to->sums[block] = sum = sum + block_sum(to->weights + start);
    }
}

static int64_t id_of(uint64_t key) { return (int64_t)(key & UINT32_MAX); }

/* The weights of some ids, and their sum in this order. */
static double weigh_some(const draw_scratch *to, draw_scale scale, const uint64_t *keys, int64_t count) {
    double sum = 0;
    for (int64_t start = 0; start < count; start += HPC_LANES) {
        const int64_t n = count - start < HPC_LANES ? count - start : HPC_LANES;
        float lanes[HPC_LANES] = {0};
        for (int64_t i = 0; i < n; i++) lanes[i] = to->values[id_of(keys[start + i])];
        vf_store(lanes, weights_of(vf_load(lanes), scale));
        for (int64_t i = 0; i < n; i++) sum += (double)(to->weights[id_of(keys[start + i])] = lanes[i]);
    }
    return sum;
}

/* The id where the running sum of all weights, by id, passes the share u: first the block, then the id in it. */
static int64_t draw_by_id(const draw_scratch *from, double u) {
    const int64_t last = from->num_blocks - 1;
    const double wanted = u * from->sums[last];
    int64_t block = 0;
    while (block < last && !(from->sums[block] > wanted)) block++;
    const float *weights = from->weights + block * WEIGHT_BLOCK;
    const double inside = wanted - (block ? from->sums[block - 1] : 0);
    double whole = 0, sum = 0;
    for (int i = 0; i < WEIGHT_BLOCK; i++) whole += (double)weights[i];
    for (int i = 0;; i++) { /* rounding must not choose what has no weight: no further than where the sum is whole */
        sum += (double)weights[i];
        if (sum > inside || sum == whole) return block * WEIGHT_BLOCK + i;
    }
}

/* Sort by the upper half of each key, ascending; equal ones stay in order. They are in `keys` or `spare` then. */
static uint64_t *sort_keys(uint64_t *keys, uint64_t *spare, int64_t count) {
    int64_t starts[NUM_DIGITS][DIGITS] = {{0}};
    for (int64_t i = 0; i < count; i++)
        for (int digit = 0; digit < NUM_DIGITS; digit++) starts[digit][keys[i] >> (32 + 8 * digit) & (DIGITS - 1)]++;
    for (int digit = 0; digit < NUM_DIGITS; digit++) {
        int64_t *places = starts[digit], before = 0;
        for (int value = 0; value < DIGITS; value++) {
            const int64_t found = places[value];
            places[value] = before;
            before += found;
        }
        for (int64_t i = 0; i < count; i++) spare[places[keys[i] >> (32 + 8 * digit) & (DIGITS - 1)]++] = keys[i];
        uint64_t *sorted = spare;
        spare = keys;
        keys = sorted;
    }
    return keys;
}

/* A key that is lower for a higher value, and the id below it. */
static uint64_t key_of(float value, int64_t id) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)~rising << 32 | (uint64_t)id;
}

/* The ids whose logits are no less than `least`, to from->order; returns how many. */
static int64_t collect(const draw_scratch *from, float least) {
    int64_t count = 0;
    for (int64_t block = 0; block < from->num_blocks; block++) {
        if (from->peaks[block] < least) continue;
        const int64_t start = block * WEIGHT_BLOCK, left = from->size - start;
        for (int64_t id = start; id < start + (left < WEIGHT_BLOCK ? left : WEIGHT_BLOCK); id++)
            if (!(from->values[id] < least)) from->order[count++] = key_of(from->values[id], id);
    }
    return count;
}

/* Whether so many ids with the highest logits are enough: top_k, or near `wanted`, in weights. */
static int are_enough(const draw_scratch *from, const hpc_draw *draw, int64_t count, double wanted) {
    if (draw->top_k > 0) return count >= draw->top_k;
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (double)from->weights[id_of(from->order[i])];
    return sum >= wanted * (1 - 1e-6); /* in another order than that which decides */
}

/* The id at the share u of those, in this order, up to the first at which the sum of weights reaches `wanted`; -1 where
 * none reaches it and there are others. */
static int64_t draw_in_order(
    const float *weights, const uint64_t *order, int64_t count, int has_others, double wanted, double u
) {
    double whole = 0, sum = 0;
    int64_t kept = 0;
    while (kept < count && (kept == 0 || whole < wanted)) whole += (double)weights[id_of(order[kept++])];
    if (whole < wanted && has_others) return -1;
    for (int64_t i = 0;; i++) {
        sum += (double)weights[id_of(order[i])];
        if (sum > u * whole || i == kept - 1) return id_of(order[i]);
    }
}

/* From the top_k highest logits, and of these from those that hold top_p of the weights. Only as many are sorted as may
 * be needed: those within some distance of the peak. */
static int64_t draw_highest(const draw_scratch *from, const hpc_draw *draw, draw_scale scale) {
    double wanted = draw->top_k > 0 ? 0 : draw->top_p * from->sums[from->num_blocks - 1];
    for (float distance = 0.5f;; distance *= 2) {
        const float least = distance > 128 ? -INFINITY : scale.peak - distance * scale.temperature;
        const int is_all = least == -INFINITY;
        int64_t count = collect(from, least);
        if (!is_all && !are_enough(from, draw, count, wanted)) continue;
        const uint64_t *order = sort_keys(from->order, from->spare, count);
        if (draw->top_k > 0) {
            count = draw->top_k < count ? draw->top_k : count;
            const double whole = weigh_some(from, scale, order, count);
            wanted = draw->top_p < 1 ? draw->top_p * whole : INFINITY;
        }
        const int64_t id = draw_in_order(from->weights, order, count, !is_all && draw->top_k <= 0, wanted, draw->u);
        if (id >= 0) return id;
    }
}

static int64_t draw_id(const draw_scratch *row, const hpc_draw *draw) {
    const float peak = largest_value(row->peaks, row->num_blocks);
    if (draw->temperature == 0 || !isfinite(peak)) { /* or every id is forbidden: no distribution to draw from */
        int64_t id = 0;
        while (id + 1 < row->size && row->values[id] != peak) id++;
        return id;
    }
    const draw_scale scale = {peak, (float)draw->temperature, draw->min_p > 0 ? (float)draw->min_p : 0};
    if (draw->top_k <= 0) weigh_all(row, scale);
    return draw->top_k > 0 || draw->top_p < 1 ? draw_highest(row, draw, scale) : draw_by_id(row, draw->u);
}

static int draw_ids(
    hpc_runtime *runtime, const float *logits, const int64_t *sizes, int64_t num_rows, int64_t grains, int64_t columns,
    const hpc_draw *draws, const hpc_changes *changes, int64_t *ids, float *values
) {
    int64_t size = 0, taken = 0;
    for (int64_t grain = 0; grain < grains; grain++) size += sizes[grain];
    const int64_t bytes = draw_scratch_bytes(size);
    const int64_t num_busy = num_rows < runtime->threads ? num_rows : runtime->threads; /* threads with rows to draw */
    char *memory = hpc_scratch(runtime, HPC_DRAWING, num_busy * bytes);
    if (!has_all_scratch(runtime)) return 0;
    begin_phase(runtime);
#pragma omp parallel num_threads(runtime->threads) if (num_rows > 1)
    if (THREAD < num_busy) {
        const draw_scratch row = draw_scratch_at(memory + THREAD * bytes, size);
        for (int64_t i; (i = take_next(&taken, 0)) < num_rows;) {
            ids[i] = draws[i].known_id;
            if (ids[i] >= 0) continue;
            take_row(&row, logits + i * grains * columns, sizes, grains, columns, changes, i);
            ids[i] = draw_id(&row, draws + i);
            values[i] = size > 0 ? row.values[ids[i]] : -INFINITY;
        }
    }
    add_seconds(runtime, HPC_SAMPLING);
    return 1;
}
