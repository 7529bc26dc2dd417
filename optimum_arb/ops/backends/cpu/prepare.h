/* Columns of x as block fixed point: included once per instruction set. NAME(f) is f's name for it, TARGET its attribute.

   A column of a tile is an integer q = round(x * col_scale / s) with one float s per tile, written in two or three
   digits of 8 bits with sign, q = 256 (256 d0 + d1) + d2. Two have an error of at
   most 2^-15 of the tile's largest column, 2^-16.7 in the mean square: less than the rounding of results to bfloat16 or
   float16; three of 2^-23, that of a float32. A tile whose columns are all below 2^-97 counts as 0. */

/* x of one token in the packed order of the columns, times column scale and zone of a variant. */
ALWAYS_INLINE TARGET void NAME(variant_columns)(const problem_t *p, const variant_t *variant, const float *x,
                                                float *to) {
    if (variant->zone == ZONE_SALIENT) {
        memset(to, 0, p->columns * sizeof(float));
        for (int64_t s = 0; s < p->salient; s++) {
            int64_t k = load_index(p->salient_columns, p->salient_columns_bytes, s);
            float scale = 1;
            if (variant->own)
                load_floats(p->salient_col_scale, p->salient_col_scale_type, variant->col * p->salient + s, 1, &scale);
            else if (variant->col >= 0)
                load_floats(p->col_scale, p->col_scale_type, variant->col * p->columns + k, 1, &scale);
            to[k] = x[k] * scale;
        }
        return;
    }
    if (variant->col >= 0) {
        load_floats(p->col_scale, p->col_scale_type, variant->col * p->columns, p->columns, to);
        for (int64_t k = 0; k < p->columns; k++) to[k] *= x[k];
    } else {
        memcpy(to, x, p->columns * sizeof(float));
    }
    if (variant->zone == ZONE_REST)
        for (int64_t s = 0; s < p->salient; s++) to[load_index(p->salient_columns, p->salient_columns_bytes, s)] = 0;
}

/* One tile of `width` columns to digits `[digit, width]`, most significant first. Returns the scale s, NaN where a
   column is not finite, and the sum of q. */
ALWAYS_INLINE TARGET float NAME(tile_digits)(const float *columns, int width, int digits, int8_t *to, int32_t *sum) {
    uint32_t largest = 0;
    for (int i = 0; i < width; i++) {
        uint32_t size = to_bits(columns[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    *sum = 0;
    if (largest < 30u << 23 || largest >= 0x7f800000) {
        memset(to, 0, digits * width);
        return largest >= 0x7f800000 ? from_bits(0x7fc00000) : 0;
    }
    /* s is a power of two, so that numbers of few bits stay exact; q is below 2^15 or 2^23, and as far below as the
       first digit needs, which must not round up to 128 */
    uint32_t exponent = (largest >> 23) - (digits == 3 ? 22 : 14) + ((largest & 0x7fffff) >= 0x7e0000);
    const float inverse = from_bits((254 - exponent) << 23);
    int32_t total = 0;
    for (int i = 0; i < width; i++) {
        int32_t q = (int32_t)__builtin_rintf(columns[i] * inverse);
        int32_t low = (int8_t)q, high = (q - low) >> 8;
        total += q;
        to[(digits - 1) * width + i] = (int8_t)low;
        if (digits == 3) {
            low = (int8_t)high;
            high = (high - low) >> 8;
            to[width + i] = (int8_t)low;
        }
        to[i] = (int8_t)high;
    }
    *sum = total;
    return from_bits(exponent << 23);
}

/* Token m: digits `[variants, tiles, digits, width]`, scales `[variants, tiles]`, and in `line` `[blocks, row_scales]`
   what multiplies the row scales by themselves: the sums of the terms without a plane and, where the kernel's signs are
   0 and 1, what corrects the others. `buffer` has 2 * columns + width floats. */
static TARGET void NAME(prepare_token)(const problem_t *p, int64_t m, int zero_one, float *buffer, int8_t *digits,
                                       float *scales, float *line) {
    float *x = buffer, *columns = buffer + p->columns;
    const int width = p->width, lanes = width / 8;
    load_floats(p->x, p->x_type, m * p->columns, p->columns, columns);
    if (p->permutation && p->permutation_bytes == 2) {
        const int16_t *from = p->permutation;
        for (int64_t k = 0; k < p->columns; k++) x[k] = columns[from[k]];
    } else if (p->permutation) {
        const int32_t *from = p->permutation;
        for (int64_t k = 0; k < p->columns; k++) x[k] = columns[from[k]];
    } else {
        memcpy(x, columns, p->columns * sizeof(float));
    }
    memset(line, 0, p->blocks * p->row_scales * sizeof(float));
    for (int v = 0; v < p->variant_count; v++) {
        NAME(variant_columns)(p, p->variants + v, x, columns);
        for (int64_t t = 0; t < p->tiles; t++) {
            const float *tile = columns + t * width;
            float last[MAX_TILE];
            if (t + 1 == p->tiles) {
                /* bit j of byte i is column j * last_bytes + i; it goes where a whole tile has it */
                int64_t left = p->columns - t * width;
                memset(last, 0, sizeof last);
                for (int64_t k = 0; k < left; k++) last[k / p->last_bytes * lanes + k % p->last_bytes] = tile[k];
                tile = last;
            }
            int32_t sum;
            int8_t *to = digits + (v * p->tiles + t) * p->digits * width;
            float scale;
            if (width == 128)
                scale = p->digits == 3 ? NAME(tile_digits)(tile, 128, 3, to, &sum)
                                       : NAME(tile_digits)(tile, 128, 2, to, &sum);
            else
                scale = NAME(tile_digits)(tile, width, p->digits, to, &sum);
            scales[v * p->tiles + t] = scale;
            for (int i = 0; i < p->term_count; i++) {
                const term_t *term = p->terms + i;
                if (term->variant != v || (term->planes && !zero_one)) continue;
                float factor = term->planes ? -term->factor : term->factor;
                line[t / p->tiles_per_block * p->row_scales + term->row] += factor * scale * (float)sum;
            }
        }
    }
}
