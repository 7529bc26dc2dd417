/* Signs times digits with NEON, and with its byte products where WITH_DOTPROD is defined. */
#include <arm_neon.h>

#define VECTOR 16
#define ROWS 4

typedef uint8x16_t NAME(vector);

ALWAYS_INLINE TARGET uint8x16_t NAME(spread)(bytes_t bytes, int width) {
    uint8x16_t all = (uint8x16_t)bytes;
    return width == 128 ? all : vcombine_u8(vget_low_u8(all), vget_low_u8(all));
}

/* signs[k]: 255 for +1 and 0 for -1, of columns 16 k to 16 k + 15 of the tile */
ALWAYS_INLINE TARGET void NAME(expand)(uint8x16_t bytes, int width, uint8x16_t *signs) {
    for (int k = 0; k < width / 16; k++) {
        uint8x16_t bit = width == 128 ? vdupq_n_u8((uint8_t)(1 << k))
                                      : vcombine_u8(vdup_n_u8((uint8_t)(1 << 2 * k)), vdup_n_u8((uint8_t)(2 << 2 * k)));
        signs[k] = vtstq_u8(bytes, bit);
    }
}

ALWAYS_INLINE TARGET __attribute__((vector_size(16))) float NAME(dot)(const uint8x16_t *signs, const int8_t *at,
                                                                      int width, int digits) {
    int32x4_t total = vdupq_n_s32(0);
    for (int d = 0; d < digits; d++, at += width) {
        if (d) total = vshlq_n_s32(total, 8);
#ifdef WITH_DOTPROD
        for (int k = 0; k < width / 16; k++)
            total = vdotq_s32(total, vreinterpretq_s8_u8(signs[k]), vld1q_s8(at + 16 * k));
#else
        int16x8_t sum = vdupq_n_s16(0);
        for (int k = 0; k < width / 16; k++)
            sum = vpadalq_s8(sum, vandq_s8(vreinterpretq_s8_u8(signs[k]), vld1q_s8(at + 16 * k)));
        total = vpadalq_s16(total, sum);
#endif
    }
    return (__attribute__((vector_size(16))) float)vcvtq_f32_s32(total);
}

static const float *NAME(lane_weights)(int width) {
#ifdef WITH_DOTPROD
    static const float weights[4] = {-1, -1, -1, -1}; /* 255 is -1 to the signed product */
#else
    static const float weights[4] = {1, 1, 1, 1};
#endif
    (void)width;
    return weights;
}

#include "direct.h"
#undef VECTOR
