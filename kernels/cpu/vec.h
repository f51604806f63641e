/* Vectors of one register's width in GNU C, so that one source serves AVX-512, AVX2, NEON and plain x86-64. No -ffast-math: the order of every sum is what is written here, so a token's values do not depend on the
 * batch it runs in. */
#ifndef BATON_VEC_H
#define BATON_VEC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VL 16 /* floats per vector */
#define MR 12 /* rows of a matrix tile: MR * 2 accumulators, two weights and a broadcast fit the registers */
#elif defined(__AVX__)
#define VL 8
#define MR 6
#else
#define VL 4
#define MR 6
#endif

typedef float vf __attribute__((vector_size(VL * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4)));

/* F(lane, argument) for every lane of a vector, to write constant vectors. */
#define EACH_LANE_4(F, first, a) F((first), a), F((first) + 1, a), F((first) + 2, a), F((first) + 3, a)
#define EACH_LANE_8(F, first, a) EACH_LANE_4(F, first, a), EACH_LANE_4(F, (first) + 4, a)
#if VL == 16
#define EACH_LANE(F, a) EACH_LANE_8(F, 0, a), EACH_LANE_8(F, 8, a)
#elif VL == 8
#define EACH_LANE(F, a) EACH_LANE_8(F, 0, a)
#else
#define EACH_LANE(F, a) EACH_LANE_4(F, 0, a)
#endif
#define IDENTITY(lane, unused) (lane)

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf v) { *(vf *)p = v; }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf select_vf(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf max_vf(vf a, vf b) { return select_vf(a > b, a, b); }
INLINE vf min_vf(vf a, vf b) { return select_vf(a < b, a, b); }

INLINE float sum_lanes(vf v) {
    float parts[VL];
    store(parts, v);
    for (int width = VL / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) parts[lane] += parts[lane + width];
    return parts[0];
}

INLINE float max_lanes(vf v) {
    float parts[VL];
    store(parts, v);
    for (int width = VL / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++)
            parts[lane] = parts[lane] > parts[lane + width] ? parts[lane] : parts[lane + width];
    return parts[0];
}

/* e^x within 2 ulp for x <= 88; 0 below -87. Cephes' polynomial on [-ln2/2, ln2/2], scaled by 2^n. */
INLINE vf exp_vf(vf x) {
    const vf round_bias = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vf n = (x * 1.44269504088896341f + round_bias) - round_bias;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
    vi in_range = x > splat(-87.0f);
    return (vf)(in_range & (vi)(p * (vf)scale));
}

#endif
