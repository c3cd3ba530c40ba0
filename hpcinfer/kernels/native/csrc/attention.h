/* Attention over the paged cache: keys in tiles of 64 absolute positions, an online softmax in one order per row.
 *
 * A row is one token with one query head. It takes the tiles that hold a key it may see, in ascending order; per tile:
 *   scores      one chain of multiply-adds over H of (q * H ** -0.5) with k; lanes are keys, hidden ones are -inf
 *   maximum     of the row so far, this tile included; decay = exp(old maximum - maximum)
 *   weights     exp(score - maximum); their sum: lanes i + 16 j as (j0 + j2) + (j1 + j3), then vf_sum's tree
 *   denominator fma(denominator, decay, sum)
 *   values      values * decay, then one chain of multiply-adds over the keys, ascending; lanes are head columns
 * and at last (values + 0) / denominator. Register tiles of several rows walk the keys that any of their rows sees: a
 * weight of exact 0 changes no bit but the sign of a zero, which the last + 0 removes.
 *
 * Work is shared in items: a block of rows of one sequence and KV head. */
#include "attention_tile.h"

enum { BLOCK_ROWS = 96 }; /* rows of an item: more share a decoded tile, fewer balance better */

typedef struct {
    const hpc_attention_layer *layer;
    const hpc_step *step;
    const hpc_cache *cache;
    const float *qkv;
    float *heads;
    int64_t block_tokens; /* of an item */
} attend_call;

/* Scratch of one thread: the rows of an item, and one tile of keys. */
typedef struct {
    float *q, *values;      /* [rows][H] scaled queries, [rows][padded H] weighted values so far */
    float *maxima, *sums;   /* [rows] */
    int64_t *positions;     /* [rows] */
    float *tile_keys, *tile_values;   /* [PANELS][H][16], [PANELS][16][padded H] */
    float *panel_keys, *panel_values; /* one panel */
    float *scores;          /* [ATTEND_ROWS][HPC_TILE] */
} attend_scratch;

typedef struct {
    int64_t first_token, num_rows, kv_head, first_head, group; /* row r: token r / group, head r % group */
    const int64_t *table;
} attend_item;

static int64_t slot_of(const hpc_cache *cache, const int64_t *table, int64_t position) {
    return table[position / cache->block_size] * cache->block_size + position % cache->block_size;
}

/* One panel of a tile out of slots that are not 16 in a row: run by run. */
static void gather_panel(
    const hpc_cache *cache, const attend_item *item, const key_tile *tile, int64_t lane, attend_scratch *scratch,
    float *keys, float *values
) {
    const int64_t head_size = cache->head_size, padded = padded_lanes(head_size);
    const int64_t stop = tile->last < lane + HPC_LANES - 1 ? tile->last + 1 : lane + HPC_LANES;
    int64_t run = 0;
    for (int64_t i = tile->first > lane ? tile->first : lane; i < stop; i += run) {
        const int64_t position = tile->base + i, slot = slot_of(cache, item->table, position);
        const int64_t from = slot % HPC_LANES, to = i - lane;
        run = cache->block_size - position % cache->block_size;
        if (run > HPC_LANES - from) run = HPC_LANES - from;
        if (run > stop - i) run = stop - i;
        const stored_panel stored = find_panel(cache, panel_of(cache, slot, item->kv_head));
        const stored_panel panel = float32_panel(cache, &stored, scratch->panel_keys, scratch->panel_values);
        for (int64_t h = 0; h < head_size; h++)
            for (int64_t j = 0; j < run; j++)
                keys[h * HPC_LANES + to + j] = ((const float *)panel.keys)[h * HPC_LANES + from + j];
        const float *source = (const float *)panel.values + from * padded;
        memcpy(values + to * padded, source, (size_t)(run * padded) * sizeof(float));
    }
}

/* Panel j of a tile, in the precision of the tile. */
static stored_panel load_panel(
    const hpc_cache *cache, const attend_item *item, attend_scratch *scratch, const key_tile *tile, int64_t j
) {
    float *keys = scratch->tile_keys + j * HPC_LANES * cache->head_size;
    float *values = scratch->tile_values + j * HPC_LANES * padded_lanes(cache->head_size);
    if (cache->block_size % HPC_LANES) {
        gather_panel(cache, item, tile, j * HPC_LANES, scratch, keys, values);
        return (stored_panel){(const char *)keys, (const char *)values, NULL, NULL};
    }
    const int64_t slot = slot_of(cache, item->table, tile->base + j * HPC_LANES);
    const stored_panel panel = find_panel(cache, panel_of(cache, slot, item->kv_head));
    return tile->dtype == cache->dtype ? panel : float32_panel(cache, &panel, keys, values);
}

static void load_tile(const hpc_cache *cache, const attend_item *item, attend_scratch *scratch, key_tile *tile) {
    const int64_t first = tile->first / HPC_LANES;
    for (int64_t j = first; j <= tile->last / HPC_LANES; j++)
        tile->panels[j] = load_panel(cache, item, scratch, tile, j);
    for (int64_t j = 0; j < first; j++) tile->panels[j] = tile->panels[first]; /* all hidden, but read */
}

/* One tile of keys for the rows [row, row + rows) of an item. */
static void add_tile(const attend_call *call, attend_scratch *scratch, const key_tile *tile, int64_t row, int rows) {
    const int64_t head_size = call->cache->head_size, padded = padded_lanes(head_size), window = call->layer->window;
    const int64_t *positions = scratch->positions + row;
    int64_t first = first_key(positions[0], window) - tile->base, last = positions[rows - 1] - tile->base;
    if (first < 0) first = 0;
    if (last > HPC_TILE - 1) last = HPC_TILE - 1;
    if (first > last) return;
    float decay[HPC_LANES];
    score_tile(rows, scratch->q + row * head_size, head_size, tile, last, scratch->scores);
    weigh_tile(rows, scratch->scores, positions, tile->base, window, scratch->maxima + row, scratch->sums + row, decay);
    value_tile(rows, scratch->scores, decay, tile, first, last, padded, scratch->values + row * padded);
}

static const int64_t *columns_of(const attend_call *call, const attend_item *item) {
    return call->layer->head_columns + item->first_head;
}

static void begin_rows(const attend_call *call, const attend_item *item, attend_scratch *scratch) {
    const int64_t head_size = call->cache->head_size, padded = padded_lanes(head_size);
    const vf scale = vf_set1((float)(1 / sqrt((double)head_size)));
    for (int64_t row = 0; row < item->num_rows; row++) {
        const int64_t token = item->first_token + row / item->group;
        const float *q = call->qkv + token * call->layer->qkv->num_out + columns_of(call, item)[row % item->group];
        for (int64_t i = 0; i < head_size; i += HPC_LANES) {
            const int64_t n = head_size - i < HPC_LANES ? head_size - i : HPC_LANES;
            vf_store_tail(scratch->q + row * head_size + i, vf_mul(load_up_to(q + i, n), scale), n);
        }
        for (int64_t i = 0; i < padded; i += HPC_LANES) vf_store(scratch->values + row * padded + i, vf_zero());
        scratch->maxima[row] = -INFINITY;
        scratch->sums[row] = 0;
        scratch->positions[row] = call->step->positions[token];
    }
}

static void finish_rows(const attend_call *call, const attend_item *item, const attend_scratch *scratch) {
    const int64_t head_size = call->cache->head_size, padded = padded_lanes(head_size);
    const int64_t stride = call->layer->grains * call->layer->grain_columns;
    for (int64_t row = 0; row < item->num_rows; row++) {
        const int64_t token = item->first_token + row / item->group;
        float *head = call->heads + token * stride + columns_of(call, item)[row % item->group];
        const vf sum = vf_set1(scratch->sums[row]);
        for (int64_t i = 0; i < head_size; i += HPC_LANES) {
            const int64_t n = head_size - i < HPC_LANES ? head_size - i : HPC_LANES;
            vf values = vf_add(vf_load(scratch->values + row * padded + i), vf_zero());
            vf_store_tail(head + i, vf_div(values, sum), n);
        }
    }
}

/* An item of one register tile reads panels as they are stored; more rows had better share a decoded tile. */
static int is_few(const hpc_cache *cache, const attend_item *item) {
    return item->num_rows <= ATTEND_ROWS && cache->block_size % HPC_LANES == 0;
}

static int64_t first_tile(const attend_call *call, const attend_item *item) {
    return first_key(call->step->positions[item->first_token], call->layer->window) / HPC_TILE * HPC_TILE;
}

/* Has the register tiles of a tile ask memory for that of `item` at `base`, whose last key is `last`. */
static void look_ahead(const hpc_cache *cache, const attend_item *item, int64_t base, int64_t last, key_tile *tile) {
    for (int64_t j = 0; j < PANELS; j++) {
        const int64_t position = base + j * HPC_LANES;
        const int64_t slot = slot_of(cache, item->table, position < last ? position : last);
        tile->ahead[j] = find_panel(cache, panel_of(cache, slot, item->kv_head));
        if (cache->dtype == HPC_INT8) {
            __builtin_prefetch(tile->ahead[j].key_scales);
            __builtin_prefetch(tile->ahead[j].value_scales);
        }
    }
    tile->is_ahead = 1;
}

/* `next` is the item that this thread is likely to get next, or NULL. */
static void run_item(
    const attend_call *call, const attend_item *item, const attend_item *next, attend_scratch *scratch
) {
    begin_rows(call, item, scratch);
    const hpc_cache *cache = call->cache;
    const int64_t first = first_key(scratch->positions[0], call->layer->window);
    const int64_t last = scratch->positions[item->num_rows - 1];
    const int64_t dtype = is_few(cache, item) && is_direct(cache->dtype) ? cache->dtype : HPC_FLOAT32;
    for (int64_t base = first_tile(call, item); base <= last; base += HPC_TILE) {
        key_tile tile = {.base = base, .first = first > base ? first - base : 0, .last = last - base, .dtype = dtype};
        if (tile.last > HPC_TILE - 1) tile.last = HPC_TILE - 1;
        load_tile(cache, item, scratch, &tile);
        if (is_few(cache, item) && dtype == cache->dtype) {
            if (base + HPC_TILE <= last)
                look_ahead(cache, item, base + HPC_TILE, last, &tile);
            else if (next)
                look_ahead(cache, next, first_tile(call, next), call->step->positions[next->first_token], &tile);
        }
        for (int64_t row = 0; row < item->num_rows; row += ATTEND_ROWS) {
            const int64_t left = item->num_rows - row;
            add_tile(call, scratch, &tile, row, (int)(left < ATTEND_ROWS ? left : ATTEND_ROWS));
        }
    }
    finish_rows(call, item, scratch);
}

/* Query heads [first, last) of a KV head. */
static hpc_part heads_of(const hpc_attention_layer *layer, int64_t kv_head) {
    hpc_part part = {0, 0};
    while (part.first < layer->num_heads && layer->kv_of_head[part.first] < kv_head) part.first++;
    for (part.last = part.first; part.last < layer->num_heads && layer->kv_of_head[part.last] == kv_head;) part.last++;
    return part;
}

static int64_t largest_group(const hpc_attention_layer *layer) {
    int64_t largest = 0;
    for (int64_t kv_head = 0; kv_head < layer->num_kv_heads; kv_head++) {
        const hpc_part heads = heads_of(layer, kv_head);
        if (heads.last - heads.first > largest) largest = heads.last - heads.first;
    }
    return largest;
}

static int64_t num_blocks_of(const attend_call *call, int64_t sequence) {
    const int64_t *starts = call->step->query_starts + sequence;
    return (starts[1] - starts[0] + call->block_tokens - 1) / call->block_tokens;
}

static int64_t count_items(const attend_call *call) {
    int64_t blocks = 0;
    for (int64_t sequence = 0; sequence < call->step->num_sequences; sequence++) blocks += num_blocks_of(call, sequence);
    return blocks * call->layer->num_kv_heads;
}

/* Where a thread is in the list of items: by sequence, KV head, block. It is dealt ever later ones. */
typedef struct {
    int64_t sequence, first_item;
} item_cursor;

/* Item `index`; the last blocks of a sequence, which see most keys, come first. */
static attend_item find_item(const attend_call *call, item_cursor *cursor, int64_t index) {
    int64_t num_blocks;
    while (num_blocks = num_blocks_of(call, cursor->sequence),
           index - cursor->first_item >= num_blocks * call->layer->num_kv_heads) {
        cursor->first_item += num_blocks * call->layer->num_kv_heads;
        cursor->sequence++;
    }
    const hpc_step *step = call->step;
    const int64_t place = index - cursor->first_item, block = num_blocks - 1 - place % num_blocks;
    const int64_t first_token = step->query_starts[cursor->sequence] + block * call->block_tokens;
    const int64_t left = step->query_starts[cursor->sequence + 1] - first_token;
    const hpc_part heads = heads_of(call->layer, place / num_blocks);
    const int64_t group = heads.last - heads.first, tokens = left < call->block_tokens ? left : call->block_tokens;
    const int64_t *table = step->block_tables + step->table_starts[cursor->sequence];
    return (attend_item){first_token, tokens * group, place / num_blocks, heads.first, group, table};
}

/* Zeros between the heads, where a grain has fewer heads than it has room for. */
static void clear_padding(const attend_call *call, int thread, int threads) {
    const hpc_attention_layer *layer = call->layer;
    const int64_t width = layer->grains * layer->grain_columns;
    const hpc_part part = part_of(call->step->num_tokens, thread, threads);
    for (int64_t token = part.first; token < part.last; token++) {
        float *row = call->heads + token * width;
        int64_t column = 0;
        for (int64_t head = 0; head <= layer->num_heads; head++) {
            const int64_t next = head < layer->num_heads ? layer->head_columns[head] : width;
            memset(row + column, 0, (size_t)(next - column) * sizeof(float));
            column = next + layer->head_size;
        }
    }
}

static float *take_floats(float **memory, int64_t count) {
    float *part = *memory;
    *memory += padded_lanes(count);
    return part;
}

/* Attention of all rows: heads [T][G][U], padded columns 0. Threads share the items as they come. */
static void attend(
    const hpc_attention_layer *layer, const hpc_step *step, const hpc_cache *cache, const float *qkv, float *heads,
    int thread, int threads
) {
    attend_call call = {layer, step, cache, qkv, heads, 1};
    clear_padding(&call, thread, threads);
    const int64_t group = largest_group(layer), head_size = cache->head_size, padded = padded_lanes(head_size);
    if (group == 0) return;
    if (group < BLOCK_ROWS) call.block_tokens = BLOCK_ROWS / group;
    const int64_t rows = padded_lanes(group * call.block_tokens);
    const int64_t num_items = count_items(&call);
    int64_t positions[rows];
    float memory[HPC_LANES + rows * (2 * padded + 2) + HPC_TILE * (2 * padded + ATTEND_ROWS) + 2 * HPC_LANES * padded];
    float *next = memory + (-((uintptr_t)memory / sizeof(float)) % HPC_LANES); /* aligned to a cache line */
    attend_scratch scratch = {
        take_floats(&next, rows * padded), take_floats(&next, rows * padded), take_floats(&next, rows),
        take_floats(&next, rows), positions, take_floats(&next, HPC_TILE * padded),
        take_floats(&next, HPC_TILE * padded), take_floats(&next, HPC_LANES * padded),
        take_floats(&next, HPC_LANES * padded), take_floats(&next, HPC_TILE * ATTEND_ROWS)
    };
    item_cursor cursor = {0, 0};
    /* Neighbours in the list go to one thread where they are many, so that it can look ahead to them. */
    const int run = num_items >= 32 * threads ? 4 : 1;
#pragma omp for schedule(monotonic : dynamic, run) nowait /* the cursor only moves on */
    for (int64_t index = 0; index < num_items; index++) {
        const attend_item item = find_item(&call, &cursor, index);
        item_cursor after = cursor;
        const int has_next = index + 1 < num_items;
        const attend_item next = find_item(&call, &after, has_next ? index + 1 : index);
        if (item.num_rows) run_item(&call, &item, has_next ? &next : NULL, &scratch);
    }
}
