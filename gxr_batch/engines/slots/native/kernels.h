// What the kernel files share: reading and writing bfloat16, and the matrix product that each of product_*.c implements
// for one kind of CPU.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

typedef uint16_t bf16;

// What functions return that were given a number outside its range, or get no memory.
enum { BAD_NUMBER = -1, NO_MEMORY = -2 };

static inline __m512 load16(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

static inline void store16(bf16 *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }

// Stores 32 numbers, past the caches if `streamed`.
static inline __attribute__((always_inline)) void store32(bf16 *p, __m512 low, __m512 high, int streamed) {
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (streamed)
        _mm512_stream_si512((void *)p, both);
    else
        _mm512_storeu_si512(p, both);
}

// Requests from the system what the product needs; 0 if refused.
int gxr_ready(void);

// y[m][n] = x[m][k] . w for packed w: blocks [n/32][k/32] of two tiles of 16 outputs each; in a tile, row = pair of
// inputs, column = output. Rows of y are `stride` apart. x has its rows padded to a multiple of 32 (their content does
// not matter). The order of every sum is the same whatever m is. Hidden, so that no other library's `product` is called.
__attribute__((visibility("hidden"))) void product(const bf16 *x, int m, int k, const bf16 *w, int n, bf16 *y, size_t stride);

// ---------------------------------------------------------------------------------------------------- for products

// Results of more bytes than this are written past the caches, which would first read every line that is overwritten
// and then not hold them until they are read.
enum { CACHED_BYTES = 8 << 20 };
// How far ahead, in weights, a block fetches itself.
enum { AHEAD = 4 * 1024 };

// Whether a product writes y past the caches.
static inline int past_caches(const bf16 *y, int m, int n, size_t stride) {
    return (size_t)m * n * 2 > CACHED_BYTES && ((uintptr_t)y | stride * 2) % 64 == 0;
}

// Weights to fetch into the cache: `lines` cache lines from `next` on for each block of inputs.
struct fetch {
    const bf16 *next;
    int lines;
};

// What a group of rows fetches while it uses a block of weights, the `first` or `last` of its thread. The CPU's own
// prefetching is too cautious for this amount of work. Each group fetches its part of the thread's next block, so that
// memory is read evenly during the computation.
static inline struct fetch weights_ahead(const bf16 *block, int k, int group, int groups, int first, int last) {
    if (first && last && group == 0)  // no block before it has fetched this one
        return (struct fetch){block + AHEAD, 32};
    int part = 32 * group / groups, lines = last ? 0 : 32 * (group + 1) / groups - part;
    return (struct fetch){block + (32 + part) * (size_t)k, lines};
}

static inline __attribute__((always_inline)) void fetch_lines(struct fetch *ahead) {
    for (int line = 0; line < ahead->lines; line++, ahead->next += 32)
        _mm_prefetch((const char *)ahead->next, _MM_HINT_T1);
}
