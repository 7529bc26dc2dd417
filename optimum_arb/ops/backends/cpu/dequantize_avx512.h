/* The weight itself, row by row, with AVX-512: the sixteen columns of a bit are negated through a mask of their bits. */

/* Packing tile i of one row: sum[j], the columns of bit j. */
ALWAYS_INLINE TARGET void NAME(tile_values)(const dequantize_problem_t *p, int64_t row, int64_t i,
                                            const float *row_scales, int terms, __m512 *sum) {
    const __m512 minus = _mm512_set1_ps(-0.0f);
    const uint8_t *tile = p->weight + row * p->row_bytes + i * p->planes * p->tile_bytes;
    const int nbytes = i + 1 < p->tiles ? p->tile_bytes : p->last_bytes;
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) sum[j] = _mm512_setzero_ps();
    for (int t = 0; t < terms; t++) {
        const term_t *term = p->terms + t;
        const float *columns = p->columns + (term->variant * p->tiles + i) * TILE_FLOATS;
        const __m512 scale = _mm512_set1_ps(term->factor * row_scales[term->row]);
        bytes_t bytes; /* a product of no planes is +1: all bits set */
        memset(&bytes, 255, sizeof bytes);
        if (term->planes && !(term->planes & (term->planes - 1)))
            bytes = load_plane(tile + __builtin_ctz(term->planes) * nbytes, nbytes);
        else if (term->planes)
            bytes = load_bytes(tile, nbytes, term->planes);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            __mmask16 negative = _mm_testn_epi8_mask((__m128i)bytes, _mm_set1_epi8((char)(1 << j)));
            __m512 column = _mm512_loadu_ps(columns + j * 16);
            column = _mm512_mask_xor_ps(column, negative, column, minus);
            sum[j] = _mm512_fmadd_ps(scale, column, sum[j]);
        }
    }
}

static TARGET void NAME(dequantize_row)(const dequantize_problem_t *p, int64_t row, float *scales) {
    load_floats(p->row_scale, p->row_scale_type, row * p->blocks * p->row_scales, p->blocks * p->row_scales, scales);
    for (int64_t i = 0; i < p->tiles; i++) {
        const float *row_scales = scales + i / p->tiles_per_block * p->row_scales;
        __m512 sum[8];
        NAME(tile_values)(p, row, i, row_scales, p->term_count, sum);
        float *to = p->out + (row * p->tiles + i) * TILE_FLOATS;
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) _mm512_storeu_ps(to + j * 16, sum[j]);
    }
}
