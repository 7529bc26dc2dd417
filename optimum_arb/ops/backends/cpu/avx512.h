/* Signs times digits with AVX-512 and its byte products (VNNI). In a tile of 128 columns a sign is the
   bit where it stands in its half of a byte, 1, 2, 4 or 8: one operation less than a 1, and the lanes' weights take it
   back. */
#define VECTOR 64
#define ROWS 8

typedef __m512i NAME(vector);

ALWAYS_INLINE TARGET __m512i NAME(spread)(bytes_t bytes, int width) {
    return width == 128 ? _mm512_broadcast_i32x4((__m128i)bytes) : _mm512_broadcastq_epi64((__m128i)bytes);
}

/* signs[k]: columns 64 k to 64 k + 63 of the tile */
ALWAYS_INLINE TARGET void NAME(expand)(__m512i bytes, int width, __m512i *signs) {
    const int64_t ones = 0x0101010101010101ll;
    if (width == 128) {
        const __m512i bit = _mm512_set_epi64(8 * ones, 8 * ones, 4 * ones, 4 * ones, 2 * ones, 2 * ones, ones, ones);
        signs[0] = _mm512_and_si512(bytes, bit);
        signs[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), bit);
    } else {
        /* at three digits the sums of bits up to 128 would leave 32 bits */
        signs[0] = _mm512_min_epu8(
            _mm512_and_si512(bytes, _mm512_set_epi64((int64_t)(128 * (uint64_t)ones), 64 * ones, 32 * ones, 16 * ones,
                                                     8 * ones, 4 * ones, 2 * ones, ones)),
            _mm512_set1_epi8(1));
    }
}

ALWAYS_INLINE TARGET __attribute__((vector_size(64))) float NAME(dot)(const __m512i *signs, const int8_t *at, int width,
                                                                      int digits) {
    __m512i total = _mm512_setzero_si512();
    for (int d = 0; d < digits; d++, at += width) {
        if (d) total = _mm512_slli_epi32(total, 8);
        for (int k = 0; k < width / 64; k++)
            total = _mm512_dpbusd_epi32(total, signs[k], _mm512_loadu_si512(at + 64 * k));
    }
    return _mm512_cvtepi32_ps(total);
}

static const float *NAME(lane_weights)(int width) {
    static const float weights[2][16] = {
        {1, 1, 1, 1, 0.5f, 0.5f, 0.5f, 0.5f, 0.25f, 0.25f, 0.25f, 0.25f, 0.125f, 0.125f, 0.125f, 0.125f},
        {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    };
    return weights[width == 64];
}

#define OWN_LOAD_PART
ALWAYS_INLINE TARGET __m512 NAME(load_part)(const float *from, int64_t count) {
    return _mm512_maskz_loadu_ps((__mmask16)(count >= 16 ? 0xffff : (1 << count) - 1), from);
}

/* The additions of `sum_lanes` in the same order, four rows at once. */
#define OWN_SUM_ROWS
ALWAYS_INLINE TARGET void NAME(sum_rows)(const __m512 *all, float *totals) {
    for (int r = 0; r < ROWS; r += 4) {
        const __m512 low = _mm512_unpacklo_ps(all[r], all[r + 1]), high = _mm512_unpackhi_ps(all[r], all[r + 1]);
        const __m512 low2 = _mm512_unpacklo_ps(all[r + 2], all[r + 3]), high2 = _mm512_unpackhi_ps(all[r + 2], all[r + 3]);
        const __m512 first = _mm512_add_ps(_mm512_shuffle_ps(low, low2, 0x44), _mm512_shuffle_ps(low, low2, 0xee));
        const __m512 second = _mm512_add_ps(_mm512_shuffle_ps(high, high2, 0x44), _mm512_shuffle_ps(high, high2, 0xee));
        const __m512 quarter = _mm512_add_ps(first, second);
        __m128 total = _mm_add_ps(_mm_setzero_ps(), _mm512_extractf32x4_ps(quarter, 0));
        total = _mm_add_ps(total, _mm512_extractf32x4_ps(quarter, 1));
        total = _mm_add_ps(total, _mm512_extractf32x4_ps(quarter, 2));
        _mm_storeu_ps(totals + r, _mm_add_ps(total, _mm512_extractf32x4_ps(quarter, 3)));
    }
}

#include "direct.h"
#undef VECTOR
