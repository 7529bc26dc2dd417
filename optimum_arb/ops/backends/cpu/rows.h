/* Included by native.c once per instruction set. NAME(f) is f's name for it, TARGET its attribute, WIDTH the floats of
   one of its registers; MASKED_ADD is defined where sums go through AVX-512 masks. */

#define INLINE static inline __attribute__((always_inline)) TARGET
#define PARTS (LANES / WIDTH)

typedef float NAME(floats) __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t NAME(bits) __attribute__((vector_size(4 * WIDTH)));
typedef uint8_t NAME(narrow) __attribute__((vector_size(WIDTH)));

INLINE NAME(floats) NAME(load)(const float *from) {
    NAME(floats) value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* The sixteen bytes of a term's sign in one tile: the xor of its planes; bytes past the tile's own are 0. Whole tiles
   do not pass through memory: a wide load after narrow stores would stall. */
INLINE bytes_t NAME(load_bytes)(const uint8_t *tile, int nbytes, int32_t planes) {
    bytes_t bytes = {0};
    for (int plane = 0; plane < MAX_PLANES; plane++) {
        bytes_t part = {0};
        if (!(planes >> plane & 1)) continue;
        if (nbytes == 16) {
            memcpy(&part, tile + plane * 16, 16);
        } else if (nbytes == 8) {
            uint64_t low;
            memcpy(&low, tile + plane * 8, 8);
            part = (bytes_t)(words_t){low, 0};
        } else {
            memcpy(&part, tile + plane * nbytes, nbytes);
        }
        bytes ^= part;
    }
    return bytes;
}

/* WIDTH of the bytes, from part * WIDTH on, each in 32 bits and inverted: 1 = -1. */
INLINE NAME(bits) NAME(negative)(const bytes_t *bytes, int part) {
    NAME(narrow) narrow;
    memcpy(&narrow, (const uint8_t *)bytes + part * WIDTH, WIDTH);
    return ~__builtin_convertvector(narrow, NAME(bits));
}

/* The columns of bit j with their signs. */
INLINE NAME(floats) NAME(flip)(NAME(floats) value, NAME(bits) negative, int j) {
    return (NAME(floats))((NAME(bits))value ^ (negative << (31 - j) & 0x80000000u));
}

/* part[m] += signs . columns over one tile, for `count` rows of x, lanes left apart. */
INLINE void NAME(add_tile)(const uint8_t *tile, int nbytes, int32_t planes, const float *columns, const float *sums,
                           int64_t stride, int64_t sums_stride, int count, NAME(floats) *part) {
    if (!planes) {
        for (int m = 0; m < count; m++)
            for (int i = 0; i < PARTS; i++) part[m] += NAME(load)(sums + m * sums_stride + i * WIDTH);
        return;
    }
    bytes_t bytes = NAME(load_bytes)(tile, nbytes, planes);
    NAME(floats) sum[ROWS_OF_X]; /* of this tile, so that the chains of additions of several tiles overlap */
    for (int m = 0; m < count; m++) sum[m] = (NAME(floats)){0};
#ifdef MASKED_ADD
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        __mmask16 mask = _mm_test_epi8_mask((__m128i)bytes, _mm_set1_epi8((char)(1 << j)));
        for (int m = 0; m < count; m++)
            sum[m] = _mm512_mask_add_ps(sum[m], mask, sum[m], _mm512_loadu_ps(columns + m * stride + j * LANES));
    }
    /* the columns of sign +1 counted twice, less all columns */
    for (int m = 0; m < count; m++) part[m] += 2 * sum[m] - NAME(load)(sums + m * sums_stride);
#else
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) {
        NAME(bits) negative = NAME(negative)(&bytes, i);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            for (int m = 0; m < count; m++)
                sum[m] += NAME(flip)(NAME(load)(columns + m * stride + j * LANES + i * WIDTH), negative, j);
    }
    for (int m = 0; m < count; m++) part[m] += sum[m];
#endif
}

/* One row of the weight with `count` rows of x. */
INLINE void NAME(linear_rows)(const problem_t *p, int64_t row, int64_t first, int count, const float *scales) {
    const int64_t variant_sums = p->tiles * LANES, variant_floats = p->tiles * TILE_FLOATS;
    const int64_t stride = p->variants * variant_floats, sums_stride = p->variants * variant_sums;
    NAME(floats) total[ROWS_OF_X], part[ROWS_OF_X];
    for (int m = 0; m < count; m++) total[m] = (NAME(floats)){0};
    for (int64_t block = 0; block < p->blocks; block++) {
        int64_t start = block * p->tiles_per_block, stop = start + p->tiles_per_block;
        if (stop > p->tiles) stop = p->tiles;
        for (int t = 0; t < p->term_count; t++) {
            const term_t *term = p->terms + t;
            const float *columns = p->columns + first * stride + term->variant * variant_floats;
            const float *sums = p->sums + first * sums_stride + term->variant * variant_sums;
            for (int m = 0; m < count; m++) part[m] = (NAME(floats)){0};
            for (int64_t i = start; i < stop; i++) {
                const uint8_t *tile = p->weight + row * p->row_bytes + i * p->planes * p->tile_bytes;
                int nbytes = i + 1 < p->tiles ? p->tile_bytes : p->last_bytes;
                NAME(add_tile)(tile, nbytes, term->planes, columns + i * TILE_FLOATS, sums + i * LANES, stride,
                               sums_stride, count, part);
            }
            float scale = term->factor * scales[block * p->row_scales + term->row];
            for (int m = 0; m < count; m++) total[m] += scale * part[m];
        }
    }
    for (int m = 0; m < count; m++) {
        float sum = 0;
        for (int lane = 0; lane < WIDTH; lane++) sum += total[m][lane];
        p->out[(first + m) * p->out_stride + row] = sum;
    }
}

static TARGET void NAME(linear_row)(const problem_t *p, int64_t row, float *scales) {
    int64_t m = 0;
    load_scales(p, row, scales);
    for (; m + ROWS_OF_X <= p->m; m += ROWS_OF_X) NAME(linear_rows)(p, row, m, ROWS_OF_X, scales);
    for (; m < p->m; m++) NAME(linear_rows)(p, row, m, 1, scales);
}

static TARGET void NAME(dequantize_row)(const problem_t *p, int64_t row, float *scales) {
    load_scales(p, row, scales);
    for (int64_t i = 0; i < p->tiles; i++) {
        const uint8_t *tile = p->weight + row * p->row_bytes + i * p->planes * p->tile_bytes;
        int nbytes = i + 1 < p->tiles ? p->tile_bytes : p->last_bytes;
        const float *row_scales = scales + i / p->tiles_per_block * p->row_scales;
        float *out = p->out + (row * p->tiles + i) * TILE_FLOATS;
        for (int t = 0; t < p->term_count; t++) {
            const term_t *term = p->terms + t;
            const float *columns = p->columns + (term->variant * p->tiles + i) * TILE_FLOATS;
            bytes_t bytes; /* a product of no planes is +1: all bits set */
            memset(&bytes, 255, sizeof bytes);
            if (term->planes) bytes = NAME(load_bytes)(tile, nbytes, term->planes);
            float scale = term->factor * row_scales[term->row];
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++) {
                NAME(bits) negative = NAME(negative)(&bytes, part);
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++) {
                    float *to = out + j * LANES + part * WIDTH;
                    NAME(floats) value = scale * NAME(flip)(NAME(load)(columns + (to - out)), negative, j);
                    if (t) value += NAME(load)(to);
                    memcpy(to, &value, sizeof value);
                }
            }
        }
    }
}

#undef INLINE
#undef PARTS
