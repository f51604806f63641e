/* y = x w^T + b + r for few rows of x and weights that are read once: the products of a decode step or a prefill chunk.
 *
 * Weights are packed in panels of NR output features, [panels][in_features][NR], so that a tile streams one panel from
 * memory front to back while MR rows of results stay in registers. Each result is one chain of fused multiply-adds over
 * the input features in order, whatever the number of rows: results do not depend on the batch. */
#include "vec.h"

#define NR (2 * VL)
#define PREFETCH 8 /* steps of k ahead */

INLINE void tile(const int rows, const float *restrict x, size_t ldx, const float *restrict panel, size_t k_size,
                 vf bias0, vf bias1, const float *restrict residual, float *restrict y, size_t ldy) {
    vf acc[MR][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) acc[r][0] = bias0, acc[r][1] = bias1;
#pragma GCC unroll 1
    for (size_t k = 0; k < k_size; k++) {
        vf w0 = load(panel + k * NR), w1 = load(panel + k * NR + VL);
        __builtin_prefetch(panel + (k + PREFETCH) * NR);
        if (NR > 16) __builtin_prefetch(panel + (k + PREFETCH) * NR + 16);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            float value = x[r * ldx + k];
            acc[r][0] += value * w0;
            acc[r][1] += value * w1;
        }
    }
    if (residual)
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
            acc[r][0] += load(residual + r * ldy), acc[r][1] += load(residual + r * ldy + VL);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) store(y + r * ldy, acc[r][0]), store(y + r * ldy + VL, acc[r][1]);
}

static void tile_rows(int rows, const float *x, size_t ldx, const float *panel, size_t k_size, vf b0, vf b1,
                      const float *residual, float *y, size_t ldy) {
#define CASE(n) case n: tile(n, x, ldx, panel, k_size, b0, b1, residual, y, ldy); break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if MR == 12
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

int baton_panel_width(void) { return NR; }

/* x [m, k], rows ldx apart; packed [ceil(n / NR), k, NR], padded with zeros; bias [n] or NULL; residual [m, n] or NULL;
 * y [m, n]. */
void baton_linear(const float *x, int64_t ldx, const float *packed, const float *bias, const float *residual, float *y,
                  int64_t m, int64_t n, int64_t k, int threads) {
    const int64_t panels = (n + NR - 1) / NR, row_blocks = (m + MR - 1) / MR;
    const int64_t grain = panels / (threads * 4) > 0 ? panels / (threads * 4) : 1;
#pragma omp parallel for schedule(dynamic, grain) num_threads(threads)
    for (int64_t p = 0; p < panels; p++) {
        const float *panel = packed + p * k * NR;
        const int64_t columns = n - p * NR < NR ? n - p * NR : NR;
        float edge[MR * NR], edge_bias[NR] = {0};
        if (bias) memcpy(edge_bias, bias + p * NR, columns * sizeof(float));
        vf b0 = load(edge_bias), b1 = load(edge_bias + VL);
        int64_t row = 0;
        for (int64_t block = 0; block < row_blocks; block++) {
            const int64_t rows = (m - row) / (row_blocks - block); /* even tiles: no thin one at the end */
            float *out = y + row * n + p * NR;
            const float *added = residual ? residual + row * n + p * NR : NULL;
            if (columns == NR) {
                tile_rows(rows, x + row * ldx, ldx, panel, k, b0, b1, added, out, n);
            } else {
                tile_rows(rows, x + row * ldx, ldx, panel, k, b0, b1, NULL, edge, NR);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = 0; c < columns; c++)
                        out[r * n + c] = edge[r * NR + c] + (added ? added[r * n + c] : 0);
            }
            row += rows;
        }
    }
}
