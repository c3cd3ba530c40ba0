/* The choice of the instruction set, and the public functions, which call those of the chosen one. */
#include <string.h>

#include "kernels.h"
#include "runtime.h"

typedef struct {
    const char *name;
    const hpc_kernels *kernels;
} variant;

static const variant VARIANTS[] = { /* best first */
#if defined(__x86_64__)
    {"avx512vnni", &hpc_avx512vnni}, {"avx512", &hpc_avx512}, {"avx2", &hpc_avx2},
#elif defined(__aarch64__)
    {"neon", &hpc_neon},
#endif
    {"plain", &hpc_plain},
};
enum { NUM_VARIANTS = sizeof VARIANTS / sizeof *VARIANTS };

static const variant *chosen;

static int is_possible(const variant *each) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                       && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (each->kernels == &hpc_avx512vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
    if (each->kernels == &hpc_avx512) return avx512;
    if (each->kernels == &hpc_avx2) return avx2;
#endif
    return each->kernels != NULL;
}

int hpc_use(const char *isa) {
    for (int i = 0; i < NUM_VARIANTS; i++)
        if (!strcmp(VARIANTS[i].name, isa) && is_possible(&VARIANTS[i])) {
            chosen = &VARIANTS[i];
            return 1;
        }
    return 0;
}

static const variant *in_use(void) {
    for (int i = 0; !chosen; i++)
        if (is_possible(&VARIANTS[i])) chosen = &VARIANTS[i];
    return chosen;
}

static const hpc_kernels *table(void) {
    hpc_use_default_rounding();
    return in_use()->kernels;
}

const char *hpc_isa(void) { return in_use()->name; }

const char *hpc_isas(void) {
    static char names[64];
    names[0] = 0;
    for (int i = 0; i < NUM_VARIANTS; i++)
        if (is_possible(&VARIANTS[i])) strcat(strcat(names, *names ? " " : ""), VARIANTS[i].name);
    return names;
}

int hpc_attention_half(
    hpc_runtime *runtime, const hpc_attention_layer *layer, const hpc_step *step, hpc_cache *cache, const float *x,
    const int64_t *spans, int64_t num_spans, float *nodes
) {
    return table()->attention_half(runtime, layer, step, cache, x, spans, num_spans, nodes);
}

int hpc_mlp_half(
    hpc_runtime *runtime, const hpc_mlp_layer *layer, const float *x, int64_t num_rows, const int64_t *spans,
    int64_t num_spans, float *nodes
) {
    return table()->mlp_half(runtime, layer, x, num_rows, spans, num_spans, nodes);
}

int hpc_layers(hpc_runtime *runtime, const hpc_stack *stack, const hpc_step *step, float *x, float *sum) {
    return table()->layers(runtime, stack, step, x, sum);
}

int hpc_logits(
    hpc_runtime *runtime, const hpc_head *head, const float *x, const int64_t *index, int64_t num_rows, float *logits
) {
    return table()->logits(runtime, head, x, index, num_rows, logits);
}

void hpc_embed(
    hpc_runtime *runtime, int64_t dtype, const char *values, const float *scales, int64_t rows_per_grain,
    int64_t num_columns, const int64_t *grain_starts, const int64_t *grain_sizes, int64_t grains,
    const int64_t *token_ids, int64_t num_tokens, float *out
) {
    table()->embed(
        runtime, dtype, values, scales, rows_per_grain, num_columns, grain_starts, grain_sizes, grains, token_ids,
        num_tokens, out);
}

void hpc_add_residual(
    hpc_runtime *runtime, const float *x, const float *total, const float *bias, int64_t num_rows, int64_t num_columns,
    float *out
) {
    table()->add_residual(runtime, x, total, bias, num_rows, num_columns, out);
}

void hpc_argmax(
    hpc_runtime *runtime, const float *logits, const int64_t *sizes, int64_t num_rows, int64_t grains, int64_t columns,
    float *values, int64_t *places
) {
    table()->argmax(runtime, logits, sizes, num_rows, grains, columns, values, places);
}

void hpc_grain_stats(
    hpc_runtime *runtime, const float *logits, const int64_t *sizes, int64_t num_rows, int64_t grains, int64_t columns,
    float *maxima, float *sums
) {
    table()->grain_stats(runtime, logits, sizes, num_rows, grains, columns, maxima, sums);
}

void hpc_largest(hpc_runtime *runtime, const float *row, int64_t size, int64_t count, int64_t *places) {
    table()->largest(runtime, row, size, count, places);
}

void hpc_exp(hpc_runtime *runtime, float *values, int64_t size) { table()->exp(runtime, values, size); }

int hpc_draw_ids(
    hpc_runtime *runtime, const float *logits, const int64_t *sizes, int64_t num_rows, int64_t grains, int64_t columns,
    const hpc_draw *draws, const hpc_changes *changes, int64_t *ids, float *values
) {
    return table()->draw_ids(runtime, logits, sizes, num_rows, grains, columns, draws, changes, ids, values);
}

void hpc_product(
    hpc_runtime *runtime, const hpc_weight *weight, float *values, int64_t num_rows, const int64_t *spans,
    int64_t num_spans, const float *bias, float *nodes
) {
    table()->product(runtime, weight, values, num_rows, spans, num_spans, bias, nodes);
}

void hpc_gated_product(
    hpc_runtime *runtime, const hpc_weight *weight, float *values, int64_t num_rows, int64_t num_gates,
    const float *bias, float *out
) {
    table()->gated_product(runtime, weight, values, num_rows, num_gates, bias, out);
}

void hpc_rms_norm(
    hpc_runtime *runtime, const float *x, const int64_t *index, const float *weight, double eps, hpc_rows *out
) {
    table()->rms_norm(runtime, x, index, weight, eps, out);
}

void hpc_quantise(hpc_runtime *runtime, const float *values, hpc_rows *out) { table()->quantise(runtime, values, out); }

void hpc_rotate_and_store(
    hpc_runtime *runtime, const hpc_attention_layer *layer, const hpc_step *step, hpc_cache *cache, float *qkv
) {
    table()->rotate_and_store(runtime, layer, step, cache, qkv);
}

void hpc_attend(
    hpc_runtime *runtime, const hpc_attention_layer *layer, const hpc_step *step, hpc_cache *cache, const float *qkv,
    float *heads
) {
    table()->attend(runtime, layer, step, cache, qkv, heads);
}
