// The matrix product with AVX-512's dot products of bfloat16 pairs, for CPUs without tile registers.
#include "kernels.h"

#include <omp.h>
#include <string.h>

// Tokens at a time: with two sums each, the 16 sums hide each other's latency, and a weight is read once for all of
// them.
enum { TOKENS = 8 };

int gxr_ready(void) { return 1; }

// y[tokens][32] = x[tokens][k] . w, where w is the blocks of 32 outputs. Meanwhile fetches weights ahead.
static inline __attribute__((always_inline)) void block_column(const int tokens, const bf16 *x, int k, const bf16 *w,
                                                               bf16 *y, size_t stride, int streamed,
                                                               struct fetch ahead) {
    __m512 sums[TOKENS][2];
    for (int t = 0; t < tokens; t++) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
    for (int kb = 0; kb < k / 32; kb++, w += 1024) {
        fetch_lines(&ahead);
        for (int pair = 0; pair < 16; pair++) {
            const bf16 *first = w + pair * 32, *second = first + 512;
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
    }
    for (int t = 0; t < tokens; t++) store32(y + t * stride, sums[t][0], sums[t][1], streamed);
}

// The number of tokens must be known at compile time, so that all sums stay in registers.
#define CASE(n)                                                 \
    case n:                                                     \
        block_column(n, x, k, w, y, stride, streamed, ahead);   \
        break;

static void of_tokens(int tokens, const bf16 *x, int k, const bf16 *w, bf16 *y, size_t stride, int streamed,
                      struct fetch ahead) {
    switch (tokens) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
}

void product(const bf16 *x, int m, int k, const bf16 *w, int n, bf16 *y, size_t stride) {
    int groups = (m + TOKENS - 1) / TOKENS, blocks = n / 32;  // groups of nearly equal size
    int streamed = past_caches(y, m, n, stride);
#pragma omp parallel
    {
        int threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int begin = (int64_t)blocks * thread / threads, end = (int64_t)blocks * (thread + 1) / threads;
        for (int nb = begin; nb < end; nb++) {
            const bf16 *block = w + (size_t)nb * 32 * k;
            for (int g = 0; g < groups; g++) {
                int row = m * g / groups, tokens = m * (g + 1) / groups - row;
                of_tokens(tokens, x + (size_t)row * k, k, block, y + row * stride + nb * 32, stride, streamed,
                          weights_ahead(block, k, g, groups, nb == begin, nb + 1 == end));
            }
        }
        if (streamed) _mm_sfence();
    }
}
