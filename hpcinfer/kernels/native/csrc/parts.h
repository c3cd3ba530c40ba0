/* Single steps of the calls in layer.h, for tests, and the table of this instruction set's functions. */
#include "kernels.h"

static void rms_norm(
    hpc_runtime *runtime, const float *x, const int64_t *index, const float *weight, double eps, hpc_rows *out
) {
#pragma omp parallel num_threads(runtime->threads)
    rms_norm_rows(x, index, weight, (float)eps, out, THREAD, TEAM);
}

static void quantise(hpc_runtime *runtime, const float *values, hpc_rows *out) {
#pragma omp parallel num_threads(runtime->threads)
    quantise_rows(values, out, THREAD, TEAM);
}

static void rotate_and_store_rows(
    hpc_runtime *runtime, const hpc_attention_layer *layer, const hpc_step *step, hpc_cache *cache, float *qkv
) {
#pragma omp parallel num_threads(runtime->threads)
    rotate_and_store(layer, step, cache, qkv, THREAD, TEAM);
}

static void attend_rows(
    hpc_runtime *runtime, const hpc_attention_layer *layer, const hpc_step *step, hpc_cache *cache, const float *qkv,
    float *heads
) {
#pragma omp parallel num_threads(runtime->threads)
    attend(layer, step, cache, qkv, heads, THREAD, TEAM);
}

const hpc_kernels HPC_TABLE = {
    .attention_half = attention_half,
    .mlp_half = mlp_half,
    .layers = layers,
    .logits = head_logits,
    .embed = embed,
    .add_residual = add_residual,
    .argmax = argmax,
    .grain_stats = grain_stats,
    .largest = largest,
    .exp = exp_array,
    .draw_ids = draw_ids,
    .product = product_of,
    .gated_product = gated_product_of,
    .rms_norm = rms_norm,
    .quantise = quantise,
    .rotate_and_store = rotate_and_store_rows,
    .attend = attend_rows,
};
