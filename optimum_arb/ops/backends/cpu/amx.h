/* Signs times digits on the matrix unit of recent Intel processors (AMX): 16 rows of the weight x 64 columns, as bytes
   +1 and -1, times 64 columns x 16 columns of a tile made of x. One such tile of x holds every variant and digit of
   several tokens beside each other, so that one token costs as much as several and all terms with the same planes are
   one product. The sums of one packing tile are exact integers; scales multiply them afterwards.

   A panel of 32 rows is expanded to bytes a few packing tiles at a time, which stay in the first-level cache while all
   tokens pass by. */

#define AMX_TARGET \
    __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,gfni,avx2,fma,f16c")))

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config_t;

/* Signs of 64 columns as bytes: bit j of each byte to +1 or -1, where j differs from lane to lane. */
ALWAYS_INLINE AMX_TARGET __m512i amx_signs(__m512i bytes, __m512i matrix) {
    /* each of the bits 1 to 7 is the complement of the sign's bit, bit 0 is one */
    return _mm512_gf2p8affine_epi64_epi8(bytes, matrix, 0xff);
}

/* The matrix of the Galois field instruction that takes bit j: its byte 7 - i gives bit i of the result. */
ALWAYS_INLINE int64_t amx_matrix(int j) { return (int64_t)(0x0001010101010101ull << j); }

/* Packing tiles `from` to `to` of one row, 64 bytes apart 2 * 1024 (tile of A after tile of A). */
ALWAYS_INLINE AMX_TARGET void amx_expand_row(const problem_t *p, int64_t row, const uint8_t *own, int32_t planes,
                                             int64_t from, int64_t to, int8_t *out) {
    const __m512i low = _mm512_set_epi64(amx_matrix(3), amx_matrix(3), amx_matrix(2), amx_matrix(2), amx_matrix(1),
                                         amx_matrix(1), amx_matrix(0), amx_matrix(0));
    const __m512i high = _mm512_slli_epi64(low, 4);
    const __m512i narrow = _mm512_set_epi64(amx_matrix(7), amx_matrix(6), amx_matrix(5), amx_matrix(4), amx_matrix(3),
                                            amx_matrix(2), amx_matrix(1), amx_matrix(0));
    const int width = p->width;
    const int64_t whole = p->tiles - (p->last_bytes < width / 8);
    /* the same columns of the next panel: the processor does not foresee 32 rows (a quarter of the time at one token) */
    const uint8_t *next = p->weight + row * p->row_bytes + PANEL * p->row_bytes + from * p->planes * (width / 8);
    for (int64_t ahead = 0; ahead < (to - from) * p->planes * (width / 8); ahead += 64)
        __builtin_prefetch(next + ahead, 0, 2);
    if (width == 128 && to <= whole && !(planes & (planes - 1)) && planes < 1 << p->planes) {
        const uint8_t *at = next - PANEL * p->row_bytes + __builtin_ctz(planes) * 16;
        for (int64_t t = from; t < to; t++, at += p->planes * 16, out += 4096) {
            __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)at));
            _mm512_store_si512(out, amx_signs(all, low));
            _mm512_store_si512(out + 2048, amx_signs(all, high));
        }
        return;
    }
    const signs_t signs = row_signs(p, row, own, planes);
    for (int64_t t = from; t < to; t++) {
        bytes_t bytes;
        if (t == whole)
            bytes = last_signs(&signs, t, width / 8, p->last_bytes);
        else if (signs.count == 1)
            bytes = tile_signs(&signs, t, width / 8, 1);
        else
            bytes = tile_signs(&signs, t, width / 8, signs.count);
        if (width == 128) {
            __m512i all = _mm512_broadcast_i32x4((__m128i)bytes);
            _mm512_store_si512(out, amx_signs(all, low));
            _mm512_store_si512(out + 2048, amx_signs(all, high));
            out += 4096;
        } else {
            _mm512_store_si512(out, amx_signs(_mm512_broadcastq_epi64((__m128i)bytes), narrow));
            out += 2048;
        }
    }
}

/* Digits of token m, `[variants, tiles, digits, width]`, into the tiles of x, and scales into their columns. */
static AMX_TARGET void amx_place_token(const work_t *w, int64_t m, const int8_t *digits, const float *scales) {
    const problem_t *p = w->problem;
    const int width = p->width, words = width / 4;
    for (int g = 0; g < w->group_count; g++) {
        const group_t *group = w->groups + g;
        int64_t batch = m / group->tokens, at = m % group->tokens;
        int32_t *to = (int32_t *)(w->amx_digits + group->digits_offset + batch * p->tiles * width * 16);
        float *scale_to = w->amx_scales + group->scales_offset + batch * p->tiles * 16;
        for (int i = 0; i < group->count; i++) {
            const term_t *term = p->terms + group->first + i;
            float radix = term->factor;
            for (int d = p->digits - 1; d >= 0; d--, radix *= 256) {
                int64_t column = (i * p->digits + d) * group->tokens + at;
                for (int64_t t = 0; t < p->tiles; t++) {
                    int64_t tile = term->variant * p->tiles + t;
                    int32_t word[MAX_TILE / 4];
                    memcpy(word, digits + (tile * p->digits + d) * width, width);
                    for (int k = 0; k < words; k++) to[(t * words + k) * 16 + column] = word[k];
                    scale_to[t * 16 + column] = radix * scales[tile];
                }
            }
        }
    }
}

/* The products of the expanded signs of one packing tile, 16 rows, with 16 columns of x: `[16, 16]`. */
ALWAYS_INLINE AMX_TARGET void amx_products(const int8_t *signs, const int8_t *digits, int32_t *products, int width) {
    _tile_zero(0);
    _tile_loadd(4, digits, 64);
    _tile_loadd(2, signs, 64);
    _tile_dpbssd(0, 2, 4);
    if (width == 128) {
        _tile_loadd(5, digits + 1024, 64);
        _tile_loadd(3, signs + 2048, 64);
        _tile_dpbssd(0, 3, 5);
    }
    _tile_stored(0, products, 64);
}

/* The products of 16 rows with one batch of tokens over expanded tiles: sums[row][column] += scale * product. The
   matrix unit is one packing tile ahead of the scaling, `products` has room for two. */
ALWAYS_INLINE AMX_TARGET void amx_batch(const problem_t *p, const group_t *group, int64_t from, int64_t to,
                                        const int8_t *signs, const int8_t *digits, const float *scales,
                                        const float *row_scales, int32_t *products, float *sums, int width,
                                        int one_scale) {
    const int64_t stride = p->blocks * p->row_scales;
    const __m512i index = _mm512_loadu_si512(group->row);
    const __mmask16 kept = p->row_scales >= 16 ? 0xffff : (1 << p->row_scales) - 1;
    __m512 sum[16];
#pragma GCC unroll 16
    for (int row = 0; row < 16; row++) sum[row] = _mm512_load_ps(sums + row * 16);
    amx_products(signs, digits + from * width * 16, products, width);
    for (int64_t t = from; t < to; t++) {
        const int32_t *current = products + (t - from) % 2 * 256;
        if (t + 1 < to)
            amx_products(signs + (t + 1 - from) * width * PANEL, digits + (t + 1) * width * 16,
                         products + (t + 1 - from) % 2 * 256, width);
        const __m512 scale = _mm512_load_ps(scales + t * 16);
        const float *row_scale = row_scales + t / p->tiles_per_block * p->row_scales;
        if (one_scale) row_scale += group->row[0];
#pragma GCC unroll 16
        for (int row = 0; row < 16; row++) {
            __m512 factor = one_scale ? _mm512_set1_ps(row_scale[row * stride])
                                      : _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(kept, row_scale + row * stride));
            __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(current + row * 16));
            sum[row] = _mm512_fmadd_ps(product, _mm512_mul_ps(scale, factor), sum[row]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < 16; row++) _mm512_store_ps(sums + row * 16, sum[row]);
}

/* Rows of panel `panel` for all tokens of the chunk. */
static AMX_TARGET void amx_panel(const work_t *w, int64_t panel, uint8_t *scratch) {
    const problem_t *p = w->problem;
    const int64_t start = panel * PANEL, count = p->blocks * p->row_scales, padded = p->rows - start;
    const int64_t rows = padded < PANEL ? padded : PANEL;
    int8_t *signs = (int8_t *)scratch;
    int32_t *products = (int32_t *)(signs + EXPANDED * MAX_TILE * PANEL);
    float *sums = (float *)(products + 2 * 256);
    float *out = sums + w->amx_sums; /* [tokens, PANEL] */
    float *row_scales = out + w->tokens * PANEL;
    uint8_t *own = scratch + w->own_offset;
    const int64_t own_bytes = p->tiles * (p->width / 8) * w->own_planes;
    float first[PANEL] = {0};
    if (p->bias) load_floats(p->bias, p->bias_type, start, rows, first);
    for (int64_t i = 0; i < PANEL; i++) { /* rows past the last repeat it */
        int64_t row = i < rows ? start + i : p->rows - 1;
        load_floats(p->row_scale, p->row_scale_type, row * count, count, row_scales + i * count);
        unpack_own(w, row, own + i * own_bytes);
    }
    for (int64_t m = 0; m < w->tokens; m++) {
        const float *line = w->lines + m * count;
        memcpy(out + m * PANEL, first, sizeof first);
        if (!w->first_term) continue;
        for (int64_t i = 0; i < PANEL; i++) {
            const float *scale = row_scales + i * count;
            __m512 dot = _mm512_setzero_ps();
            for (int64_t k = 0; k < count; k += 16) {
                __mmask16 kept = count - k >= 16 ? 0xffff : (1 << (count - k)) - 1;
                dot = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(kept, line + k), _mm512_maskz_loadu_ps(kept, scale + k), dot);
            }
            out[m * PANEL + i] += _mm512_reduce_add_ps(dot);
        }
    }
    for (int g = 0; g < w->group_count; g++) {
        const group_t *group = w->groups + g;
        const int64_t batches = (w->tokens + group->tokens - 1) / group->tokens;
        /* groups of as many tokens a tile go on with the same sums */
        if (!g || group[-1].tokens != group->tokens || group[-1].count != group->count)
            memset(sums, 0, batches * PANEL * 16 * sizeof(float));
        for (int64_t from = 0; from < p->tiles; from += EXPANDED) {
            int64_t to = from + EXPANDED < p->tiles ? from + EXPANDED : p->tiles;
            for (int64_t i = 0; i < PANEL; i++) {
                int64_t row = i < rows ? start + i : p->rows - 1;
                amx_expand_row(p, row, own + i * own_bytes, group->planes, from, to, signs + i * 64);
            }
            for (int64_t b = 0; b < batches; b++) {
                const int8_t *digits = w->amx_digits + group->digits_offset + b * p->tiles * p->width * 16;
                const float *scales = w->amx_scales + group->scales_offset + b * p->tiles * 16;
                for (int half = 0; half < 2; half++) {
                    float *sum = sums + (b * PANEL + half * 16) * 16;
                    const float *of_half = row_scales + half * 16 * count;
                    const int8_t *from_half = signs + half * 1024;
                    if (p->width == 128 && group->count == 1)
                        amx_batch(p, group, from, to, from_half, digits, scales, of_half, products, sum, 128, 1);
                    else if (p->width == 128)
                        amx_batch(p, group, from, to, from_half, digits, scales, of_half, products, sum, 128, 0);
                    else
                        amx_batch(p, group, from, to, from_half, digits, scales, of_half, products, sum, 64, 0);
                }
            }
        }
        if (g + 1 < w->group_count && group[1].tokens == group->tokens && group[1].count == group->count) continue;
        for (int64_t m = 0; m < w->tokens; m++) {
            const float *from = sums + m / group->tokens * PANEL * 16 + m % group->tokens;
            for (int i = 0; i < group->count * p->digits; i++)
                for (int row = 0; row < PANEL; row++)
                    out[m * PANEL + row] += from[row * 16 + i * group->tokens];
        }
    }
    for (int64_t m = 0; m < w->tokens; m++)
        store_floats(p->out, p->x_type, (w->first_token + m) * p->rows + start, rows, out + m * PANEL);
}

/* Eight tiles of 16 rows of 64 bytes. Not a local variable: compilers see but 8 of the bytes that are read. */
static const tile_config_t tile_config = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

static AMX_TARGET void amx_start(void) { _tile_loadconfig(&tile_config); }

static AMX_TARGET void amx_stop(void) { _tile_release(); }
