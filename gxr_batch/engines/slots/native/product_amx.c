// The matrix product with the CPU's tile registers (AMX): two tiles of rows times two of outputs at a time.
#include "kernels.h"

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

int gxr_ready(void) {
    // Linux grants access to the tile registers on request (ARCH_REQ_XCOMP_PERM, feature 18); 0 means granted.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

struct tile_config {
    uint8_t palette, start, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

// A constant in memory: GCC 12 reports only the first 8 bytes of a configuration to its optimiser, and may drop the
// stores that fill the rest of a local one.
static const struct tile_config EIGHT_FULL_TILES = {
    .palette = 1,
    .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

static void tiles_on(void) { _tile_loadconfig(&EIGHT_FULL_TILES); }

// Tiles 0 and 1 (of rows 0 to 15), 2 and 3 (of rows 16 to 31) = a[rows][k] . w, where w is the blocks of 32 outputs.
// Meanwhile fetches weights ahead. `both`: there are more than 16 rows.
static inline __attribute__((always_inline)) void block_column(const int both, const bf16 *a, int k, const bf16 *w,
                                                               struct fetch ahead) {
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int kb = 0; kb < k / 32; kb++, a += 32, w += 1024) {
        fetch_lines(&ahead);
        _tile_loadd(6, w, 64);
        _tile_loadd(4, a, k * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, a + 16 * (size_t)k, k * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

// Rows of 32 outputs, of which two tiles hold 16 each.
static inline void put(const float *left, const float *right, int rows, bf16 *y, size_t stride, int streamed) {
    for (int r = 0; r < rows; r++)
        store32(y + r * stride, _mm512_load_ps(left + r * 16), _mm512_load_ps(right + r * 16), streamed);
}

void product(const bf16 *x, int m, int k, const bf16 *w, int n, bf16 *y, size_t stride) {
    int groups = (m + 31) / 32, blocks = n / 32, streamed = past_caches(y, m, n, stride);
#pragma omp parallel
    {
        int threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int begin = (int64_t)blocks * thread / threads, end = (int64_t)blocks * (thread + 1) / threads;
        float left[256] __attribute__((aligned(64))), right[256] __attribute__((aligned(64)));
        tiles_on();
        for (int nb = begin; nb < end; nb++) {
            const bf16 *block = w + (size_t)nb * 32 * k;
            for (int g = 0; g < groups; g++) {
                const bf16 *a = x + (size_t)g * 32 * k;
                bf16 *out = y + (size_t)g * 32 * stride + nb * 32;
                int rows = m - g * 32;
                struct fetch ahead = {0};  // one group reads every weight once and in order, which the CPU foresees
                if (groups > 1) ahead = weights_ahead(block, k, g, groups, nb == begin, nb + 1 == end);
                if (rows > 16)
                    block_column(1, a, k, block, ahead);
                else
                    block_column(0, a, k, block, ahead);
                _tile_stored(0, left, 64);
                _tile_stored(1, right, 64);
                put(left, right, rows < 16 ? rows : 16, out, stride, streamed);
                if (rows > 16) {
                    _tile_stored(2, left, 64);
                    _tile_stored(3, right, 64);
                    put(left, right, rows < 32 ? rows - 16 : 16, out + 16 * stride, stride, streamed);
                }
            }
        }
        _tile_release();
        if (streamed) _mm_sfence();
    }
}
