/* One token per row of logits: temperature, min_p, top_k, top_p, then the inverse of the cumulative distribution in
 * vocabulary order. No sort: the smallest logit that top_k or top_p keeps is found by selection. And what turns logits
 * into log-probabilities, a row at a time: torch's own sums in an order that follows the number of rows. */
#include "vec.h"

#include <math.h>
#include <stdlib.h>

#define BLOCK 256 /* elements whose mass is summed before looking whether the target lies among them */

typedef double vd __attribute__((vector_size(VL * 8)));

typedef struct {
    float *logits, *weights; /* [size] scaled logits, at most 0, and e^logit */
    float *best, *best_weights; /* [size] what selection works on */
    int64_t size;
} Row;

INLINE double sum_doubles(vd v) {
    double total = 0;
    for (int lane = 0; lane < VL; lane++) total += v[lane];
    return total;
}

/* Sum of weights (or the count where weights is NULL) of elements [start, end) whose logit is at least `floor`. */
static double mass(const Row *row, const float *weights, int64_t start, int64_t end, float floor) {
    vd total = {0};
    int64_t i = start;
    for (; i + VL <= end; i += VL) {
        const vf weight = weights ? load(weights + i) : splat(1.0f);
        total += __builtin_convertvector(select_vf(load(row->logits + i) >= splat(floor), weight, (vf){0}), vd);
    }
    double sum = sum_doubles(total);
    for (; i < end; i++)
        if (row->logits[i] >= floor) sum += weights ? weights[i] : 1.0;
    return sum;
}

static void swap(float *a, int64_t i, int64_t j) {
    const float kept = a[i];
    a[i] = a[j], a[j] = kept;
}

/* Largest t so that elements >= t of (logits, weights)[0, count) weigh `target` at least: quickselect by weight. */
static float select_by_weight(float *logits, float *weights, int64_t count, double target) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        const float a = logits[low], b = logits[(low + high) / 2], c = logits[high - 1];
        const float pivot = fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
        int64_t above = low, equal_end = low; /* [low, above) > pivot, [above, equal_end) == pivot, then the smaller */
        double above_weight = 0, equal_weight = 0;
        for (int64_t i = low; i < high; i++) {
            if (logits[i] < pivot) continue;
            swap(logits, i, equal_end), swap(weights, i, equal_end);
            if (logits[equal_end] > pivot) {
                above_weight += weights[equal_end];
                swap(logits, equal_end, above), swap(weights, equal_end, above);
                above++;
            } else {
                equal_weight += weights[equal_end];
            }
            equal_end++;
        }
        if (above_weight >= target) {
            high = above;
        } else if (above_weight + equal_weight >= target || equal_end == high) {
            return pivot;
        } else {
            target -= above_weight + equal_weight;
            low = equal_end;
        }
    }
    return logits[low];
}

/* Smallest logit kept when the best elements that weigh `target` are. weights NULL: every element weighs 1. */
static float smallest_kept(Row *row, const float *weights, double target, float floor) {
    static const float cutoffs[] = {-2.0f, -4.0f, -8.0f, -16.0f};
    float cutoff = floor; /* selection is slow, so it only gets the elements above a cutoff that weigh enough */
    for (int i = 0; i < 4 && cutoffs[i] > floor; i++)
        if (mass(row, weights, 0, row->size, cutoffs[i]) >= target) {
            cutoff = cutoffs[i];
            break;
        }
    int64_t count = 0;
    for (int64_t i = 0; i < row->size; i++) {
        row->best[count] = row->logits[i];
        row->best_weights[count] = weights ? weights[i] : 1.0f;
        count += row->logits[i] >= cutoff;
    }
    return count ? select_by_weight(row->best, row->best_weights, count, target) : floor;
}

static float largest(const float *logits, int64_t size) {
    vf top = splat(-INFINITY);
    int64_t i = 0;
    for (; i + VL <= size; i += VL) top = max_vf(top, load(logits + i));
    float max = max_lanes(top);
    for (; i < size; i++) max = logits[i] > max ? logits[i] : max;
    return max;
}

static void scale(const float *logits, float temperature, Row *row) {
    const float max = largest(logits, row->size);
    int64_t i;
    for (i = 0; i + VL <= row->size; i += VL) {
        const vf scaled = (load(logits + i) - max) / splat(temperature);
        store(row->logits + i, scaled);
        store(row->weights + i, exp_vf(scaled));
    }
    for (; i < row->size; i++) {
        row->logits[i] = (logits[i] - max) / temperature;
        row->weights[i] = expf(row->logits[i]);
    }
}

static int64_t draw(const Row *row, float threshold, double uniform) {
    const double target = uniform * mass(row, row->weights, 0, row->size, threshold);
    double before = 0;
    int64_t last = 0; /* the last token with a chance, should rounding carry the target past the end */
    for (int64_t start = 0; start < row->size; start += BLOCK) {
        const int64_t end = start + BLOCK < row->size ? start + BLOCK : row->size;
        const double here = mass(row, row->weights, start, end, threshold);
        if (here > 0 && before + here >= target) {
            double sum = before;
            for (int64_t i = start; i < end; i++) {
                if (row->logits[i] < threshold || row->weights[i] == 0) continue;
                sum += row->weights[i];
                last = i;
                if (sum > target) return i;
            }
        }
        before += here;
    }
    return last;
}

/* logits [n, size] -> tokens [n]; parameters [n] as in ops.Ops.draw. Returns 0, or -1 without memory. */
int baton_draw(const float *logits, const float *temperatures, const int64_t *top_k, const double *top_p,
               const float *min_p, const double *uniforms, int64_t *tokens, int64_t n, int64_t size, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (n > 1)
    {
        float *scratch = malloc(4 * size * sizeof(float));
        Row row = {scratch, scratch + size, scratch + 2 * size, scratch + 3 * size, size};
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n; i++) {
            if (!scratch) {
#pragma omp atomic write
                failed = -1;
                continue;
            }
            scale(logits + i * size, temperatures[i], &row);
            float threshold = min_p[i] > 0 ? logf(min_p[i]) : -INFINITY;
            if (top_k[i] > 0 && top_k[i] < size)
                threshold = fmaxf(threshold, smallest_kept(&row, NULL, top_k[i], -INFINITY));
            if (top_p[i] < 1)
                threshold = smallest_kept(&row, row.weights, top_p[i] * mass(&row, row.weights, 0, size, threshold),
                                          threshold);
            tokens[i] = draw(&row, threshold, uniforms[i]);
        }
        free(scratch);
    }
    return failed;
}

/* log(sum(e^logits)) of each row of logits [n, size] -> out [n]. */
void baton_logsumexp(const float *logits, float *out, int64_t n, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (n > 1)
    for (int64_t row = 0; row < n; row++) {
        const float *x = logits + row * size;
        const float max = largest(x, size);
        vd total = {0};
        int64_t i = 0;
        for (; i + VL <= size; i += VL) total += __builtin_convertvector(exp_vf(load(x + i) - max), vd);
        double sum = sum_doubles(total);
        for (; i < size; i++) sum += expf(x[i] - max);
        out[row] = max + log(sum);
    }
}
