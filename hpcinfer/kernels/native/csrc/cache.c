/* Memory of the KV cache: mapped at once, touched page by page when blocks are first used. */
#define _DEFAULT_SOURCE
#include <stdlib.h>
#include <sys/mman.h>

#include "cache_layout.h"

enum { ALIGNMENT = 64 };

/* The next part of a mapping; only counts where there is no mapping yet. */
static char *take(char *base, int64_t *used, int64_t bytes) {
    int64_t offset = *used;
    *used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return base ? base + offset : NULL;
}

static int64_t place_parts(hpc_cache *cache, char *base) {
    const int64_t num_panels = (cache->num_blocks * cache->block_size + HPC_LANES - 1) / HPC_LANES;
    const int64_t lanes = num_panels * cache->num_kv_heads * HPC_LANES, bytes = element_bytes(cache->dtype);
    int64_t used = 0;
    cache->keys = take(base, &used, lanes * cache->head_size * bytes);
    cache->values = take(base, &used, lanes * padded_lanes(cache->head_size) * bytes);
    if (cache->dtype == HPC_INT8) {
        cache->key_scales = (float *)take(base, &used, lanes * (int64_t)sizeof(float));
        cache->value_scales = (float *)take(base, &used, lanes * (int64_t)sizeof(float));
    }
    return used > 0 ? used : ALIGNMENT; /* a rank may have no KV heads, and nothing cannot be mapped */
}

hpc_cache *hpc_cache_new(
    int64_t dtype, int64_t num_blocks, int64_t block_size, int64_t num_kv_heads, int64_t head_size
) {
    hpc_cache *cache = calloc(1, sizeof *cache);
    if (!cache) return NULL;
    *cache = (hpc_cache){dtype, num_blocks, block_size, num_kv_heads, head_size, NULL, NULL, NULL, NULL, 0};
    cache->total_bytes = place_parts(cache, NULL);
    char *base = mmap(NULL, (size_t)cache->total_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        free(cache);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    madvise(base, (size_t)cache->total_bytes, MADV_HUGEPAGE); /* blocks of a sequence lie anywhere: fewer TLB misses */
#endif
    place_parts(cache, base);
    return cache;
}

void hpc_cache_free(hpc_cache *cache) {
    if (!cache) return;
    munmap(cache->keys, (size_t)cache->total_bytes);
    free(cache);
}
