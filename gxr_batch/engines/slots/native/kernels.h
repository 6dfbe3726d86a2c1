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

// Requests from the system what the product needs; 0 if refused.
int gxr_ready(void);

// y[m][n] = x[m][k] . w for packed w: blocks [n/32][k/32] of two tiles of 16 outputs each; in a tile, row = pair of
// inputs, column = output. Rows of y are `stride` apart. x has its rows padded to a multiple of 32 (their content does
// not matter). The order of every sum is the same whatever m is. Hidden, so that no other library's `product` is called.
__attribute__((visibility("hidden"))) void product(const bf16 *x, int m, int k, const bf16 *w, int n, bf16 *y, size_t stride);
