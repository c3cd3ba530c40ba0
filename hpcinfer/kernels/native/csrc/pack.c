/* Weights: memory, packing, freeing. The layout is described at hpc_weight; it is the same for all instruction sets. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "native.h"
#include "runtime.h"
#include "simd.h"

enum { HUGE_PAGE = 2 << 20, BLOCK = 16 }; /* BLOCK inputs are one cache line of float32 */

/* What one call of hpc_weight_fill brings: `count` outputs from first_out on, of one grain. */
typedef struct {
    hpc_weight *weight;
    int64_t grain, first_out, count, dtype;
    const void *values, *scales;
} source;

static int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Zero pages that nobody has touched. Large memory is aligned to huge pages, which the system may then use. */
static char *new_pages(int64_t bytes) {
    const int64_t spare = bytes > HUGE_PAGE ? HUGE_PAGE : 0;
    char *start = mmap(NULL, (size_t)(bytes + spare), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return NULL;
    if (!spare) return start;
    char *aligned = (char *)round_up((int64_t)(intptr_t)start, HUGE_PAGE);
    if (aligned > start) munmap(start, (size_t)(aligned - start));
    if (start + spare > aligned) munmap(aligned + bytes, (size_t)(start + spare - aligned));
#ifdef MADV_HUGEPAGE
    madvise(aligned, (size_t)bytes, MADV_HUGEPAGE);
#endif
    return aligned;
}

static int64_t bytes_of_panel(int64_t kind, int64_t num_in, int64_t padded_in) {
    if (kind == HPC_FLOAT32) return num_in * HPC_PANEL * 4;
    if (kind == HPC_INT8) return padded_in * HPC_PANEL + HPC_PANEL * 4;
    return padded_in / HPC_GROUP * HPC_PANEL * (HPC_GROUP / 2 + 2);
}

hpc_weight *hpc_weight_new(int64_t kind, int64_t grains, int64_t num_out, int64_t num_in) {
    hpc_weight *weight = malloc(sizeof *weight);
    if (!weight) return NULL;
    const int64_t padded_in = round_up(num_in, HPC_GROUP), panel_bytes = bytes_of_panel(kind, num_in, padded_in);
    const int64_t num_panels = round_up(num_out, HPC_PANEL) / HPC_PANEL;
    /* A byte more than needed makes an empty weight a mapping like any other. */
    const int64_t bytes = round_up(num_panels * grains * panel_bytes + 1, sysconf(_SC_PAGESIZE));
    *weight = (hpc_weight){
        kind, grains, num_out, num_in, padded_in, panel_bytes, new_pages(bytes), bytes, NULL, NULL, 0, 0};
    if (weight->panels) return weight;
    free(weight);
    return NULL;
}

hpc_weight *hpc_gated_weight_new(int64_t kind, int64_t num_gates, int64_t num_in) {
    hpc_weight *weight = hpc_weight_new(kind, 1, 2 * round_up(num_gates, HPC_PANEL), num_in);
    if (weight) weight->is_gated = 1;
    return weight;
}

void hpc_weight_free(hpc_weight *weight) {
    if (!weight) return;
    munmap(weight->panels, (size_t)weight->total_bytes);
    free(weight);
}

static float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static float float_of_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7FFF) << 13;
    if (rest >= 0x0F800000) return float_of_bits(sign | 0x70000000 | rest); /* infinity, NaN */
    const float value = float_of_bits(rest) * 0x1p112f;                     /* moves the exponent, exactly */
    return sign ? -value : value;
}

INLINE float value_at(const void *values, int64_t dtype, int64_t i) {
    if (dtype == HPC_FLOAT32) return ((const float *)values)[i];
    const uint16_t half = ((const uint16_t *)values)[i];
    return dtype == HPC_BFLOAT16 ? float_of_bits((uint32_t)half << 16) : float_of_half(half);
}

/* Outputs [0, count) of `values`, rows of num_in, into columns of a panel [num_in][HPC_PANEL]. */
INLINE void fill_float32(
    const void *values, int64_t dtype, int64_t first, int64_t count, int64_t num_in, float *panel
) {
    for (int64_t block = 0; block < num_in; block += BLOCK) {
        const int64_t end = smaller(block + BLOCK, num_in);
        for (int64_t out = 0; out < count; out++)
            for (int64_t in = block; in < end; in++)
                panel[in * HPC_PANEL + out] = value_at(values, dtype, (first + out) * num_in + in);
    }
}

static void pack_float32(const source *from, int64_t first, int64_t count, char *panel, int64_t column) {
    const int64_t num_in = from->weight->num_in;
    float *target = (float *)panel + column;
    if (from->dtype == HPC_FLOAT32) fill_float32(from->values, HPC_FLOAT32, first, count, num_in, target);
    else if (from->dtype == HPC_BFLOAT16) fill_float32(from->values, HPC_BFLOAT16, first, count, num_in, target);
    else fill_float32(from->values, HPC_FLOAT16, first, count, num_in, target);
}

static void pack_int8(const source *from, int64_t first, int64_t count, char *panel, int64_t column) {
    const int64_t num_in = from->weight->num_in, padded_in = from->weight->padded_in;
    const int8_t *codes = (const int8_t *)from->values + first * num_in;
    for (int64_t out = 0; out < count; out++) {
        uint8_t *target = (uint8_t *)panel + 4 * (column + out);
        for (int64_t in = 0; in < padded_in; in++) {
            const int code = in < num_in ? codes[out * num_in + in] : 0;
            target[in / 4 * 4 * HPC_PANEL + in % 4] = (uint8_t)(code + 128);
        }
    }
    memcpy(panel + padded_in * HPC_PANEL + 4 * column, (const float *)from->scales + first, (size_t)(4 * count));
}

/* The code + 8 of an input, in the stored order: two inputs to a byte, the even one low. */
static unsigned nibble(const uint8_t *codes, int64_t in) { return codes[in / 2] >> in % 2 * 4 & 15; }

static void pack_int4(const source *from, int64_t first, int64_t count, char *panel, int64_t column) {
    const int64_t num_in = from->weight->num_in, padded_in = from->weight->padded_in;
    const int64_t num_groups = padded_in / HPC_GROUP, group_bytes = from->weight->panel_bytes / num_groups;
    for (int64_t out = 0; out < count; out++) {
        const uint8_t *codes = (const uint8_t *)from->values + (first + out) * (padded_in / 2);
        const uint16_t *scales = (const uint16_t *)from->scales + (first + out) * num_groups;
        for (int64_t i = 0; i < padded_in / 2; i++) {
            const int64_t group = i / (HPC_GROUP / 2), place = i % (HPC_GROUP / 2), in = i / 4 * 8 + i % 4;
            const unsigned low = in < num_in ? nibble(codes, in) : 8;
            const unsigned high = in + 4 < num_in ? nibble(codes, in + 4) : 8;
            uint8_t *target = (uint8_t *)panel + group * group_bytes + 4 * (column + out);
            target[place / 4 * 4 * HPC_PANEL + place % 4] = (uint8_t)(low | high << 4);
        }
        for (int64_t group = 0; group < num_groups; group++) {
            uint16_t *target = (uint16_t *)(panel + group * group_bytes + HPC_GROUP / 2 * HPC_PANEL);
            target[column + out] = scales[group];
        }
    }
}

/* A thread packs the panels that it will compute, so that their memory is near it. */
static void pack_share(const source *from, int thread, int threads) {
    const hpc_weight *weight = from->weight;
    void (*pack)(const source *, int64_t first, int64_t count, char *panel, int64_t column) =
        weight->kind == HPC_FLOAT32 ? pack_float32 : weight->kind == HPC_INT8 ? pack_int8 : pack_int4;
    const int64_t num_panels = round_up(weight->num_out, HPC_PANEL) / HPC_PANEL, unit = weight->is_gated ? 2 : 1;
    const hpc_part units = part_of(num_panels / unit, thread, threads);
    for (int64_t panel = 0; panel < num_panels; panel++) {
        const int64_t place = place_of(weight, panel);
        if (place < units.first * unit || place >= units.last * unit) continue;
        const int64_t start = panel * HPC_PANEL, end = smaller(start + HPC_PANEL, from->first_out + from->count);
        const int64_t first = from->first_out > start ? from->first_out : start;
        char *target = weight->panels + (place * weight->grains + from->grain) * weight->panel_bytes;
        if (first < end) pack(from, first - from->first_out, end - first, target, first - start);
    }
}

void hpc_weight_fill(
    hpc_weight *weight, int64_t threads, int64_t grain, int64_t first_out, int64_t count, int64_t dtype,
    const void *values, const void *scales
) {
    const source from = {weight, grain, first_out, count, dtype, values, scales};
    hpc_use_default_rounding();
#pragma omp parallel num_threads((int)threads)
    pack_share(&from, THREAD, TEAM);
}

static void unpack_float32(const hpc_weight *weight, const float *panel, int64_t count, float *values) {
    const int64_t num_in = weight->num_in;
    for (int64_t block = 0; block < num_in; block += BLOCK) {
        const int64_t end = smaller(block + BLOCK, num_in);
        for (int64_t out = 0; out < count; out++)
            for (int64_t in = block; in < end; in++) values[out * num_in + in] = panel[in * HPC_PANEL + out];
    }
}

static void unpack_int8(const hpc_weight *weight, const uint8_t *panel, int64_t count, int8_t *codes) {
    for (int64_t out = 0; out < count; out++)
        for (int64_t in = 0; in < weight->num_in; in++)
            codes[out * weight->num_in + in] = (int8_t)(panel[in / 4 * 4 * HPC_PANEL + 4 * out + in % 4] - 128);
}

static void unpack_int4(
    const hpc_weight *weight, const char *panel, int64_t column, int64_t count, uint8_t *codes, uint16_t *scales
) {
    const int64_t num_groups = weight->padded_in / HPC_GROUP, group_bytes = weight->panel_bytes / num_groups;
    for (int64_t out = 0; out < count; out++) {
        for (int64_t in = 0; in < weight->padded_in; in += 2) {
            const int64_t group = in / HPC_GROUP, place = in % HPC_GROUP, byte = place / 8 * 4 + place % 4;
            const uint8_t *source = (const uint8_t *)panel + group * group_bytes + 4 * (column + out);
            const uint8_t *pair = source + byte / 4 * 4 * HPC_PANEL + byte % 4;
            const int shift = place % 8 < 4 ? 0 : 4; /* an even input and the next one lie in neighbouring bytes */
            const unsigned even = pair[0] >> shift & 15, odd = pair[1] >> shift & 15;
            codes[(out * weight->padded_in + in) / 2] = (uint8_t)(even | odd << 4);
        }
        for (int64_t group = 0; group < num_groups; group++)
            scales[out * num_groups + group] =
                ((const uint16_t *)(panel + group * group_bytes + HPC_GROUP / 2 * HPC_PANEL))[column + out];
    }
}

void hpc_weight_read(
    const hpc_weight *weight, int64_t grain, int64_t first_out, int64_t count, void *values, void *scales
) {
    const int64_t num_groups = weight->padded_in / HPC_GROUP;
    for (int64_t done = 0; done < count;) {
        const int64_t out = first_out + done, column = out % HPC_PANEL;
        const int64_t some = smaller(count - done, HPC_PANEL - column);
        const int64_t place = place_of(weight, out / HPC_PANEL);
        const char *panel = weight->panels + (place * weight->grains + grain) * weight->panel_bytes;
        if (weight->kind == HPC_FLOAT32) {
            unpack_float32(weight, (const float *)panel + column, some, (float *)values + done * weight->num_in);
        } else if (weight->kind == HPC_INT8) {
            const uint8_t *source = (const uint8_t *)panel + 4 * column;
            unpack_int8(weight, source, some, (int8_t *)values + done * weight->num_in);
            memcpy((float *)scales + done, panel + weight->padded_in * HPC_PANEL + 4 * column, (size_t)(4 * some));
        } else {
            uint8_t *codes = (uint8_t *)values + done * weight->padded_in / 2;
            unpack_int4(weight, panel, column, some, codes, (uint16_t *)scales + done * num_groups);
        }
        done += some;
    }
}
