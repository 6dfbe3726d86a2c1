// The matrix product by AVX-512's dot products of bfloat16 pairs, for processors without tile registers.
#include "kernels.h"

#include <string.h>

// So many rows of x at a time: with two sums a row, their 16 sums hide each other's latency, and weights are read once
// for all of them.
enum { ROWS = 8 };
// The processor's own guess of what is read next is too timid beside so much work: without this, reading from memory
// and computing take turns. In weights, so four blocks ahead.
enum { AHEAD = 4 * 1024 };

int gxr_ready(void) { return 1; }

static inline __attribute__((always_inline)) void rows_of(const int rows, const bf16 *x, int k, const bf16 *w,
                                                          bf16 *y, size_t stride, const int fetch) {
    __m512 sums[ROWS][2];
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int kb = 0; kb < k / 32; kb++, w += 1024)
        for (int pair = 0; pair < 16; pair++) {
            const bf16 *first = w + pair * 32, *second = first + 512;
            if (fetch) {
                _mm_prefetch((const char *)(first + AHEAD), _MM_HINT_T0);
                _mm_prefetch((const char *)(second + AHEAD), _MM_HINT_T0);
            }
            __m512bh left = (__m512bh)_mm512_loadu_si512(first), right = (__m512bh)_mm512_loadu_si512(second);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                int two;
                memcpy(&two, x + (size_t)r * k + kb * 32 + pair * 2, 4);
                __m512bh inputs = (__m512bh)_mm512_set1_epi32(two);
                sums[r][0] = _mm512_dpbf16_ps(sums[r][0], inputs, left);
                sums[r][1] = _mm512_dpbf16_ps(sums[r][1], inputs, right);
            }
        }
    for (int r = 0; r < rows; r++) {
        store16(y + r * stride, sums[r][0]);
        store16(y + r * stride + 16, sums[r][1]);
    }
}

// The number of rows has to be known when this is compiled, so that all sums stay in registers.
#define CASE(n) \
    case n: \
        fetch ? rows_of(n, x, k, w, y, stride, 1) : rows_of(n, x, k, w, y, stride, 0); \
        break;

static void some_rows(int rows, const bf16 *x, int k, const bf16 *w, bf16 *y, size_t stride, int fetch) {
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
}

void product(const bf16 *x, int m, int k, const bf16 *w, int n, bf16 *y, size_t stride) {
    int groups = (m + ROWS - 1) / ROWS;  // of nearly equal size
#pragma omp parallel for schedule(static)
    for (int nb = 0; nb < n / 32; nb++)
        for (int g = 0; g < groups; g++) {
            int row = m * g / groups, rows = m * (g + 1) / groups - row;
            some_rows(rows, x + (size_t)row * k, k, w + (size_t)nb * 32 * k, y + row * stride + nb * 32, stride, !g);
        }
}
