/* Signs times digits with AVX2, and with the byte products of AVX-VNNI where WITH_VNNI is defined. */
#define VECTOR 32
#define ROWS 4

typedef __m256i NAME(vector);

ALWAYS_INLINE TARGET __m256i NAME(spread)(bytes_t bytes, int width) {
    return width == 128 ? _mm256_broadcastsi128_si256((__m128i)bytes) : _mm256_broadcastq_epi64((__m128i)bytes);
}

/* signs[k]: 1 for +1 and 0 for -1, of columns 32 k to 32 k + 31 of the tile */
ALWAYS_INLINE TARGET void NAME(expand)(__m256i bytes, int width, __m256i *signs) {
    const __m256i one = _mm256_set1_epi8(1);
    const uint64_t ones = 0x0101010101010101ull;
    for (int k = 0; k < width / 32; k++) {
        __m256i bit;
        if (width == 128)
            bit = _mm256_set_m128i(_mm_set1_epi8((char)(2 << 2 * k)), _mm_set1_epi8((char)(1 << 2 * k)));
        else
            bit = _mm256_set_epi64x((int64_t)(ones * 8 << 4 * k), (int64_t)(ones * 4 << 4 * k),
                                    (int64_t)(ones * 2 << 4 * k), (int64_t)(ones << 4 * k));
        signs[k] = _mm256_min_epu8(_mm256_and_si256(bytes, bit), one);
    }
}

ALWAYS_INLINE TARGET __attribute__((vector_size(32))) float NAME(dot)(const __m256i *signs, const int8_t *at, int width,
                                                                      int digits) {
    __m256i total = _mm256_setzero_si256();
    for (int d = 0; d < digits; d++, at += width) {
        if (d) total = _mm256_slli_epi32(total, 8);
#ifdef WITH_VNNI
        for (int k = 0; k < width / 32; k++)
            total = _mm256_dpbusd_avx_epi32(total, signs[k], _mm256_loadu_si256((const __m256i *)(at + 32 * k)));
#else
        __m256i sum = _mm256_setzero_si256();
        for (int k = 0; k < width / 32; k++)
            sum = _mm256_add_epi16(
                sum, _mm256_maddubs_epi16(signs[k], _mm256_loadu_si256((const __m256i *)(at + 32 * k))));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
#endif
    }
    return _mm256_cvtepi32_ps(total);
}

static const float *NAME(lane_weights)(int width) {
    static const float ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    (void)width;
    return ones;
}

#include "direct.h"
#undef VECTOR
