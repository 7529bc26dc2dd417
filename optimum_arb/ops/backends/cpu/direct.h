/* Signs times digits, row by row: included once per instruction set. NAME(f) is f's name for it, TARGET its attribute,
   VECTOR the bytes of one of its registers. The including file defines NAME(spread), the bytes of a tile's signs
   repeated over a register, NAME(expand), the signs of a tile as bytes, NAME(dot), signs times digits with lanes left
   apart, and NAME(lane_weights), what the lanes count. */

#define LANES (VECTOR / 4)

typedef float NAME(floats) __attribute__((vector_size(VECTOR)));

/* What one tile adds to the sums of `count` tokens by the `terms` terms of a group. */
ALWAYS_INLINE TARGET void NAME(add_tile)(const work_t *w, const group_t *group, bytes_t bytes, int64_t t, int64_t first,
                                         int count, int terms, int width, int digits, const float *scales,
                                         NAME(floats) *sum) {
    const problem_t *p = w->problem;
    const int64_t tile_digits = digits * width, variant_digits = p->tiles * tile_digits;
    const int64_t token_digits = p->variant_count * variant_digits;
    NAME(vector) signs[8];
    NAME(expand)(NAME(spread)(bytes, width), width, signs);
    for (int i = group->first; i < group->first + terms; i++) {
        const int8_t *at = w->digits + first * token_digits + p->terms[i].variant * variant_digits + t * tile_digits;
        for (int m = 0; m < count; m++)
            sum[m] += NAME(dot)(signs, at + m * token_digits, width, digits) * scales[(i * count + m) * p->tiles + t];
    }
}

/* One sign matrix in one row: the xor of `planes` planes. */
ALWAYS_INLINE TARGET void NAME(add_group)(const work_t *w, const group_t *group, const signs_t *signs, int64_t first,
                                          int count, int planes, int terms, int width, int digits, const float *scales,
                                          NAME(floats) *sum) {
    const problem_t *p = w->problem;
    const int64_t whole = p->tiles - (p->last_bytes < width / 8);
    for (int64_t t = 0; t < whole; t++)
        NAME(add_tile)(w, group, tile_signs(signs, t, width / 8, planes), t, first, count, terms, width, digits, scales,
                       sum);
    if (whole < p->tiles)
        NAME(add_tile)(w, group, last_signs(signs, whole, width / 8, p->last_bytes), whole, first, count, terms, width,
                       digits, scales, sum);
}

/* One row of the weight with `count` tokens from `first` on. `own` has the salient columns' own planes in this row,
   `scales` room for [terms, count, tiles]. */
ALWAYS_INLINE TARGET void NAME(direct_row)(const work_t *w, int64_t row, int64_t first, int count, int width, int digits,
                                           const uint8_t *own, const float *row_scales, float *scales) {
    const problem_t *p = w->problem;
    const int64_t tiles = p->tiles;
    for (int i = w->first_term; i < p->term_count; i++)
        for (int m = 0; m < count; m++) {
            const term_t *term = p->terms + i;
            const float *from = w->scales + ((first + m) * p->variant_count + term->variant) * tiles;
            float *to = scales + (i * count + m) * tiles;
            float factor = 2 * term->factor; /* signs of 0 and 1: twice their sum, less the sum of all columns */
            if (p->row_scales == 1 && p->tiles_per_block == 1)
                for (int64_t t = 0; t < tiles; t++) to[t] = factor * row_scales[t] * from[t];
            else if (p->tiles_per_block == 1)
                for (int64_t t = 0; t < tiles; t++) to[t] = factor * row_scales[t * p->row_scales + term->row] * from[t];
            else
                for (int64_t t = 0; t < tiles; t++)
                    to[t] = factor * row_scales[t / p->tiles_per_block * p->row_scales + term->row] * from[t];
        }
    NAME(floats) sum[DIRECT_TOKENS];
    for (int m = 0; m < count; m++) sum[m] = (NAME(floats)){0};
    for (int g = 0; g < w->group_count; g++) {
        const group_t *group = w->groups + g;
        const signs_t signs = row_signs(p, row, own, group->planes);
        if (signs.count == 1 && group->count == 1)
            NAME(add_group)(w, group, &signs, first, count, 1, 1, width, digits, scales, sum);
        else
            NAME(add_group)(w, group, &signs, first, count, signs.count, group->count, width, digits, scales, sum);
    }
    const float *weights = NAME(lane_weights)(width);
    for (int m = 0; m < count; m++) {
        float total = 0;
        const float *line = w->lines + (first + m) * p->blocks * p->row_scales;
        NAME(floats) all;
        memcpy(&all, weights, sizeof all);
        all *= sum[m];
        int64_t i = 0;
        for (; i + LANES <= p->blocks * p->row_scales; i += LANES) {
            NAME(floats) a, b;
            memcpy(&a, line + i, sizeof a);
            memcpy(&b, row_scales + i, sizeof b);
            all += a * b;
        }
        for (int lane = 0; lane < LANES / 4; lane++) /* four chains of additions, not one */
            total += (all[4 * lane] + all[4 * lane + 1]) + (all[4 * lane + 2] + all[4 * lane + 3]);
        for (; i < p->blocks * p->row_scales; i++) total += line[i] * row_scales[i];
        if (p->bias) {
            float bias;
            load_floats(p->bias, p->bias_type, row, 1, &bias);
            total += bias;
        }
        store_floats(p->out, p->x_type, (w->first_token + first + m) * p->rows + row, 1, &total);
    }
}

/* All tokens of the chunk with one row; the sizes are constants where speed depends on it. */
ALWAYS_INLINE TARGET void NAME(direct_tokens)(const work_t *w, int64_t row, int width, int digits, const uint8_t *own,
                                              const float *row_scales, float *scales) {
    int64_t m = 0;
    for (; m + DIRECT_TOKENS <= w->tokens; m += DIRECT_TOKENS)
        NAME(direct_row)(w, row, m, DIRECT_TOKENS, width, digits, own, row_scales, scales);
    for (; m < w->tokens; m++) NAME(direct_row)(w, row, m, 1, width, digits, own, row_scales, scales);
}

static TARGET void NAME(direct)(const work_t *w, int64_t start, int64_t stop, uint8_t *scratch) {
    const problem_t *p = w->problem;
    float *row_scales = (float *)scratch, *scales = row_scales + p->blocks * p->row_scales;
    uint8_t *own = scratch + w->own_offset;
    for (int64_t row = start; row < stop; row++) {
        load_floats(p->row_scale, p->row_scale_type, row * p->blocks * p->row_scales, p->blocks * p->row_scales,
                    row_scales);
        unpack_own(w, row, own);
        if (p->width == 128 && p->digits == 2)
            NAME(direct_tokens)(w, row, 128, 2, own, row_scales, scales);
        else if (p->width == 128)
            NAME(direct_tokens)(w, row, 128, 3, own, row_scales, scales);
        else if (p->digits == 2)
            NAME(direct_tokens)(w, row, 64, 2, own, row_scales, scales);
        else
            NAME(direct_tokens)(w, row, 64, 3, own, row_scales, scales);
    }
}

#undef LANES
