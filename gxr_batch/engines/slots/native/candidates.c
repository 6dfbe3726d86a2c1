// Finds what top-k sampling may keep of each row of logits, in two scans instead of a sort.
#include "kernels.h"

#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

static inline float up(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static int rising(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

static float kth_largest(float *values, int n, int k) {  // reorders values
    qsort(values, n, sizeof(float), rising);
    return values[n - k];
}

enum { BLOCK = 512, NOT_FINITE = -1, TOO_MANY = -2 };

// One row of gxr_candidates. Scratch: `tops` and `sorted` of one float per block, `saved` of one value per seen id.
static int candidates_of(bf16 *logits, int vocab, int k, const int *seen, int seen_count, float penalty, int most,
                         float *values, int *ids, float *tops, float *sorted, bf16 *saved) {
    int blocks = vocab / BLOCK, found = 0;
    __mmask16 odd = 0;
    for (int i = 0; i < seen_count; i++) {  // seen ids are listed first, with their penalised value
        float v = up(saved[i] = logits[seen[i]]);
        odd |= isnan(v) || v == INFINITY;
        if (found < most && v != -INFINITY) {
            values[found] = v > 0 ? v / penalty : v * penalty;
            ids[found++] = seen[i];
        }
        logits[seen[i]] = 0xff80;  // -infinity, so that the scan skips it
    }
    for (int b = 0; b < blocks; b++) {
        __m512 top = _mm512_set1_ps(-INFINITY);
        for (int i = 0; i < BLOCK; i += 16) {
            __m512 v = load16(logits + b * BLOCK + i);
            odd |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
            top = _mm512_max_ps(top, v);
        }
        tops[b] = _mm512_reduce_max_ps(top);
        odd |= tops[b] == INFINITY;
    }
    memcpy(sorted, tops, blocks * sizeof(float));
    // At least k tokens reach the k-th best block maximum, so anything below it is not a candidate.
    float floor = blocks > k ? kth_largest(sorted, blocks, k) : -FLT_MAX;
    __m512 floors = _mm512_set1_ps(fmaxf(floor, -FLT_MAX));
    int overflow = seen_count > most;
    for (int b = 0; b < blocks && !odd && !overflow; b++) {
        if (tops[b] < floor) continue;
        for (int i = b * BLOCK; i < (b + 1) * BLOCK; i += 16) {
            uint32_t hits = _mm512_cmp_ps_mask(load16(logits + i), floors, _CMP_GE_OQ);
            for (; hits && !overflow; hits &= hits - 1) {
                int id = i + __builtin_ctz(hits);
                if ((overflow = found == most)) break;
                values[found] = up(logits[id]);
                ids[found++] = id;
            }
        }
    }
    for (int i = 0; i < seen_count; i++) logits[seen[i]] = saved[i];
    return odd ? NOT_FINITE : overflow ? TOO_MANY : found;
}

// Sets the logits of each row to -infinity whose bit is 0: id i is bit i % 32 of allowed[row][i / 32]. Returns 0, or
// BAD_NUMBER before it touches anything.
int gxr_forbid(bf16 *logits, size_t stride, int rows, int vocab, const uint32_t *allowed, int words) {
    if (rows < 1 || vocab < 1 || stride < (size_t)vocab || words != (vocab + 31) / 32) return BAD_NUMBER;
#pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r++) {
        const uint32_t *own = allowed + (size_t)r * words;
        for (int w = 0; w < words; w++) {
            if (own[w] == UINT32_MAX) continue;
            bf16 *here = logits + r * stride + w * 32;
            int count = vocab - w * 32 < 32 ? vocab - w * 32 : 32;
            for (int i = 0; i < count; i++)
                if (!(own[w] >> i & 1)) here[i] = 0xff80;
        }
    }
    return 0;
}

// For each row: everything that top-k may keep, seen ids penalised, in values[row][most] and ids[row][most];
// counts[row] is their number, NOT_FINITE if a logit is NaN or infinite, TOO_MANY if there are more than `most`.
// vocab is a multiple of 512, with -infinity beyond the real vocabulary; seen ids are unique. Returns 0, or before it
// touches anything BAD_NUMBER or NO_MEMORY.
int gxr_candidates(bf16 *logits, size_t stride, int rows, int vocab, int k, const int *seen, const int *seen_counts,
                   int seen_stride, float penalty, int most, float *values, int *ids, int *counts) {
    if (rows < 1 || vocab < BLOCK || vocab % BLOCK || stride < (size_t)vocab || k < 1 || most < 1 || seen_stride < 0)
        return BAD_NUMBER;
    for (int r = 0; r < rows; r++) {
        if (seen_counts[r] < 0 || seen_counts[r] > seen_stride) return BAD_NUMBER;
        for (int i = 0; i < seen_counts[r]; i++) {
            int id = seen[(size_t)r * seen_stride + i];
            if (id < 0 || id >= vocab) return BAD_NUMBER;
        }
    }
    size_t blocks = vocab / BLOCK, threads = omp_get_max_threads();
    float *all_tops = malloc(threads * 2 * blocks * sizeof(float));
    bf16 *all_saved = malloc(threads * ((size_t)seen_stride + 1) * sizeof(bf16));
    if (all_tops && all_saved) {
#pragma omp parallel
        {
            size_t thread = omp_get_thread_num();
            float *tops = all_tops + thread * 2 * blocks;
            bf16 *saved = all_saved + thread * ((size_t)seen_stride + 1);
#pragma omp for schedule(dynamic, 1)
            for (int r = 0; r < rows; r++)
                counts[r] = candidates_of(logits + r * stride, vocab, k, seen + (size_t)r * seen_stride, seen_counts[r],
                                          penalty, most, values + (size_t)r * most, ids + (size_t)r * most, tops,
                                          tops + blocks, saved);
        }
    }
    int status = all_tops && all_saved ? 0 : NO_MEMORY;
    free(all_tops);
    free(all_saved);
    return status;
}
