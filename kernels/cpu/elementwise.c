/* What stands between the matrix products: norms, SwiGLU, rotary positions and the write into the KV blocks.
 * Sizes are multiples of VL except where a scalar tail is written. Threads join in only when there is enough to do. */
#include "vec.h"

#include <math.h>

#define PARALLEL_FROM 65536 /* elements; below, waking a thread costs more than it saves */

INLINE float mean_square(const float *x, int64_t size) {
    vf sum = {0};
    int64_t i = 0;
    for (; i + VL <= size; i += VL) sum += load(x + i) * load(x + i);
    float total = sum_lanes(sum);
    for (; i < size; i++) total += x[i] * x[i];
    return total / size;
}

INLINE void scale_row(const float *x, const float *weight, float scale, float *y, int64_t size) {
    int64_t i = 0;
    for (; i + VL <= size; i += VL) store(y + i, load(weight + i) * (load(x + i) * scale));
    for (; i < size; i++) y[i] = weight[i] * (x[i] * scale);
}

/* y = norm(x) * weight; x and y [n, size]. */
void baton_rms_norm(const float *x, const float *weight, float eps, float *y, int64_t n, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (n * size >= PARALLEL_FROM)
    for (int64_t row = 0; row < n; row++) {
        const float *from = x + row * size;
        scale_row(from, weight, 1.0f / sqrtf(mean_square(from, size) + eps), y + row * size, size);
    }
}

/* gate_up [n, 2 * size] -> y [n, size] */
void baton_silu_and_mul(const float *gate_up, float *y, int64_t n, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (n * size >= PARALLEL_FROM)
    for (int64_t row = 0; row < n; row++) {
        const float *gate = gate_up + row * 2 * size, *up = gate + size;
        int64_t i = 0;
        for (; i + VL <= size; i += VL) {
            vf g = load(gate + i), e = exp_vf(min_vf(-g, splat(88.0f)));
            store(y + row * size + i, g / (1.0f + e) * load(up + i));
        }
        for (; i < size; i++) y[row * size + i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

/* y may be x. The first 2 * half elements turn, half against half; the rest is copied. */
INLINE void rotate(const float *x, const float *cosines, const float *sines, float *y, int64_t half, int64_t size) {
    int64_t i = 0;
    for (; i + VL <= half; i += VL) {
        vf a = load(x + i), b = load(x + half + i), c = load(cosines + i), s = load(sines + i);
        store(y + i, a * c - b * s);
        store(y + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        y[i] = a * cosines[i] - b * sines[i];
        y[half + i] = b * cosines[i] + a * sines[i];
    }
    if (y != x) memcpy(y + 2 * half, x + 2 * half, (size - 2 * half) * sizeof(float));
}

/* qkv [n, (heads + 2 * kv_heads) * dim], queries are rotated in place, keys and values go to the pool
 * [blocks, kv_heads, layers, 2, block_size, dim]; norms [dim] or NULL; cos_sin [positions, 2 * half]. */
void baton_rope_and_cache(float *qkv, const float *cos_sin, const int32_t *positions, const int64_t *slots, float *pool,
                          const float *query_norm, const float *key_norm, float eps, int64_t n, int64_t heads,
                          int64_t kv_heads, int64_t dim, int64_t half, int64_t layers, int64_t layer,
                          int64_t block_size, int threads) {
    const int64_t layer_stride = 2 * block_size * dim, head_stride = layers * layer_stride;
    const int64_t row_size = (heads + 2 * kv_heads) * dim;
#pragma omp parallel for num_threads(threads) if (n * row_size >= PARALLEL_FROM)
    for (int64_t token = 0; token < n; token++) {
        float *row = qkv + token * row_size;
        const float *cosines = cos_sin + positions[token] * 2 * half, *sines = cosines + half;
        const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
        for (int64_t head = 0; head < heads + kv_heads; head++) {
            float *x = row + head * dim;
            const float *norm = head < heads ? query_norm : key_norm;
            if (norm) scale_row(x, norm, 1.0f / sqrtf(mean_square(x, dim) + eps), x, dim);
        }
        for (int64_t head = 0; head < heads; head++)
            rotate(row + head * dim, cosines, sines, row + head * dim, half, dim);
        for (int64_t head = 0; head < kv_heads; head++) {
            float *key = pool + (block * kv_heads + head) * head_stride + layer * layer_stride + offset * dim;
            rotate(row + (heads + head) * dim, cosines, sines, key, half, dim);
            memcpy(key + block_size * dim, row + (heads + kv_heads + head) * dim, dim * sizeof(float));
        }
    }
}
