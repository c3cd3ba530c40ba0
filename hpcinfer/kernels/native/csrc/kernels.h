/* The table of functions that each instruction set exports, and the tables that this build has. */
#ifndef HPC_KERNELS_H
#define HPC_KERNELS_H
#include "native.h"

typedef struct {
    __typeof__(&hpc_attention_half) attention_half;
    __typeof__(&hpc_mlp_half) mlp_half;
    __typeof__(&hpc_layers) layers;
    __typeof__(&hpc_logits) logits;
    __typeof__(&hpc_embed) embed;
    __typeof__(&hpc_add_residual) add_residual;
    __typeof__(&hpc_argmax) argmax;
    __typeof__(&hpc_grain_stats) grain_stats;
    __typeof__(&hpc_largest) largest;
    __typeof__(&hpc_exp) exp;
    __typeof__(&hpc_draw_ids) draw_ids;
    __typeof__(&hpc_product) product;
    __typeof__(&hpc_gated_product) gated_product;
    __typeof__(&hpc_rms_norm) rms_norm;
    __typeof__(&hpc_quantise) quantise;
    __typeof__(&hpc_rotate_and_store) rotate_and_store;
    __typeof__(&hpc_attend) attend;
} hpc_kernels;

extern const hpc_kernels hpc_avx512vnni, hpc_avx512, hpc_avx2, hpc_neon, hpc_plain;
#endif
