/* The calls that Python makes: one team of threads each, a barrier between the steps, products by panels of outputs. */
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

/* Scratch rows as input of a product with `weight`: float32, or codes where the weight is quantised. */
static hpc_rows make_rows(hpc_runtime *runtime, int set, int64_t num_rows, const hpc_weight *weight) {
    const int64_t runs = num_rows * weight->grains, first = set * HPC_PER_SET;
    hpc_rows rows = {num_rows, weight->grains, weight->num_in, weight->padded_in};
    const int64_t taken_bytes = runtime->threads * TAKEN_STRIDE * (int64_t)sizeof *rows.taken;
    rows.taken = memset(hpc_scratch(runtime, first + HPC_TAKEN, taken_bytes), 0, (size_t)taken_bytes);
    if (weight->kind == HPC_FLOAT32) {
        rows.stride = weight->grains * weight->num_in;
        rows.values = hpc_scratch(runtime, first + HPC_ROWS, num_rows * rows.stride * 4);
    } else {
        rows.codes = hpc_scratch(runtime, first + HPC_CODES, runs * weight->padded_in * bytes_of_input(weight));
        rows.scales = hpc_scratch(runtime, first + HPC_SCALES, runs * 4);
        rows.is_for_int8 = weight->kind == HPC_INT8;
        rows.sums = hpc_scratch(runtime, first + HPC_SUMS, runs * (weight->padded_in / HPC_GROUP + 1) * 4);
    }
    return rows;
}

static const int64_t ALL[2] = {0, 1}; /* the one span of a column-parallel product */

static void attention_half(
    hpc_runtime *runtime, const hpc_attention_layer *layer, const hpc_step *step, hpc_cache *cache, const float *x,
    const int64_t *spans, int64_t num_spans, float *nodes
) {
    const int64_t num_rows = step->num_tokens;
    float *qkv = hpc_scratch(runtime, HPC_WIDE, num_rows * layer->qkv->num_out * 4);
    float *heads = hpc_scratch(runtime, HPC_HEADS, num_rows * layer->grains * layer->grain_columns * 4);
    hpc_rows normed = make_rows(runtime, 0, num_rows, layer->qkv), outputs = make_rows(runtime, 1, num_rows, layer->o);
    const int threads = runtime->threads, is_quantised = outputs.codes != NULL;
    if (!is_quantised) outputs.values = heads;
    runtime->stamp = hpc_now();
#pragma omp parallel num_threads(threads)
    {
        const int thread = THREAD;
        rms_norm_rows(x, NULL, layer->norm, (float)layer->eps, &normed, thread, threads);
        end_phase(runtime, thread, HPC_OTHER);
        product(layer->qkv, &normed, ALL, 1, layer->qkv_bias, qkv, thread, threads);
        end_phase(runtime, thread, HPC_PRODUCTS);
        rotate_and_store(layer, step, cache, qkv, thread, threads);
        end_phase(runtime, thread, HPC_OTHER);
        attend(layer, step, cache, qkv, heads, thread, threads);
        end_phase(runtime, thread, HPC_ATTENTION);
        if (is_quantised) {
            quantise_rows(heads, &outputs, thread, threads);
            end_phase(runtime, thread, HPC_OTHER);
        }
        product(layer->o, &outputs, spans, num_spans, NULL, nodes, thread, threads);
    }
    add_seconds(runtime, HPC_PRODUCTS);
}

static void mlp_half(
    hpc_runtime *runtime, const hpc_mlp_layer *layer, const float *x, int64_t num_rows, const int64_t *spans,
    int64_t num_spans, float *nodes
) {
    const int64_t width = layer->grains * layer->width;
    hpc_rows normed = make_rows(runtime, 0, num_rows, layer->gate_up);
    hpc_rows inner = make_rows(runtime, 1, num_rows, layer->down);
    float *values = inner.values ? inner.values : hpc_scratch(runtime, HPC_WIDE, num_rows * width * 4);
    const int threads = runtime->threads;
    runtime->stamp = hpc_now();
#pragma omp parallel num_threads(threads)
    {
        const int thread = THREAD;
        rms_norm_rows(x, NULL, layer->norm, (float)layer->eps, &normed, thread, threads);
        end_phase(runtime, thread, HPC_OTHER);
        gated_product(layer->gate_up, &normed, layer->gate_up_bias, width, values, thread, threads);
        end_phase(runtime, thread, HPC_PRODUCTS);
        if (inner.codes) {
            quantise_rows(values, &inner, thread, threads);
            end_phase(runtime, thread, HPC_OTHER);
        }
        product(layer->down, &inner, spans, num_spans, NULL, nodes, thread, threads);
    }
    add_seconds(runtime, HPC_PRODUCTS);
}

/* All layers of a stack, x [T][D] in place; `sum` is as large. */
static void layers(hpc_runtime *runtime, const hpc_stack *stack, const hpc_step *step, float *x, float *sum) {
    const int64_t all[2] = {0, stack->grains}, num_rows = step->num_tokens;
    for (int64_t i = 0; i < stack->num_layers; i++) {
        const int64_t num_columns = stack->mlp[i]->down->num_out;
        attention_half(runtime, stack->attention[i], step, stack->caches[i], x, all, 1, sum);
        add_residual(runtime, x, sum, stack->o_biases[i], num_rows, num_columns, x);
        mlp_half(runtime, stack->mlp[i], x, num_rows, all, 1, sum);
        add_residual(runtime, x, sum, stack->down_biases[i], num_rows, num_columns, x);
    }
}

static void head_logits(
    hpc_runtime *runtime, const hpc_head *head, const float *x, const int64_t *index, int64_t num_rows, float *logits
) {
    hpc_rows normed = make_rows(runtime, 0, num_rows, head->weight);
    const int threads = runtime->threads;
    runtime->stamp = hpc_now();
#pragma omp parallel num_threads(threads)
    {
        const int thread = THREAD;
        rms_norm_rows(x, index, head->norm, (float)head->eps, &normed, thread, threads);
        end_phase(runtime, thread, HPC_OTHER);
        product(head->weight, &normed, ALL, 1, NULL, logits, thread, threads);
    }
    add_seconds(runtime, HPC_PRODUCTS);
}

/* Rows of a product alone, for tests: `values`, quantised if the weight is quantised. */
static hpc_rows rows_of_values(hpc_runtime *runtime, const hpc_weight *weight, float *values, int64_t num_rows) {
    hpc_rows rows = make_rows(runtime, 0, num_rows, weight);
    if (rows.codes) quantise_rows(values, &rows, 0, 1);
    else rows.values = values;
    return rows;
}

static void product_of(
    hpc_runtime *runtime, const hpc_weight *weight, float *values, int64_t num_rows, const int64_t *spans,
    int64_t num_spans, const float *bias, float *nodes
) {
    const hpc_rows rows = rows_of_values(runtime, weight, values, num_rows);
#pragma omp parallel num_threads(runtime->threads)
    product(weight, &rows, spans, num_spans, bias, nodes, THREAD, runtime->threads);
}

static void gated_product_of(
    hpc_runtime *runtime, const hpc_weight *weight, float *values, int64_t num_rows, int64_t num_gates,
    const float *bias, float *out
) {
    const hpc_rows rows = rows_of_values(runtime, weight, values, num_rows);
#pragma omp parallel num_threads(runtime->threads)
    gated_product(weight, &rows, bias, num_gates, out, THREAD, runtime->threads);
}
