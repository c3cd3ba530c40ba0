/* The types and functions of the native kernels that Python sees (through cffi) and that the sources share.
 *
 * One body of code (body.h) is compiled once per instruction set; dispatch.c chooses at run time. Every output element
 * is a fixed expression, evaluated in one order by one thread: 16 logical lanes on every machine, explicit fused
 * multiply-adds, no contraction by the compiler. Letters: T tokens, S sequences, D hidden size, G grains of this rank,
 * U padded units per grain, N query heads, K KV heads, H head size. All matrices are row-major and contiguous. */
#ifndef HPC_NATIVE_H
#define HPC_NATIVE_H
#include <stdint.h>
#ifdef __FAST_MATH__
#error "the order of operations is a promise: build without -ffast-math"
#endif

enum { HPC_FLOAT32, HPC_BFLOAT16, HPC_FLOAT16, HPC_INT8, HPC_INT4 };
enum { HPC_LANES = 16, HPC_PANEL = 32, HPC_GROUP = 32, HPC_TILE = 64 };
enum { HPC_PRODUCTS, HPC_ATTENTION, HPC_OTHER, HPC_SAMPLING, HPC_NUM_PHASES };

/* A linear map in panels of HPC_PANEL outputs: panels[panel][grain], panel_bytes each, outputs padded with zeros.
 * A column-parallel one has one "grain" (all its outputs side by side); a row-parallel one has G, summed in a tree.
 *   float32: [num_in][32] floats
 *   int8:    [padded_in / 4][32][4] bytes (code + 128), then [32] float scales
 *   int4:    per group of 32 inputs [4][32][4] bytes (low nibble: codes + 8 of inputs 8j .. 8j+3, high nibble: of
 *            8j+4 .. 8j+7), then [32] bfloat16 scales
 * padded_in is num_in rounded up to HPC_GROUP (int8, int4); the codes added are zero.
 * Where a grain has less than it has room for, products need not compute with the zeros: panels that are not listed are
 * left out, and so are inputs of a grain from true_inputs on. */
typedef struct {
    int64_t kind, grains, num_out, num_in, padded_in, panel_bytes;
    char *panels;
    int64_t total_bytes;
    const int64_t *listed_panels, *true_inputs;          /* ascending, [G]; NULL for all */
    int64_t num_listed;
    int64_t is_gated; /* outputs are gates, then as many that they multiply: their panels alternate in memory */
} hpc_weight;

/* Input rows of a product: num_rows rows of `grains` runs of num_in values. As float32 (row t, grain g at
 * values + t * stride + g * num_in), or quantised: each run has a scale, codes in -127 .. 127 and the sums of each
 * HPC_GROUP codes, and then of all (codes added to reach padded_in are zero). */
typedef struct {
    int64_t num_rows, grains, num_in, padded_in;
    float *values;
    int64_t stride;
    int8_t *codes;   /* [T][grains][padded_in] */
    float *scales;   /* [T][grains] */
    int32_t *sums;   /* [T][grains][padded_in / HPC_GROUP + 1] */
    int64_t *taken;  /* of each thread's part of a product: take_next */
    int64_t is_for_int8; /* codes are stored as int8 products take them (vi_store_codes), without the sums of groups */
} hpc_rows;

/* The integers of one batch: hpcinfer.kernels.protocol.StepInput. */
typedef struct {
    int64_t num_tokens, num_sequences;
    const int64_t *positions, *slots;                    /* [T] */
    const int64_t *query_starts;                         /* [S + 1] */
    const int64_t *block_tables, *table_starts;          /* flat, [S + 1] */
} hpc_step;

/* K and V of one layer. The layout is in cache_layout.h. */
typedef struct {
    int64_t dtype, num_blocks, block_size, num_kv_heads, head_size;
    char *keys, *values;
    float *key_scales, *value_scales;                    /* int8: per slot and KV head */
    int64_t total_bytes;
} hpc_cache;

typedef struct {
    hpc_weight *qkv, *o;                                 /* qkv: outputs q [G][U], k [K][H], v [K][H] side by side */
    const float *norm, *qkv_bias, *q_norm, *k_norm;      /* the last three may be NULL */
    const float *rope;                                   /* [max_len][2][H / 2] */
    double eps;                                          /* used as float */
    int64_t window, head_size, num_heads, num_kv_heads, grains, grain_columns;
    const int64_t *head_columns;                         /* [N]: first column of each query head in [G][U] */
    const int64_t *kv_of_head;                           /* [N], ascending */
} hpc_attention_layer;

typedef struct {
    hpc_weight *gate_up, *down;                          /* gate_up: gated, gates [G][U] and up [G][U] */
    const float *norm, *gate_up_bias;                    /* bias of all its outputs, or NULL */
    double eps;
    int64_t grains, width;                               /* width: U */
} hpc_mlp_layer;

/* Whole layers of a rank that holds all grains. */
typedef struct {
    int64_t num_layers, grains;
    hpc_attention_layer **attention;                     /* [num_layers], as all below */
    hpc_mlp_layer **mlp;
    hpc_cache **caches;
    float **o_biases, **down_biases;                     /* of the sums over grains; each may be NULL */
} hpc_stack;

typedef struct {
    hpc_weight *weight;                                  /* outputs [G][U] side by side */
    const float *norm;
    double eps;
    int64_t grains;
} hpc_head;

/* How the id of a row is chosen: hpcinfer.kernels.protocol.Draw. Temperatures are 0 or in the range of float32. */
typedef struct {
    double temperature;
    int64_t top_k;
    double top_p, min_p, u;
    int64_t known_id;
} hpc_draw;

/* What becomes of some logits of R rows first: hpcinfer.kernels.protocol.Changes, those of row r from starts[r] on. */
typedef struct {
    const int64_t *starts, *places;                      /* [R + 1] */
    const float *biases, *factors, *penalties;
} hpc_changes;

/* Threads, scratch memory and stopwatches of one set of kernels; not shared between callers. */
typedef struct hpc_runtime hpc_runtime;

/* runtime.c. A runtime may get fewer threads than it asked for (OMP_THREAD_LIMIT, no OpenMP); NULL without memory. */
hpc_runtime *hpc_runtime_new(int threads);
void hpc_runtime_free(hpc_runtime *runtime);
int hpc_runtime_threads(const hpc_runtime *runtime);
const double *hpc_seconds(const hpc_runtime *runtime); /* [HPC_NUM_PHASES], since it was made */
/* Keep thread i of the caller's teams on cpus[i], from i = 1 on. Returns how many could not be. */
int hpc_pin(int threads, const int64_t *cpus);

/* pack.c. A new weight is zero; filling brings `count` outputs of one grain, as stored, from first_out on. */
hpc_weight *hpc_weight_new(int64_t kind, int64_t grains, int64_t num_out, int64_t num_in); /* NULL without memory */
hpc_weight *hpc_gated_weight_new(int64_t kind, int64_t num_gates, int64_t num_in); /* gates in whole panels */
void hpc_weight_free(hpc_weight *weight);
/* Outputs [first_out, first_out + count) of a grain, as they were filled in: float32 or codes, and their scales. */
void hpc_weight_read(
    const hpc_weight *weight, int64_t grain, int64_t first_out, int64_t count, void *values, void *scales
);
void hpc_weight_fill(
    hpc_weight *weight, int64_t threads, int64_t grain, int64_t first_out, int64_t count, int64_t dtype,
    const void *values, const void *scales);

/* cache.c. One allocation of total_bytes begins at `keys`; NULL without memory. */
hpc_cache *hpc_cache_new(int64_t dtype, int64_t num_blocks, int64_t block_size, int64_t num_kv_heads, int64_t head_size);
void hpc_cache_free(hpc_cache *cache);

/* dispatch.c: the instruction set of all functions below; without a choice the best one. */
int hpc_use(const char *isa);  /* 0 if this build or CPU lacks it */
const char *hpc_isa(void);     /* in use */
const char *hpc_isas(void);    /* those possible here, best first, separated by spaces */

/* The calls of a model: layer.h. `nodes` is [num_spans][T][D]; spans are half-open runs of local grains. They return 0,
 * and have done nothing, where there is no memory. */
int hpc_attention_half(
    hpc_runtime *runtime, const hpc_attention_layer *layer, const hpc_step *step, hpc_cache *cache, const float *x,
    const int64_t *spans, int64_t num_spans, float *nodes);
int hpc_mlp_half(
    hpc_runtime *runtime, const hpc_mlp_layer *layer, const float *x, int64_t num_rows, const int64_t *spans,
    int64_t num_spans, float *nodes);
int hpc_layers(hpc_runtime *runtime, const hpc_stack *stack, const hpc_step *step, float *x, float *sum); /* x in place */
int hpc_logits(
    hpc_runtime *runtime, const hpc_head *head, const float *x, const int64_t *index, int64_t num_rows, float *logits);

/* Rows around the layers: logits.h. A table is [G][U][D] as stored, logits are [R][G][U] with sizes [G] true columns. */
void hpc_embed(
    hpc_runtime *runtime, int64_t dtype, const char *table, const float *scales, int64_t rows_per_grain,
    int64_t num_columns, const int64_t *grain_starts, const int64_t *grain_sizes, int64_t grains,
    const int64_t *token_ids, int64_t num_tokens, float *out);
void hpc_add_residual(
    hpc_runtime *runtime, const float *x, const float *total, const float *bias, int64_t num_rows, int64_t num_columns,
    float *out);
void hpc_argmax(
    hpc_runtime *runtime, const float *logits, const int64_t *sizes, int64_t num_rows, int64_t grains, int64_t columns,
    float *values, int64_t *places);
void hpc_grain_stats(
    hpc_runtime *runtime, const float *logits, const int64_t *sizes, int64_t num_rows, int64_t grains, int64_t columns,
    float *maxima, float *sums);
void hpc_largest(hpc_runtime *runtime, const float *row, int64_t size, int64_t count, int64_t *places);
void hpc_exp(hpc_runtime *runtime, float *values, int64_t size); /* in place */
/* An id of each row, and its changed logit unless the id was known. 0 without memory; `changes` may be NULL. */
int hpc_draw_ids(
    hpc_runtime *runtime, const float *logits, const int64_t *sizes, int64_t num_rows, int64_t grains, int64_t columns,
    const hpc_draw *draws, const hpc_changes *changes, int64_t *ids, float *values);

/* Single steps of the calls above, for tests: parts.h. */
void hpc_product(
    hpc_runtime *runtime, const hpc_weight *weight, float *values, int64_t num_rows, const int64_t *spans,
    int64_t num_spans, const float *bias, float *nodes);
void hpc_gated_product(
    hpc_runtime *runtime, const hpc_weight *weight, float *values, int64_t num_rows, int64_t num_gates,
    const float *bias, float *out); /* silu(gate) * up, [T][num_gates] */
void hpc_rms_norm(
    hpc_runtime *runtime, const float *x, const int64_t *index, const float *weight, double eps, hpc_rows *out);
void hpc_quantise(hpc_runtime *runtime, const float *values, hpc_rows *out);
void hpc_rotate_and_store(
    hpc_runtime *runtime, const hpc_attention_layer *layer, const hpc_step *step, hpc_cache *cache, float *qkv);
void hpc_attend(
    hpc_runtime *runtime, const hpc_attention_layer *layer, const hpc_step *step, hpc_cache *cache, const float *qkv,
    float *heads);
#endif
