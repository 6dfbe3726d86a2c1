// The matrix product with AVX-512's dot products of bfloat16 pairs, for CPUs without tile registers.
#include "kernels.h"

#include <omp.h>
#include <string.h>

// Tokens at a time: with two sums each, the 16 sums hide each other's latency, and a weight is read once for all of
// them.
enum { TOKENS = 8 };
// Results of more bytes than this are written past the caches, which would first read every line that is overwritten
// and then not hold them until they are read.
enum { CACHED_BYTES = 8 << 20 };
// How many weights a block that fetches itself is ahead.
enum { AHEAD = 4 * 1024 };

int gxr_ready(void) { return 1; }

// y[tokens][32] = x[tokens][k] . w, where w is the blocks of 32 outputs. Meanwhile fetches `lines` cache lines from
// `next` on for each block of inputs.
static inline __attribute__((always_inline)) void block_column(const int tokens, const bf16 *x, int k, const bf16 *w,
                                                               bf16 *y, size_t stride, int streamed, const bf16 *next,
                                                               int lines) {
    __m512 sums[TOKENS][2];
    for (int t = 0; t < tokens; t++) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
    for (int kb = 0; kb < k / 32; kb++, w += 1024) {
        for (int line = 0; line < lines; line++, next += 32) _mm_prefetch((const char *)next, _MM_HINT_T1);
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
    for (int t = 0; t < tokens; t++) {
        __m512i outputs = (__m512i)_mm512_cvtne2ps_pbh(sums[t][1], sums[t][0]);
        if (streamed)
            _mm512_stream_si512((void *)(y + t * stride), outputs);
        else
            _mm512_storeu_si512(y + t * stride, outputs);
    }
}

// The number of tokens must be known at compile time, so that all sums stay in registers.
#define CASE(n)                                                         \
    case n:                                                             \
        block_column(n, x, k, w, y, stride, streamed, next, lines);     \
        break;

static void of_tokens(int tokens, const bf16 *x, int k, const bf16 *w, bf16 *y, size_t stride, int streamed,
                      const bf16 *next, int lines) {
    switch (tokens) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
}

void product(const bf16 *x, int m, int k, const bf16 *w, int n, bf16 *y, size_t stride) {
    int groups = (m + TOKENS - 1) / TOKENS, blocks = n / 32;  // groups of nearly equal size
    int streamed = (size_t)m * n * 2 > CACHED_BYTES && ((uintptr_t)y | stride * 2) % 64 == 0;
#pragma omp parallel
    {
        int threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int begin = (int64_t)blocks * thread / threads, end = (int64_t)blocks * (thread + 1) / threads;
        for (int nb = begin; nb < end; nb++) {
            const bf16 *block = w + (size_t)nb * 32 * k;
            for (int g = 0; g < groups; g++) {
                // The CPU's own prefetching is too cautious for this amount of work. Each group fetches its part of the
                // thread's next block, so that memory is read evenly during the computation.
                int part = 32 * g / groups, lines = nb + 1 < end ? 32 * (g + 1) / groups - part : 0;
                const bf16 *next = block + (32 + part) * (size_t)k;
                if (end - begin == 1 && g == 0) {  // no block before it has fetched this one
                    next = block + AHEAD;
                    lines = 32;
                }
                int row = m * g / groups, tokens = m * (g + 1) / groups - row;
                of_tokens(tokens, x + (size_t)row * k, k, block, y + row * stride + nb * 32, stride, streamed, next,
                          lines);
            }
        }
        if (streamed) _mm_sfence();
    }
}
