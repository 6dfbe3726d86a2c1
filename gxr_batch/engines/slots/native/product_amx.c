// The matrix product with the CPU's tile registers (AMX): two tiles of rows times two of outputs at a time.
#include "kernels.h"

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

static inline void put(const float *tile, bf16 *y, size_t stride, int rows) {
    for (int r = 0; r < rows; r++) store16(y + r * stride, _mm512_load_ps(tile + r * 16));
}

void product(const bf16 *x, int m, int k, const bf16 *w, int n, bf16 *y, size_t stride) {
#pragma omp parallel
    {
        tiles_on();
        float scratch[256] __attribute__((aligned(64)));
#pragma omp for schedule(static)
        for (int nb = 0; nb < n / 32; nb++) {
            const bf16 *block = w + (size_t)nb * (k / 32) * 1024;
            bf16 *column = y + nb * 32;
            for (int row = 0; row < m; row += 32) {
                const bf16 *a = x + (size_t)row * k;
                _tile_zero(0);
                _tile_zero(1);
                if (m - row > 16) {
                    _tile_zero(2);
                    _tile_zero(3);
                    for (int kb = 0; kb < k / 32; kb++) {
                        _tile_loadd(6, block + kb * 1024, 64);
                        _tile_loadd(4, a + kb * 32, k * 2);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(7, block + kb * 1024 + 512, 64);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_loadd(5, a + 16 * (size_t)k + kb * 32, k * 2);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                } else {
                    for (int kb = 0; kb < k / 32; kb++) {
                        _tile_loadd(4, a + kb * 32, k * 2);
                        _tile_loadd(6, block + kb * 1024, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(7, block + kb * 1024 + 512, 64);
                        _tile_dpbf16ps(1, 4, 7);
                    }
                }
                int first = m - row < 16 ? m - row : 16, second = m - row > 32 ? 16 : m - row - 16;
                bf16 *out = column + row * stride;
                _tile_stored(0, scratch, 64);
                put(scratch, out, stride, first);
                _tile_stored(1, scratch, 64);
                put(scratch, out + 16, stride, first);
                if (second > 0) {
                    _tile_stored(2, scratch, 64);
                    put(scratch, out + 16 * stride, stride, second);
                    _tile_stored(3, scratch, 64);
                    put(scratch, out + 16 * stride + 16, stride, second);
                }
            }
        }
        _tile_release();
    }
}
