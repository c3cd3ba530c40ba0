/* The calls that Python makes: one team of threads each, a barrier between the steps, products by panels of outputs. */

/* Scratch rows as input of a product with `weight`: float32, or codes where the weight is quantised. Whether there was
 * memory for them is to be asked for: has_all_scratch. float32 rows stand at `values` if it is given. */
static hpc_rows make_rows(
    hpc_runtime *runtime, int set, int64_t num_rows, const hpc_weight *weight, float *values
) {
    const int64_t runs = num_rows * weight->grains, first = set * HPC_PER_SET;
    hpc_rows rows = {num_rows, weight->grains, weight->num_in, weight->padded_in};
    const int64_t taken_bytes = runtime->threads * TAKEN_STRIDE * (int64_t)sizeof *rows.taken;
    rows.taken = hpc_scratch(runtime, first + HPC_TAKEN, taken_bytes);
    if (rows.taken) memset(rows.taken, 0, (size_t)taken_bytes);
    if (weight->kind == HPC_FLOAT32) {
        rows.stride = weight->grains * weight->num_in;
        rows.values = values ? values : hpc_scratch(runtime, first + HPC_ROWS, num_rows * rows.stride * 4);
    } else {
        rows.codes = hpc_scratch(runtime, first + HPC_CODES, runs * weight->padded_in * bytes_of_input(weight));
        rows.scales = hpc_scratch(runtime, first + HPC_SCALES, runs * 4);
        rows.is_for_int8 = weight->kind == HPC_INT8;
        rows.sums = hpc_scratch(runtime, first + HPC_SUMS, runs * (weight->padded_in / HPC_GROUP + 1) * 4);
    }
    return rows;
}

static const int64_t ALL[2] = {0, 1}; /* the one span of a column-parallel product */

typedef struct {
    float *qkv, *heads;
    hpc_rows normed, outputs;
} attention_scratch;

static attention_scratch attention_scratch_of(
    hpc_runtime *runtime, const hpc_attention_layer *layer, int64_t num_rows
) {
    attention_scratch to;
    to.qkv = hpc_scratch(runtime, HPC_WIDE, num_rows * layer->qkv->num_out * 4);
    to.heads = hpc_scratch(runtime, HPC_HEADS, num_rows * layer->grains * layer->grain_columns * 4);
    to.normed = make_rows(runtime, 0, num_rows, layer->qkv, NULL);
    to.outputs = make_rows(runtime, 1, num_rows, layer->o, to.heads);
    return to;
}

static int attention_half(
    hpc_runtime *runtime, const hpc_attention_layer *layer, const hpc_step *step, hpc_cache *cache, const float *x,
    const int64_t *spans, int64_t num_spans, float *nodes
) {
    attention_scratch to = attention_scratch_of(runtime, layer, step->num_tokens);
    if (!has_all_scratch(runtime)) return 0;
    begin_phase(runtime);
#pragma omp parallel num_threads(runtime->threads)
    {
        const int thread = THREAD, threads = TEAM;
        rms_norm_rows(x, NULL, layer->norm, (float)layer->eps, &to.normed, thread, threads);
        end_phase(runtime, thread, HPC_OTHER);
        product(layer->qkv, &to.normed, ALL, 1, layer->qkv_bias, to.qkv, thread, threads);
        end_phase(runtime, thread, HPC_PRODUCTS);
        rotate_and_store(layer, step, cache, to.qkv, thread, threads);
        end_phase(runtime, thread, HPC_OTHER);
        attend(layer, step, cache, to.qkv, to.heads, thread, threads);
        end_phase(runtime, thread, HPC_ATTENTION);
        if (to.outputs.codes) {
            quantise_rows(to.heads, &to.outputs, thread, threads);
            end_phase(runtime, thread, HPC_OTHER);
        }
        product(layer->o, &to.outputs, spans, num_spans, NULL, nodes, thread, threads);
    }
    add_seconds(runtime, HPC_PRODUCTS);
    return 1;
}

typedef struct {
    float *values;
    hpc_rows normed, inner;
} mlp_scratch;

static mlp_scratch mlp_scratch_of(hpc_runtime *runtime, const hpc_mlp_layer *layer, int64_t num_rows) {
    mlp_scratch to;
    to.values = hpc_scratch(runtime, HPC_WIDE, num_rows * layer->grains * layer->width * 4);
    to.normed = make_rows(runtime, 0, num_rows, layer->gate_up, NULL);
    to.inner = make_rows(runtime, 1, num_rows, layer->down, to.values);
    return to;
}

static int mlp_half(
    hpc_runtime *runtime, const hpc_mlp_layer *layer, const float *x, int64_t num_rows, const int64_t *spans,
    int64_t num_spans, float *nodes
) {
    const int64_t width = layer->grains * layer->width;
    mlp_scratch to = mlp_scratch_of(runtime, layer, num_rows);
    if (!has_all_scratch(runtime)) return 0;
    begin_phase(runtime);
#pragma omp parallel num_threads(runtime->threads)
    {
        const int thread = THREAD, threads = TEAM;
        rms_norm_rows(x, NULL, layer->norm, (float)layer->eps, &to.normed, thread, threads);
        end_phase(runtime, thread, HPC_OTHER);
        gated_product(layer->gate_up, &to.normed, layer->gate_up_bias, width, to.values, thread, threads);
        end_phase(runtime, thread, HPC_PRODUCTS);
        if (to.inner.codes) {
            quantise_rows(to.values, &to.inner, thread, threads);
            end_phase(runtime, thread, HPC_OTHER);
        }
        product(layer->down, &to.inner, spans, num_spans, NULL, nodes, thread, threads);
    }
    add_seconds(runtime, HPC_PRODUCTS);
    return 1;
}

/* All layers of a stack, x [T][D] in place, which is as it was where there is no memory; `sum` is as large. */
static int layers(hpc_runtime *runtime, const hpc_stack *stack, const hpc_step *step, float *x, float *sum) {
    const int64_t all[2] = {0, stack->grains}, num_rows = step->num_tokens;
    for (int64_t i = 0; i < stack->num_layers; i++) {
        attention_scratch_of(runtime, stack->attention[i], num_rows);
        mlp_scratch_of(runtime, stack->mlp[i], num_rows);
    }
    if (!has_all_scratch(runtime)) return 0;
    for (int64_t i = 0; i < stack->num_layers; i++) {
        const int64_t num_columns = stack->mlp[i]->down->num_out;
        attention_half(runtime, stack->attention[i], step, stack->caches[i], x, all, 1, sum);
        add_residual(runtime, x, sum, stack->o_biases[i], num_rows, num_columns, x);
        mlp_half(runtime, stack->mlp[i], x, num_rows, all, 1, sum);
        add_residual(runtime, x, sum, stack->down_biases[i], num_rows, num_columns, x);
    }
    return 1;
}

static int head_logits(
    hpc_runtime *runtime, const hpc_head *head, const float *x, const int64_t *index, int64_t num_rows, float *logits
) {
    hpc_rows normed = make_rows(runtime, 0, num_rows, head->weight, NULL);
    if (!has_all_scratch(runtime)) return 0;
    begin_phase(runtime);
#pragma omp parallel num_threads(runtime->threads)
    {
        const int thread = THREAD, threads = TEAM;
        rms_norm_rows(x, index, head->norm, (float)head->eps, &normed, thread, threads);
        end_phase(runtime, thread, HPC_OTHER);
        product(head->weight, &normed, ALL, 1, NULL, logits, thread, threads);
    }
    add_seconds(runtime, HPC_PRODUCTS);
    return 1;
}

/* Rows of a product alone, for tests, which have the memory: `values`, quantised if the weight is quantised. */
static hpc_rows rows_of_values(hpc_runtime *runtime, const hpc_weight *weight, float *values, int64_t num_rows) {
    hpc_rows rows = make_rows(runtime, 0, num_rows, weight, values);
    if (rows.codes) quantise_rows(values, &rows, 0, 1);
    return rows;
}

static void product_of(
    hpc_runtime *runtime, const hpc_weight *weight, float *values, int64_t num_rows, const int64_t *spans,
    int64_t num_spans, const float *bias, float *nodes
) {
    const hpc_rows rows = rows_of_values(runtime, weight, values, num_rows);
#pragma omp parallel num_threads(runtime->threads)
    product(weight, &rows, spans, num_spans, bias, nodes, THREAD, TEAM);
}

static void gated_product_of(
    hpc_runtime *runtime, const hpc_weight *weight, float *values, int64_t num_rows, int64_t num_gates,
    const float *bias, float *out
) {
    const hpc_rows rows = rows_of_values(runtime, weight, values, num_rows);
#pragma omp parallel num_threads(runtime->threads)
    gated_product(weight, &rows, bias, num_gates, out, THREAD, TEAM);
}
