/* Where K and V of a slot stand in a layer's cache. Slots go in panels of 16, each with all its KV heads:
 *
 *   keys    [panel][K][H][16]          lanes are slots, so that 16 scores are one chain of multiply-adds
 *   values  [panel][K][16][padded H]   lanes are head columns; padded H is H rounded up to 16
 *   scales  [panel][K][16]             int8 only, one for the key and one for the value of each slot and KV head
 *
 * What an element is read back as: float32, bfloat16 and float16 as they are, int8 as code * scale, rounded. */
#ifndef HPC_CACHE_LAYOUT_H
#define HPC_CACHE_LAYOUT_H
#include "native.h"

static inline int64_t element_bytes(int64_t dtype) { return dtype == HPC_FLOAT32 ? 4 : dtype == HPC_INT8 ? 1 : 2; }
static inline int64_t padded_lanes(int64_t n) { return (n + HPC_LANES - 1) / HPC_LANES * HPC_LANES; }
/* Panel of a slot and KV head, counted in panels of one head. */
static inline int64_t panel_of(const hpc_cache *cache, int64_t slot, int64_t head) {
    return slot / HPC_LANES * cache->num_kv_heads + head;
}
#endif
