/* Signs times digits in vector extensions that every compiler turns into what the machine has. */
#define VECTOR 16
#define ROWS 4

typedef bytes_t NAME(vector);

ALWAYS_INLINE TARGET bytes_t NAME(spread)(bytes_t bytes, int width) {
    typedef uint64_t words_t __attribute__((vector_size(16)));
    words_t words = (words_t)bytes;
    return width == 128 ? bytes : (bytes_t)(words_t){words[0], words[0]};
}

/* signs[k]: 255 for +1 and 0 for -1, of columns 16 k to 16 k + 15 of the tile */
ALWAYS_INLINE TARGET void NAME(expand)(bytes_t bytes, int width, bytes_t *signs) {
    for (int k = 0; k < width / 16; k++) {
        bytes_t bit;
        for (int i = 0; i < 16; i++) bit[i] = (uint8_t)(width == 128 ? 1 << k : 1 << (2 * k + i / 8));
        signs[k] = (bytes_t)((bytes & bit) != 0);
    }
}

ALWAYS_INLINE TARGET __attribute__((vector_size(16))) float NAME(dot)(const bytes_t *signs, const int8_t *at, int width,
                                                                      int digits) {
    typedef int8_t eight_t __attribute__((vector_size(8)));
    typedef int16_t shorts_t __attribute__((vector_size(16)));
    typedef int16_t four_t __attribute__((vector_size(8)));
    typedef int32_t ints_t __attribute__((vector_size(16)));
    typedef float floats_t __attribute__((vector_size(16)));
    ints_t total = {0};
    for (int d = 0; d < digits; d++, at += width) {
        shorts_t sum = {0};
        for (int k = 0; k < width / 16; k++) {
            bytes_t digit;
            memcpy(&digit, at + 16 * k, 16);
            digit &= signs[k];
            eight_t half[2];
            memcpy(half, &digit, 16);
            sum += __builtin_convertvector(half[0], shorts_t) + __builtin_convertvector(half[1], shorts_t);
        }
        four_t half[2];
        memcpy(half, &sum, 16);
        total = total * 256 + __builtin_convertvector(half[0], ints_t) + __builtin_convertvector(half[1], ints_t);
    }
    return __builtin_convertvector(total, floats_t);
}

static const float *NAME(lane_weights)(int width) {
    static const float ones[4] = {1, 1, 1, 1};
    (void)width;
    return ones;
}

#include "direct.h"
#undef VECTOR
