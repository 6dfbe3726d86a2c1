// The decoder of Gemma 3 and Llama models in bfloat16 on CPUs with AVX-512 BF16: attention over a slotted KV cache, and
// the small operations between the matrix products (product_*.c), each fused into one pass.
//
// Every token of a call is computed separately: no sum combines tokens, and the order of every sum is fixed. So a
// token's bits depend only on its own row, whatever the other rows in the call and the number of threads.
//
// Layouts: activations [tokens][features]; the KV cache [slots][kv_heads][capacity][head_dim], column = position. All
// arrays are bfloat16 unless named float.
#include "kernels.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct {
    int hidden, heads, kv_heads, head_dim, inner, layers, vocab;
    int slots, capacity;  // of the KV cache, with the slots of shared prefixes
    int most_tokens;      // in one call
    int gelu;           // 1: tanh GELU, 0: SiLU
    float eps, scale;   // of the norms; of the attention scores
    float embed_scale;  // factor on the embeddings, rounded to bfloat16 as the library does
} Shape;

typedef struct {
    const bf16 *qkv, *out, *gate_up, *down;                             // packed
    const float *before_attn, *after_attn, *before_mlp, *after_mlp;     // norm weights, Gemma's 1 + w already added
    const float *query_norm, *key_norm;                                 // NULL where the family has none
    const float *rope;                                                  // [capacity][head_dim]: cosines, then sines
    bf16 *keys, *values;
    int window;                                                         // below 1: attends everything before it
} Layer;

typedef struct {
    Shape shape;
    const Layer *layers;
    const bf16 *head;          // packed; also the embedding if tied
    const bf16 *embedding;     // [vocab][hidden], NULL if it is the head
    const float *final_norm;
    // Buffers for shape.most_tokens tokens, a multiple of 32.
    bf16 *residual, *normed, *qkv, *mixed, *projected, *gate_up, *inner;
} Model;

static inline __m512 round16(__m512 x) {  // to bfloat16 and back
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

// ---------------------------------------------------------------------------------------------------- numbers

// The most that a size may be. With these, no product of sizes that is computed as an int overflows; config_numbers.py
// refuses models beyond them.
enum { MOST_FEATURES = 1 << 20, MOST_HEADS = 1 << 12, MOST_HEAD_DIM = 1 << 12, MOST_LAYERS = 1 << 12 };
enum { MOST_VOCAB = 1 << 24, MOST_SLOTS = 1 << 20, MOST_CAPACITY = 1 << 24, MOST_TOKENS = 1 << 12 };

static int from_1_to(int most, int size) { return size >= 1 && size <= most; }

static int in_32s(int most, int size) { return from_1_to(most, size) && size % 32 == 0; }

// 1 if the kernels can compute with these sizes, else 0. Everything is read and written in steps of 32 features.
int gxr_sound(const Shape *s) {
    return in_32s(MOST_FEATURES, s->hidden) && in_32s(MOST_FEATURES, s->inner) && in_32s(MOST_HEAD_DIM, s->head_dim) &&
           in_32s(MOST_VOCAB, s->vocab) && from_1_to(MOST_HEADS, s->heads) && from_1_to(s->heads, s->kv_heads) &&
           s->heads % s->kv_heads == 0 && from_1_to(MOST_LAYERS, s->layers) && from_1_to(MOST_SLOTS, s->slots) &&
           from_1_to(MOST_CAPACITY, s->capacity) && in_32s(MOST_TOKENS, s->most_tokens);
}

// Whether every token of a call is one of the vocabulary, in a column of a slot.
static int inside(const Shape *s, int tokens, const int *ids, const int *slot, const int *position) {
    if (!gxr_sound(s) || !from_1_to(s->most_tokens, tokens)) return 0;
    for (int t = 0; t < tokens; t++)
        if (ids[t] < 0 || ids[t] >= s->vocab || slot[t] < 0 || slot[t] >= s->slots || position[t] < 0 ||
            position[t] >= s->capacity)
            return 0;
    return 1;
}

// ---------------------------------------------------------------------------------------------------- memory

// Zeroed memory. Memory that is read from end to end at each step is `streamed`, in huge pages: with pages of 4 KiB,
// half a gigabyte per step takes a tenth longer. A cache is not: its pages are allocated one by one as rows grow, so a
// slot takes only what its row uses.
void *gxr_allocate(size_t bytes, int streamed) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    madvise(p, bytes, streamed ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    return p;
}

void gxr_free(void *p, size_t bytes) { munmap(p, bytes); }

void gxr_threads(int threads) { omp_set_num_threads(threads); }

// ---------------------------------------------------------------------------------------------------- products

// [n][k] row-major -> packed
void gxr_pack(const bf16 *w, bf16 *packed, int n, int k) {
#pragma omp parallel for schedule(static)
    for (int nb = 0; nb < n / 32; nb++)
        for (int kb = 0; kb < k / 32; kb++)
            for (int tile = 0; tile < 2; tile++)
                for (int r = 0; r < 16; r++)
                    for (int c = 0; c < 16; c++) {
                        const bf16 *from = w + (size_t)(nb * 32 + tile * 16 + c) * k + kb * 32 + r * 2;
                        bf16 *to = packed + (((size_t)nb * (k / 32) + kb) * 2 + tile) * 512 + r * 32 + c * 2;
                        to[0] = from[0];
                        to[1] = from[1];
                    }
}

static void unpack_row(const bf16 *packed, int row, int k, bf16 *out) {
    const bf16 *block = packed + (size_t)(row / 32) * (k / 32) * 1024 + (row % 32 / 16) * 512 + row % 16 * 2;
    for (int i = 0; i < k; i += 2) memcpy(out + i, block + (size_t)(i / 32) * 1024 + i % 32 / 2 * 32, 4);
}

// ---------------------------------------------------------------------------------------------------- norms

static inline float inverse_rms(const bf16 *x, int n, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        __m512 v = load16(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / n + eps);
}

static inline void norm(const bf16 *x, const float *w, int n, float eps, bf16 *y) {
    __m512 factor = _mm512_set1_ps(inverse_rms(x, n, eps));
    for (int i = 0; i < n; i += 16)
        store16(y + i, _mm512_mul_ps(_mm512_mul_ps(load16(x + i), factor), _mm512_loadu_ps(w + i)));
}

// residual += x (normed first if `after` is given); normed = norm(residual, before)
static void add_and_norm(const Model *m, int tokens, const bf16 *x, const float *after, const float *before) {
    int n = m->shape.hidden;
    float eps = m->shape.eps;
#pragma omp parallel for schedule(static)
    for (int t = 0; t < tokens; t++) {
        const bf16 *in = x + (size_t)t * n;
        bf16 *sum = m->residual + (size_t)t * n;
        __m512 factor = _mm512_set1_ps(after ? inverse_rms(in, n, eps) : 1.0f);
        for (int i = 0; i < n; i += 16) {
            __m512 v = load16(in + i);
            if (after) v = round16(_mm512_mul_ps(_mm512_mul_ps(v, factor), _mm512_loadu_ps(after + i)));
            store16(sum + i, _mm512_add_ps(load16(sum + i), v));
        }
        norm(sum, before, n, eps, m->normed + (size_t)t * n);
    }
}

// ---------------------------------------------------------------------------------------------------- attention

static inline void norm_and_rotate(bf16 *head, const float *w, const float *rope, int dim, float eps) {
    if (w) norm(head, w, dim, eps, head);
    int half = dim / 2;
    for (int i = 0; i < half; i += 16) {
        __m512 a = load16(head + i), b = load16(head + half + i);
        __m512 cosine = _mm512_loadu_ps(rope + i), sine = _mm512_loadu_ps(rope + half + i);
        store16(head + i, _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine)));
        store16(head + half + i, _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine)));
    }
}

// Norms and rotates queries and keys in place, and writes keys and values into each token's slot and column.
static void place(const Model *m, const Layer *layer, int tokens, const int *slot, const int *position) {
    Shape s = m->shape;
    int width = (s.heads + 2 * s.kv_heads) * s.head_dim;
#pragma omp parallel for schedule(static)
    for (int t = 0; t < tokens; t++) {
        bf16 *row = m->qkv + (size_t)t * width;
        const float *rope = layer->rope + (size_t)position[t] * s.head_dim;
        for (int h = 0; h < s.heads + s.kv_heads; h++)
            norm_and_rotate(row + h * s.head_dim, h < s.heads ? layer->query_norm : layer->key_norm, rope, s.head_dim,
                            s.eps);
        for (int h = 0; h < s.kv_heads; h++) {
            size_t at = (((size_t)slot[t] * s.kv_heads + h) * s.capacity + position[t]) * s.head_dim;
            memcpy(layer->keys + at, row + (s.heads + h) * s.head_dim, s.head_dim * 2);
            memcpy(layer->values + at, row + (s.heads + s.kv_heads + h) * s.head_dim, s.head_dim * 2);
        }
    }
}

static inline __m512 exponential(__m512 x) {  // e^x for x <= 0, relative error below 2e-7
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// The sum of each of 16 vectors, in their order. Each is added up as by _mm512_reduce_add_ps: halves, then halves of
// those.
static inline __m512 sixteen_sums(__m512 v[16]) {
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
    for (int i = 0; i < 4; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0x44),
                             _mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0xee));
    v[0] = _mm512_add_ps(_mm512_shuffle_ps(v[0], v[1], 0x88), _mm512_shuffle_ps(v[0], v[1], 0xdd));
    // Lane l now holds the sums of vectors l, l + 4, l + 8, l + 12.
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v[0]);
}

// Scores of one query head against `count` keys, softmaxed in place, 0 up to the next multiple of 16; returns 1 / sum.
static float weigh(const bf16 *query, const bf16 *keys, int count, int dim, float scale, float *scores) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int j = 0; j < count; j += 16) {
        const bf16 *row[16];
        __m512 sums[16];
        for (int c = 0; c < 16; c++) {
            row[c] = keys + (size_t)(j + c < count ? j + c : count - 1) * dim;
            sums[c] = _mm512_setzero_ps();
        }
        for (int i = 0; i < dim; i += 32) {
            __m512bh part = (__m512bh)_mm512_loadu_si512(query + i);
#pragma GCC unroll 16
            for (int c = 0; c < 16; c++)
                sums[c] = _mm512_dpbf16_ps(sums[c], part, (__m512bh)_mm512_loadu_si512(row[c] + i));
        }
        __m512 found = _mm512_mul_ps(sixteen_sums(sums), _mm512_set1_ps(scale));
        if (j + 16 > count) found = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (1u << (count - j)) - 1, found);
        top = _mm512_max_ps(top, found);
        _mm512_store_ps(scores + j, found);
    }
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < count; j += 16) {
        __m512 e = exponential(_mm512_sub_ps(_mm512_load_ps(scores + j), top));
        if (j + 16 > count) e = _mm512_maskz_mov_ps((1u << (count - j)) - 1, e);
        _mm512_store_ps(scores + j, e);
        sum = _mm512_add_ps(sum, e);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

// Query heads that are computed together.
enum { TOGETHER = 4 };

// out[heads][16 * parts features] = the values, weighted with each head's scores, which are `apart`; the heads share
// each value that is read.
static inline __attribute__((always_inline)) void mix_part(const int heads, const int parts, const float *scores,
                                                           size_t apart, const float *factors, const bf16 *values,
                                                           int count, int dim, bf16 *out) {
    __m512 sums[TOGETHER][4];
    for (int h = 0; h < heads; h++)
        for (int c = 0; c < parts; c++) sums[h][c] = _mm512_setzero_ps();
    for (int j = 0; j < count; j++)
        for (int c = 0; c < parts; c++) {
            __m512 value = load16(values + (size_t)j * dim + c * 16);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++)
                sums[h][c] = _mm512_fmadd_ps(_mm512_set1_ps(scores[h * apart + j]), value, sums[h][c]);
        }
    for (int h = 0; h < heads; h++)
        for (int c = 0; c < parts; c++)
            store16(out + (size_t)h * dim + c * 16, _mm512_mul_ps(sums[h][c], _mm512_set1_ps(factors[h])));
}

_Static_assert(TOGETHER == 4, "mix has a case for each number of heads");

// The numbers of heads and parts must be known at compile time, so that all sums stay in registers.
static void mix(int heads, const float *scores, size_t apart, const float *factors, const bf16 *values, int count,
                int dim, bf16 *out) {
    for (int i = 0; i < dim; i += 64) {
#define MIX(n, parts) mix_part(n, parts, scores, apart, factors, values + i, count, dim, out + i)
        switch (dim - i < 64 ? heads : heads + 4) {
            case 1: MIX(1, 2); break;
            case 2: MIX(2, 2); break;
            case 3: MIX(3, 2); break;
            case 4: MIX(4, 2); break;
            case 5: MIX(1, 4); break;
            case 6: MIX(2, 4); break;
            case 7: MIX(3, 4); break;
            case 8: MIX(4, 4); break;
        }
#undef MIX
    }
}

// Floats of one head's scores: a padded row, in whole cache lines.
static size_t scores_of(const Shape *s) { return ((size_t)s->capacity + 64) / 16 * 16; }

static void attend(const Model *m, const Layer *layer, int tokens, const int *slot, const int *position,
                   float *scratch) {
    Shape s = m->shape;
    int width = (s.heads + 2 * s.kv_heads) * s.head_dim, group = s.heads / s.kv_heads;
    size_t apart = scores_of(&s);
#pragma omp parallel
    {
        float *scores = scratch + omp_get_thread_num() * apart * TOGETHER, factors[TOGETHER];
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < tokens * s.kv_heads; task++) {
            int t = task / s.kv_heads, h = task % s.kv_heads;
            int first = layer->window > 0 && position[t] >= layer->window ? position[t] - layer->window + 1 : 0;
            int count = position[t] + 1 - first;
            size_t at = (((size_t)slot[t] * s.kv_heads + h) * s.capacity + first) * s.head_dim;
            for (int g = 0; g < group; g += TOGETHER) {
                int head = h * group + g, heads = group - g < TOGETHER ? group - g : TOGETHER;
                const bf16 *query = m->qkv + (size_t)t * width + head * s.head_dim;
                for (int i = 0; i < heads; i++)
                    factors[i] = weigh(query + i * s.head_dim, layer->keys + at, count, s.head_dim, s.scale,
                                       scores + i * apart);
                mix(heads, scores, apart, factors, layer->values + at, count, s.head_dim,
                    m->mixed + ((size_t)t * s.heads + head) * s.head_dim);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------- feed-forward

static inline __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f), e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
    __m512 small = _mm512_div_ps(e, _mm512_add_ps(one, e));  // sigmoid(-|x|)
    __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
    return _mm512_mask_sub_ps(small, positive, one, small);
}

static void activate(const Model *m, int tokens) {
    int n = m->shape.inner, gelu = m->shape.gelu;
#pragma omp parallel for schedule(static)
    for (int t = 0; t < tokens; t++) {
        const bf16 *gate = m->gate_up + (size_t)t * 2 * n, *up_ = gate + n;
        for (int i = 0; i < n; i += 16) {
            __m512 g = load16(gate + i), z = g;
            if (gelu) {  // 0.5 g (1 + tanh(u)) = g sigmoid(2u)
                __m512 cube = _mm512_mul_ps(_mm512_mul_ps(g, g), g);
                z = _mm512_mul_ps(_mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), g), _mm512_set1_ps(1.59576912f));
            }
            store16(m->inner + (size_t)t * n + i, _mm512_mul_ps(round16(_mm512_mul_ps(g, sigmoid(z))), load16(up_ + i)));
        }
    }
}

// ---------------------------------------------------------------------------------------------------- the model

static void embed(const Model *m, int tokens, const int *ids) {
    int n = m->shape.hidden;
    __m512 scale = _mm512_set1_ps(m->shape.embed_scale);
#pragma omp parallel for schedule(static)
    for (int t = 0; t < tokens; t++) {
        bf16 *row = m->residual + (size_t)t * n;
        if (m->embedding)
            memcpy(row, m->embedding + (size_t)ids[t] * n, n * 2);
        else
            unpack_row(m->head, ids[t], n, row);
        for (int i = 0; i < n; i += 16) store16(row + i, _mm512_mul_ps(load16(row + i), scale));
        norm(row, m->layers[0].before_attn, n, m->shape.eps, m->normed + (size_t)t * n);
    }
}

// Runs `tokens` tokens (at most as many as the buffers hold) through all layers: each at its position of its slot,
// whose cache it extends. Tokens of one slot are in ascending order of position. Leaves the final norm's output in
// `normed`. Returns 0, or before it touches anything BAD_NUMBER or NO_MEMORY.
int gxr_forward(const Model *m, int tokens, const int *ids, const int *slot, const int *position) {
    Shape s = m->shape;
    if (!inside(&s, tokens, ids, slot, position)) return BAD_NUMBER;
    float *scores = aligned_alloc(64, omp_get_max_threads() * scores_of(&s) * TOGETHER * sizeof(float));
    if (!scores) return NO_MEMORY;
    int q = s.heads * s.head_dim, width = q + 2 * s.kv_heads * s.head_dim;
    embed(m, tokens, ids);
    for (int l = 0; l < s.layers; l++) {
        const Layer *layer = m->layers + l;
        product(m->normed, tokens, s.hidden, layer->qkv, width, m->qkv, width);
        place(m, layer, tokens, slot, position);
        attend(m, layer, tokens, slot, position, scores);
        product(m->mixed, tokens, q, layer->out, s.hidden, m->projected, s.hidden);
        add_and_norm(m, tokens, m->projected, layer->after_attn, layer->before_mlp);
        product(m->normed, tokens, s.hidden, layer->gate_up, 2 * s.inner, m->gate_up, 2 * s.inner);
        activate(m, tokens);
        product(m->inner, tokens, s.inner, layer->down, s.hidden, m->projected, s.hidden);
        add_and_norm(m, tokens, m->projected, layer->after_mlp,
                     l + 1 < s.layers ? m->layers[l + 1].before_attn : m->final_norm);
    }
    free(scores);
    return 0;
}

// logits[i][vocab] of the tokens `which` of the last gxr_forward; `gathered` holds `count` padded rows. Returns 0 or
// BAD_NUMBER.
int gxr_logits(const Model *m, int count, const int *which, bf16 *gathered, bf16 *logits, size_t stride) {
    int n = m->shape.hidden, most = m->shape.most_tokens;
    if (!gxr_sound(&m->shape) || !from_1_to(most, count) || stride < (size_t)m->shape.vocab) return BAD_NUMBER;
    for (int i = 0; i < count; i++)
        if (which[i] < 0 || which[i] >= most) return BAD_NUMBER;
    for (int i = 0; i < count; i++) memcpy(gathered + (size_t)i * n, m->normed + (size_t)which[i] * n, n * 2);
    product(gathered, count, n, m->head, m->shape.vocab, logits, stride);
    return 0;
}
