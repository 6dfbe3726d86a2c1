// The intrinsics that the kernels use, in plain C: for machines and sanitizers that do not have the real ones. With this
// folder first on the include path the kernels compile for any CPU, and every access to memory is a visible one.
#pragma once

#include <assert.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// Sanitizers put guards around memory of malloc, and none around pages.
#define mmap(address, bytes, ...) calloc(1, bytes)
#define munmap(pointer, bytes) ((void)(bytes), free(pointer))
#define madvise(pointer, bytes, advice) ((void)(advice))

typedef float __m512 __attribute__((vector_size(64)));
typedef int64_t __m512i __attribute__((vector_size(64)));
typedef int64_t __m256i __attribute__((vector_size(32)));
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef uint16_t __m256bh __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t __mmask16;

#define EACH for (int i = 0; i < 16; i++)
#define OF(type, name, parameters, value) \
    static inline type name parameters {  \
        type y;                           \
        EACH y[i] = value;                \
        return y;                         \
    }

OF(__m512, _mm512_set1_ps, (float a), a)
OF(__m512, _mm512_fmadd_ps, (__m512 a, __m512 b, __m512 c), fmaf(a[i], b[i], c[i]))
OF(__m512, _mm512_fmsub_ps, (__m512 a, __m512 b, __m512 c), fmaf(a[i], b[i], -c[i]))
OF(__m512, _mm512_fnmadd_ps, (__m512 a, __m512 b, __m512 c), fmaf(-a[i], b[i], c[i]))
OF(__m512, _mm512_mul_ps, (__m512 a, __m512 b), a[i] * b[i])
OF(__m512, _mm512_add_ps, (__m512 a, __m512 b), a[i] + b[i])
OF(__m512, _mm512_sub_ps, (__m512 a, __m512 b), a[i] - b[i])
OF(__m512, _mm512_div_ps, (__m512 a, __m512 b), a[i] / b[i])
OF(__m512, _mm512_max_ps, (__m512 a, __m512 b), a[i] > b[i] ? a[i] : b[i])
OF(__m512, _mm512_abs_ps, (__m512 a), fabsf(a[i]))
OF(__m512, _mm512_scalef_ps, (__m512 a, __m512 b), a[i] * exp2f(floorf(b[i])))
OF(__m512, _mm512_maskz_mov_ps, (__mmask16 mask, __m512 a), mask >> i & 1 ? a[i] : 0)
OF(__m512, _mm512_mask_mov_ps, (__m512 other, __mmask16 mask, __m512 a), mask >> i & 1 ? a[i] : other[i])
OF(__m512, _mm512_mask_sub_ps, (__m512 other, __mmask16 mask, __m512 a, __m512 b), mask >> i & 1 ? a[i] - b[i] : other[i])
#define _mm512_setzero_ps() _mm512_set1_ps(0)
#define _mm512_roundscale_ps(a, bits) rounded(a)
OF(__m512, rounded, (__m512 a), rintf(a[i]))

// Two lanes of each vector: the first two selectors are for `a`, the others for `b`.
OF(__m512, _mm512_shuffle_f32x4, (__m512 a, __m512 b, int by), (i < 8 ? a : b)[(by >> i / 4 * 2 & 3) * 4 + i % 4])
OF(__m512, _mm512_shuffle_ps, (__m512 a, __m512 b, int by), (i % 4 < 2 ? a : b)[i / 4 * 4 + (by >> i % 4 * 2 & 3)])
OF(__m512, _mm512_permutexvar_ps, (__m512i from, __m512 a), a[((u32x16)from)[i] & 15])
#define _mm512_setr_epi32(...) ((__m512i)(u32x16){__VA_ARGS__})

static inline float _mm512_reduce_add_ps(__m512 a) {  // in the order of the compiler's own
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
}

static inline float _mm512_reduce_max_ps(__m512 a) {
    float most = a[0];
    EACH most = a[i] > most ? a[i] : most;
    return most;
}

enum { _CMP_GE_OQ, _CMP_UNORD_Q };

static inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
    unsigned mask = 0;
    EACH mask |= (unsigned)(how == _CMP_GE_OQ ? a[i] >= b[i] : isnan(a[i]) || isnan(b[i])) << i;
    return (__mmask16)mask;
}

// ---------------------------------------------------------------------------------------------------- memory

#define LOAD(type, name, pointer, bytes)      \
    static inline type name(pointer from) {   \
        type y;                               \
        memcpy(&y, from, bytes);              \
        return y;                             \
    }

LOAD(__m512, _mm512_loadu_ps, const void *, 64)
LOAD(__m512i, _mm512_loadu_si512, const void *, 64)
LOAD(__m256i, _mm256_loadu_si256, const __m256i *, 32)

static inline __m512 _mm512_load_ps(const float *from) {
    assert((uintptr_t)from % 64 == 0);
    return _mm512_loadu_ps(from);
}

static inline void _mm512_store_ps(float *to, __m512 a) {
    assert((uintptr_t)to % 64 == 0);
    memcpy(to, &a, 64);
}

static inline void _mm256_storeu_si256(__m256i *to, __m256i a) { memcpy((void *)to, &a, 32); }

static inline void _mm512_storeu_si512(void *to, __m512i a) { memcpy(to, &a, 64); }

static inline void _mm512_stream_si512(void *to, __m512i a) {
    assert((uintptr_t)to % 64 == 0);
    memcpy(to, &a, 64);
}

#define _mm_sfence() ((void)0)
#define _MM_HINT_T1 0
#define _mm_prefetch(from, hint) ((void)(from))

// ---------------------------------------------------------------------------------------------------- bfloat16

static inline float widened(uint16_t a) {
    uint32_t bits = (uint32_t)a << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline uint16_t narrowed(float a) {
    uint32_t bits;
    memcpy(&bits, &a, 4);
    if (isnan(a)) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    u32x16 y;
    EACH y[i] = ((__m256bh)a)[i];
    return (__m512i)y;
}

static inline __m512i _mm512_set1_epi32(int a) {
    u32x16 y;
    EACH y[i] = (uint32_t)a;
    return (__m512i)y;
}

static inline __m512i _mm512_slli_epi32(__m512i a, int by) { return (__m512i)((u32x16)a << by); }
static inline __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }

OF(__m256bh, _mm512_cvtneps_pbh, (__m512 a), narrowed(a[i]))
static inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    __m512bh y;
    EACH y[i] = narrowed(low[i]), y[i + 16] = narrowed(high[i]);
    return y;
}

OF(__m512, _mm512_dpbf16_ps, (__m512 sum, __m512bh a, __m512bh b),
   sum[i] + widened(a[2 * i + 1]) * widened(b[2 * i + 1]) + widened(a[2 * i]) * widened(b[2 * i]))

// ---------------------------------------------------------------------------------------------------- tiles

// Eight tiles of 16 rows of 64 bytes in each thread, the only configuration that the kernels use.
static _Thread_local uint8_t tiles[8][16][64];

#define _tile_loadconfig(from) ((void)(from))
#define _tile_release() ((void)0)
#define _tile_zero(tile) memset(tiles[tile], 0, sizeof tiles[tile])

static inline void _tile_loadd(int tile, const void *from, size_t stride) {
    EACH memcpy(tiles[tile][i], (const uint8_t *)from + i * stride, 64);
}

static inline void _tile_stored(int tile, void *to, size_t stride) {
    EACH memcpy((uint8_t *)to + i * stride, tiles[tile][i], 64);
}

static inline void _tile_dpbf16ps(int sums, int left, int right) {
    for (int row = 0; row < 16; row++)
        for (int pair = 0; pair < 16; pair++)
            EACH {
                float sum;
                uint16_t a[2], b[2];
                memcpy(&sum, tiles[sums][row] + 4 * i, 4);
                memcpy(a, tiles[left][row] + 4 * pair, 4);
                memcpy(b, tiles[right][pair] + 4 * i, 4);
                sum += widened(a[0]) * widened(b[0]) + widened(a[1]) * widened(b[1]);
                memcpy(tiles[sums][row] + 4 * i, &sum, 4);
            }
}
