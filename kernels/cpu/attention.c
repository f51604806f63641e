/* Causal attention of a mixed batch (decode rows, prefill chunks with cached context) straight over the paged KV pool.
 *
 * Flash attention's online softmax (Dao et al., 2022) over tiles of TILE keys. A work item is one KV head of one
 * sequence with up to ROWS query rows: all query heads of the group, several tokens of a chunk. Keys of a tile are
 * transposed once, so that a score is a plain chain of multiply-adds with lanes running over keys.
 *
 * The context is cut into partitions of PARTITION tokens at fixed positions. Each is computed from scratch and merged
 * in order, by one thread or by several: a token's result has the same bits alone, in a chunk and in any batch. */
#include "vec.h"

#include <math.h>
#include <stdlib.h>

#define TILE 64
#define PARTITION 512
#define ROWS 48
#define MAX_DIM 256
#define QR 6 /* query rows whose accumulators are in registers together */
#define LANES (TILE / VL)

typedef struct {
    const float *query; /* [tokens, heads, dim], rows query_stride apart */
    const float *pool;  /* [blocks, kv_heads, layers, 2, block_size, dim], at the layer's first element */
    const int32_t *query_start, *seq_lens, *tables;
    float *out; /* [tokens, heads * dim] */
    float *partials;
    int64_t query_stride, num_seqs, heads, kv_heads, dim, block_size, block_stride, head_stride, table_width;
    int64_t window; /* tokens that one sees, itself included; 0: all */
    float scale, soft_cap; /* scores s become soft_cap * tanh(s / soft_cap); 0: they stay */
} Problem;

typedef struct {
    int32_t seq, kv_head, first_row, rows; /* rows count (token, head of the group) pairs of the sequence's chunk */
    int32_t first_part, parts, of_parts;
    int32_t cost;
    int64_t partial; /* where results go when other items have the other partitions; -1: finish here */
} Item;

typedef struct {
    float max[ROWS], sum[ROWS];
    float acc[ROWS * MAX_DIM];
} State;

/* One stage of the in-register transpose: pairs of rows `step` apart swap their off-diagonal step x step squares. */
#define LOW(lane, step) ((lane) & (step) ? VL + (lane) - (step) : (lane))
#define HIGH(lane, step) ((lane) & (step) ? VL + (lane) : (lane) + (step))
#define SWAP_STAGE(v, step) \
    _Pragma("GCC unroll 16") for (int i = 0; i < VL; i++) if (!(i & (step))) { \
        const vf a = v[i], b = v[i + (step)]; \
        v[i] = __builtin_shuffle(a, b, (vi){EACH_LANE(LOW, step)}); \
        v[i + (step)] = __builtin_shuffle(a, b, (vi){EACH_LANE(HIGH, step)}); \
    }

/* keys [TILE, dim] as [TILE / VL][dim][VL]; the values of the same tokens are asked for on the way */
INLINE void transpose_tile(const float *const *rows, const float *const *values, int keys, int64_t dim, float *out) {
    for (int group = 0; group * VL < keys; group++)
        for (int64_t d = 0; d < dim; d += VL) {
            vf v[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) {
                v[i] = load(rows[group * VL + i] + d);
                __builtin_prefetch(values[group * VL + i] + d);
            }
#if VL == 16
            SWAP_STAGE(v, 8)
#endif
#if VL >= 8
            SWAP_STAGE(v, 4)
#endif
            SWAP_STAGE(v, 2)
            SWAP_STAGE(v, 1)
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) store(out + (group * dim + d + i) * VL, v[i]);
        }
}

INLINE void scores(const int rows, const float *query, const float *keys, int count, int64_t dim, float *out) {
    for (int first = 0; first * VL < count; first += 4) {
        vf acc[QR][4];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) acc[r][g] = (vf){0};
#pragma GCC unroll 1
        for (int64_t d = 0; d < dim; d++) {
            vf k[4];
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) k[g] = load(keys + ((first + g) * dim + d) * VL);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int g = 0; g < 4; g++) acc[r][g] += query[r * dim + d] * k[g];
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) store(out + r * TILE + (first + g) * VL, acc[r][g]);
    }
}

/* acc = acc * rescale + probabilities [rows, TILE] x values */
INLINE void weigh(const int rows, const int width, const float *probs, const float *const *values, int keys, int64_t d,
                  int64_t dim, const float *rescale, float *acc_rows) {
    vf acc[QR][4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < width; c++) acc[r][c] = load(acc_rows + r * dim + d + c * VL) * rescale[r];
#pragma GCC unroll 1
    for (int j = 0; j < keys; j++) {
        const float *value = values[j] + d;
        vf v[4];
#pragma GCC unroll 4
        for (int c = 0; c < width; c++) v[c] = load(value + c * VL);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int c = 0; c < width; c++) acc[r][c] += probs[r * TILE + j] * v[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < width; c++) store(acc_rows + r * dim + d + c * VL, acc[r][c]);
}

#define FOR_ROWS(rows, CALL) \
    switch (rows) { \
        case 1: CALL(1); break; \
        case 2: CALL(2); break; \
        case 3: CALL(3); break; \
        case 4: CALL(4); break; \
        case 5: CALL(5); break; \
        default: CALL(6); break; \
    }

static void score_rows(int rows, const float *query, const float *keys, int count, int64_t dim, float *out) {
#define CALL(n) scores(n, query, keys, count, dim, out)
    FOR_ROWS(rows, CALL)
#undef CALL
}

static void weigh_rows(int rows, const float *probs, const float *const *values, int keys, int64_t dim,
                       const float *rescale, float *acc) {
    int64_t d = 0;
#define CALL(n) weigh(n, 4, probs, values, keys, d, dim, rescale, acc)
    for (; d + 4 * VL <= dim; d += 4 * VL) FOR_ROWS(rows, CALL)
#undef CALL
#define CALL(n) weigh(n, 1, probs, values, keys, d, dim, rescale, acc)
    for (; d < dim; d += VL) FOR_ROWS(rows, CALL)
#undef CALL
}

/* cap * tanh(x / cap), as 1 - 2 / (e^2x + 1) */
INLINE vf cap_vf(vf x, float cap) {
    vf doubled = min_vf(x * (2.0f / cap), splat(80.0f));
    return cap * (1.0f - 2.0f / (exp_vf(doubled) + 1.0f));
}

/* Scores of one row to probabilities; only keys in [first, limit) are visible. Returns the factor for what is there. */
INLINE float softmax_row(float *s, int first, int limit, float cap, float *max, float *sum) {
    const vf lane = {EACH_LANE(IDENTITY, 0)};
    vf top = splat(-INFINITY);
    for (int g = 0; g < LANES; g++) {
        const vf key = lane + (float)(g * VL), score = load(s + g * VL);
        vf visible = select_vf(key < splat((float)limit), cap > 0.0f ? cap_vf(score, cap) : score, splat(-INFINITY));
        visible = select_vf(key < splat((float)first), splat(-INFINITY), visible);
        store(s + g * VL, visible);
        top = max_vf(top, visible);
    }
    const float tile_max = max_lanes(top), new_max = tile_max > *max ? tile_max : *max;
    vf total = {0};
    for (int g = 0; g < LANES; g++) {
        vf p = exp_vf(load(s + g * VL) - new_max);
        store(s + g * VL, p);
        total += p;
    }
    const float rescale = *max == -INFINITY ? 0.0f : expf(*max - new_max);
    *max = new_max;
    *sum = *sum * rescale + sum_lanes(total);
    return rescale;
}

/* Ask for the keys of the tile from `start` on while the one before is computed: their addresses are scattered. */
static void prefetch_tile(const Problem *p, const int32_t *table, const float *head, int start, int end) {
    const int64_t last = start + TILE < end ? start + TILE : end;
    for (int64_t token = start; token < last; token += p->block_size) {
        const float *keys = head + table[token / p->block_size] * p->block_stride + token % p->block_size * p->dim;
        const int64_t count = last - token < p->block_size ? last - token : p->block_size;
        for (int64_t i = 0; i < count * p->dim; i += 16) __builtin_prefetch(keys + i);
    }
}

/* The first key that a row seeing `limit` keys without a window sees. */
static int64_t first_seen(const Problem *p, int64_t limit) {
    return p->window && limit > p->window ? limit - p->window : 0;
}

/* One partition of one item. limits[r] is how many tokens row r sees. */
static void attend_partition(const Problem *p, const Item *item, const float *query, const int *limits, int64_t part,
                             State *state) {
    float keys[TILE * MAX_DIM] __attribute__((aligned(64))), probs[ROWS * TILE] __attribute__((aligned(64)));
    float rescale[ROWS];
    const int end = limits[item->rows - 1], part_start = part * PARTITION;
    const int part_end = part_start + PARTITION < end ? part_start + PARTITION : end;
    const int32_t *table = p->tables + item->seq * p->table_width;
    const float *head = p->pool + item->kv_head * p->head_stride;
    for (int r = 0; r < item->rows; r++) state->max[r] = -INFINITY, state->sum[r] = 0.0f;
    memset(state->acc, 0, item->rows * p->dim * sizeof(float));
    const int64_t seen = first_seen(p, limits[0]);
    for (int start = seen > part_start ? (int)(seen / TILE * TILE) : part_start; start < part_end; start += TILE) {
        const float *key_rows[TILE], *value_rows[TILE];
        const int count = part_end - start < TILE ? part_end - start : TILE;
        int offset = start % p->block_size;
        const float *block = head + table[start / p->block_size] * p->block_stride;
        for (int j = 0; j < TILE; j++, offset++) {
            if (offset == p->block_size && j < count) {
                offset = 0;
                block = head + table[(start + j) / p->block_size] * p->block_stride;
            }
            key_rows[j] = j < count ? block + offset * p->dim : key_rows[count - 1]; /* a valid key for idle lanes */
            value_rows[j] = key_rows[j] + p->block_size * p->dim;
        }
        transpose_tile(key_rows, value_rows, count, p->dim, keys);
        if (start + TILE < part_end) prefetch_tile(p, table, head, start + TILE, part_end);
        for (int r = 0; r < item->rows; r += QR) {
            const int rows = item->rows - r < QR ? item->rows - r : QR;
            score_rows(rows, query + r * p->dim, keys, count, p->dim, probs + r * TILE);
            for (int i = r; i < r + rows; i++) {
                const int limit = limits[i] - start, first = p->window ? limit - (int)p->window : 0;
                if (limit > 0 && first < TILE) {
                    rescale[i] =
                        softmax_row(probs + i * TILE, first, limit, p->soft_cap, &state->max[i], &state->sum[i]);
                } else {
                    rescale[i] = 1.0f;
                    memset(probs + i * TILE, 0, TILE * sizeof(float));
                }
            }
            weigh_rows(rows, probs + r * TILE, value_rows, count, p->dim, rescale + r, state->acc + r * p->dim);
        }
    }
}

/* Fold a later partition into an earlier one. A row that saw nothing of it (sum 0) stays as it is. */
static void merge(const float *max, const float *sum, const float *acc, int rows, int64_t dim, State *into) {
    for (int r = 0; r < rows; r++) {
        if (sum[r] == 0.0f) continue;
        const float top = max[r] > into->max[r] ? max[r] : into->max[r];
        const float old = into->sum[r] == 0.0f ? 0.0f : expf(into->max[r] - top), new = expf(max[r] - top);
        for (int64_t d = 0; d < dim; d += VL) {
            float *a = into->acc + r * dim + d;
            store(a, load(a) * old + load(acc + r * dim + d) * new);
        }
        into->sum[r] = into->sum[r] * old + sum[r] * new;
        into->max[r] = top;
    }
}

static float *out_row(const Problem *p, const Item *item, int row) {
    const int64_t group = p->heads / p->kv_heads, index = item->first_row + row;
    const int64_t token = p->query_start[item->seq] + index / group;
    return p->out + (token * p->heads + item->kv_head * group + index % group) * p->dim;
}

static void write_out(const Problem *p, const Item *item, const State *state) {
    for (int r = 0; r < item->rows; r++) {
        float *out = out_row(p, item, r);
        for (int64_t d = 0; d < p->dim; d += VL)
            store(out + d, load(state->acc + r * p->dim + d) / splat(state->sum[r]));
    }
}

static void run_item(const Problem *p, const Item *item) {
    State total, partition;
    float query[ROWS * MAX_DIM] __attribute__((aligned(64)));
    int limits[ROWS];
    const int64_t group = p->heads / p->kv_heads, first_token = p->query_start[item->seq];
    const int chunk = p->query_start[item->seq + 1] - first_token;
    for (int r = 0; r < item->rows; r++) {
        const int64_t index = item->first_row + r, token = index / group;
        const float *q = p->query + (first_token + token) * p->query_stride
                         + (item->kv_head * group + index % group) * p->dim;
        for (int64_t d = 0; d < p->dim; d++) query[r * p->dim + d] = q[d] * p->scale;
        limits[r] = p->seq_lens[item->seq] - chunk + token + 1;
    }
    attend_partition(p, item, query, limits, item->first_part, &total);
    for (int part = item->first_part + 1; part < item->first_part + item->parts; part++) {
        attend_partition(p, item, query, limits, part, &partition);
        merge(partition.max, partition.sum, partition.acc, item->rows, p->dim, &total);
    }
    if (item->partial < 0) {
        write_out(p, item, &total);
        return;
    }
    float *to = p->partials + item->partial;
    memcpy(to, total.max, item->rows * sizeof(float));
    memcpy(to + item->rows, total.sum, item->rows * sizeof(float));
    memcpy(to + 2 * item->rows, total.acc, item->rows * p->dim * sizeof(float));
}

/* Items [first, first + of_parts) hold one partition each of the same rows. */
static void join_partitions(const Problem *p, const Item *first) {
    State total;
    for (int r = 0; r < first->rows; r++) total.max[r] = -INFINITY, total.sum[r] = 0.0f;
    memset(total.acc, 0, first->rows * p->dim * sizeof(float));
    for (int part = 0; part < first->of_parts; part++) {
        const float *from = p->partials + first[part].partial;
        merge(from, from + first->rows, from + 2 * first->rows, first->rows, p->dim, &total);
    }
    write_out(p, first, &total);
}

static int by_cost(const void *a, const void *b) { return ((const Item *)b)->cost - ((const Item *)a)->cost; }

/* Cut the batch into items. With items NULL only counts them. */
static int64_t plan(const Problem *p, Item *items, int64_t *partial_floats) {
    const int64_t group = p->heads / p->kv_heads;
    int64_t count = 0;
    *partial_floats = 0;
    for (int64_t seq = 0; seq < p->num_seqs; seq++) {
        const int64_t chunk = p->query_start[seq + 1] - p->query_start[seq], all_rows = chunk * group;
        for (int64_t kv_head = 0; kv_head < p->kv_heads; kv_head++)
            for (int64_t row = 0; row < all_rows; row += ROWS) {
                const int64_t rows = all_rows - row < ROWS ? all_rows - row : ROWS;
                const int64_t end = p->seq_lens[seq] - chunk + (row + rows - 1) / group + 1;
                const int64_t first_part = first_seen(p, p->seq_lens[seq] - chunk + row / group + 1) / PARTITION;
                const int64_t parts = (end + PARTITION - 1) / PARTITION - first_part;
                const int64_t split = all_rows <= ROWS && parts > 1 ? parts : 1;
                for (int64_t piece = 0; piece < split; piece++, count++) {
                    if (items)
                        items[count] = (Item){.seq = seq, .kv_head = kv_head, .first_row = row, .rows = rows,
                                              .first_part = first_part + piece, .parts = parts / split, .of_parts = split,
                                              .cost = rows * (end < INT32_MAX / ROWS ? end : INT32_MAX / ROWS) / split,
                                              .partial = split > 1 ? *partial_floats : -1};
                    if (split > 1) *partial_floats += rows * (p->dim + 2);
                }
            }
    }
    return count;
}

/* query, pool, out and the index arrays as in ops.Ops.paged_attention; query rows query_stride floats apart.
 * Returns 0, or -1 when memory for the work list is lacking. */
int baton_paged_attention(const float *query, int64_t query_stride, const float *pool, float *out,
                          const int32_t *query_start, const int32_t *seq_lens, const int32_t *tables,
                          int64_t table_width, int64_t num_seqs, int64_t heads, int64_t kv_heads, int64_t dim,
                          int64_t layers, int64_t layer, int64_t block_size, int64_t window, float scale,
                          float soft_cap, int threads) {
    const int64_t layer_stride = 2 * block_size * dim, head_stride = layers * layer_stride;
    Problem problem = {.query = query, .pool = pool + layer * layer_stride, .query_start = query_start,
                       .seq_lens = seq_lens, .tables = tables, .out = out, .query_stride = query_stride,
                       .num_seqs = num_seqs, .heads = heads, .kv_heads = kv_heads, .dim = dim,
                       .block_size = block_size, .block_stride = kv_heads * head_stride, .head_stride = head_stride,
                       .table_width = table_width, .window = window, .scale = scale, .soft_cap = soft_cap};
    int64_t partial_floats;
    const int64_t count = plan(&problem, NULL, &partial_floats);
    Item *items = malloc(count * sizeof(Item) + count * sizeof(Item) + partial_floats * sizeof(float) + 1);
    if (!items) return -1;
    Item *ordered = items + count;
    problem.partials = (float *)(ordered + count);
    plan(&problem, items, &partial_floats);
    memcpy(ordered, items, count * sizeof(Item));
    qsort(ordered, count, sizeof(Item), by_cost); /* long ones first, so that no thread ends up with one alone */
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (count > 1)
    for (int64_t i = 0; i < count; i++) run_item(&problem, &ordered[i]);
    for (int64_t i = 0; i < count; i += items[i].of_parts)
        if (items[i].of_parts > 1) join_partitions(&problem, &items[i]);
    free(items);
    return 0;
}
