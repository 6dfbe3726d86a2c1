// The matrix product with AVX-512's dot products of bfloat16 pairs, for CPUs without tile registers.
#include "kernels.h"

#include <string.h>

// Tokens at a time: with two sums each, the 16 sums hide each other's latency, and a weight is read once for all of
// them.
enum { TOKENS = 8 };
// The CPU's own prefetching is too cautious for this amount of work: without this, memory reads and computation
// alternate. In weights: four blocks ahead, at the end past the last one, where a prefetch does nothing.
enum { AHEAD = 4 * 1024 };

int gxr_ready(void) { return 1; }

// y[tokens][32] = x[tokens][k] . w, where w is the blocks of 32 outputs.
static inline __attribute__((always_inline)) void block_column(const int tokens, const bf16 *x, int k, const bf16 *w,
                                                               bf16 *y, size_t stride, const int fetch) {
    __m512 sums[TOKENS][2];
    for (int t = 0; t < tokens; t++) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
    for (int kb = 0; kb < k / 32; kb++, w += 1024)
        for (int pair = 0; pair < 16; pair++) {
            const bf16 *first = w + pair * 32, *second = first + 512;
            if (fetch) {
                _mm_prefetch((const char *)(first + AHEAD), _MM_HINT_T0);
                _mm_prefetch((const char *)(second + AHEAD), _MM_HINT_T0);
            }
            __m512bh left = (__m512bh)_mm512_loadu_si512(first), right = (__m512bh)_mm512_loadu_si512(second);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) {
                int two;
                memcpy(&two, x + (size_t)t * k + kb * 32 + pair * 2, 4);
                __m512bh inputs = (__m512bh)_mm512_set1_epi32(two);
                sums[t][0] = _mm512_dpbf16_ps(sums[t][0], inputs, left);
                sums[t][1] = _mm512_dpbf16_ps(sums[t][1], inputs, right);
            }
        }
    for (int t = 0; t < tokens; t++) {
        store16(y + t * stride, sums[t][0]);
        store16(y + t * stride + 16, sums[t][1]);
    }
}

// The number of tokens must be known at compile time, so that all sums stay in registers.
#define CASE(n)                                                                                             \
    case n:                                                                                                 \
        fetch ? block_column(n, x, k, w, y, stride, 1) : block_column(n, x, k, w, y, stride, 0);            \
        break;

static void of_tokens(int tokens, const bf16 *x, int k, const bf16 *w, bf16 *y, size_t stride, int fetch) {
    switch (tokens) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
}

void product(const bf16 *x, int m, int k, const bf16 *w, int n, bf16 *y, size_t stride) {
    int groups = (m + TOKENS - 1) / TOKENS;  // of nearly equal size
#pragma omp parallel for schedule(static)
    for (int nb = 0; nb < n / 32; nb++)
        for (int g = 0; g < groups; g++) {
            int row = m * g / groups, tokens = m * (g + 1) / groups - row;
            // The first group loads the block's weights into the cache for the others.
            int fetch = g == 0;
            of_tokens(tokens, x + (size_t)row * k, k, w + (size_t)nb * 32 * k, y + row * stride + nb * 32, stride, fetch);
        }
}
