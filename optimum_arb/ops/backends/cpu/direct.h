/* Signs times digits, row by row: included once per instruction set. NAME(f) is f's name for it, TARGET its attribute,
   VECTOR the bytes of one of its registers. The including file defines NAME(spread), the bytes of a tile's signs
   repeated over a register, NAME(expand), the signs of a tile as bytes, NAME(dot), signs times digits with lanes left
   apart, and NAME(lane_weights), what the lanes count; it may define NAME(load_part) and NAME(sum_rows), which stand here
   for all. ROWS is the rows of the weight that meet one token together, at most MAX_ROWS. */

#define LANES (VECTOR / 4)

typedef float NAME(floats) __attribute__((vector_size(VECTOR)));

#ifdef OWN_LOAD_PART
#undef OWN_LOAD_PART
#else
ALWAYS_INLINE TARGET NAME(floats) NAME(load_part)(const float *from, int64_t count) {
    NAME(floats) part = {0};
    if (count >= LANES)
        memcpy(&part, from, sizeof part);
    else
        for (int i = 0; i < count; i++) part[i] = from[i];
    return part;
}
#endif

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

/* What the sums of the tiles of one row count in one term, given the tiles' own scales. */
ALWAYS_INLINE TARGET void NAME(tile_scales)(const problem_t *p, const term_t *term, const float *row_scales,
                                            const float *from, float *to) {
    float factor = 2 * term->factor; /* signs of 0 and 1: twice their sum, less the sum of all columns */
    if (p->row_scales == 1 && p->tiles_per_block == 1)
        for (int64_t t = 0; t < p->tiles; t++) to[t] = factor * row_scales[t] * from[t];
    else if (p->tiles_per_block == 1)
        for (int64_t t = 0; t < p->tiles; t++) to[t] = factor * row_scales[t * p->row_scales + term->row] * from[t];
    else
        for (int64_t t = 0; t < p->tiles; t++)
            to[t] = factor * row_scales[t / p->tiles_per_block * p->row_scales + term->row] * from[t];
}

/* The lanes of one row's sum as they count, and what the terms without a plane add to them. */
ALWAYS_INLINE TARGET NAME(floats) NAME(finish_lanes)(const work_t *w, NAME(floats) sum, int64_t m, int width,
                                                     const float *row_scales) {
    const int64_t count = w->problem->blocks * w->problem->row_scales;
    const float *line = w->lines + m * count;
    NAME(floats) all;
    memcpy(&all, NAME(lane_weights)(width), sizeof all);
    all *= sum;
    for (int64_t i = 0; i < count; i += LANES)
        all += NAME(load_part)(line + i, count - i) * NAME(load_part)(row_scales + i, count - i);
    return all;
}

ALWAYS_INLINE TARGET float NAME(sum_lanes)(NAME(floats) all) {
    float total = 0;
    for (int lane = 0; lane < LANES / 4; lane++) /* four chains of additions, not one */
        total += (all[4 * lane] + all[4 * lane + 1]) + (all[4 * lane + 2] + all[4 * lane + 3]);
    return total;
}

#ifdef OWN_SUM_ROWS
#undef OWN_SUM_ROWS
#else
ALWAYS_INLINE TARGET void NAME(sum_rows)(const NAME(floats) *all, float *totals) {
    for (int r = 0; r < ROWS; r++) totals[r] = NAME(sum_lanes)(all[r]);
}
#endif

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
            NAME(tile_scales)(p, term, row_scales, from, scales + (i * count + m) * tiles);
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
    float bias = 0;
    if (p->bias) load_floats(p->bias, p->bias_type, row, 1, &bias);
    for (int m = 0; m < count; m++) {
        float total = NAME(sum_lanes)(NAME(finish_lanes)(w, sum[m], first + m, width, row_scales)) + bias;
        store_floats(p->out, p->x_type, (w->first_token + first + m) * p->rows + row, 1, &total);
    }
}

/* ROWS rows of the weight with token m, where every sign matrix is a plane of all columns and one term: what is the same
   for all rows is loaded once, and their sums end together. `row_scales` has [ROWS, blocks, row_scales], `scales` room
   for [ROWS, tiles]. In every row the same operations in the same order as in `direct_row`. */
ALWAYS_INLINE TARGET void NAME(direct_rows)(const work_t *w, int64_t row, int64_t m, int width, int digits,
                                            const float *row_scales, float *scales) {
    const problem_t *p = w->problem;
    const int64_t tiles = p->tiles, count = p->blocks * p->row_scales, bytes = width / 8;
    const int64_t whole = tiles - (p->last_bytes < bytes);
    const int64_t line = 64 / (p->planes * bytes); /* tiles of a line of the cache: there are at most four planes */
    NAME(floats) sum[ROWS];
    for (int r = 0; r < ROWS; r++) sum[r] = (NAME(floats)){0};
    for (int g = 0; g < w->group_count; g++) {
        const term_t *term = p->terms + w->groups[g].first;
        const int plane = __builtin_ctz(w->groups[g].planes);
        const int64_t variant = m * p->variant_count + term->variant;
        const int8_t *at = w->digits + variant * tiles * digits * width;
        const uint8_t *weight = p->weight + row * p->row_bytes + plane * bytes;
        for (int r = 0; r < ROWS; r++)
            NAME(tile_scales)(p, term, row_scales + r * count, w->scales + variant * tiles, scales + r * tiles);
        for (int64_t t = 0; t < whole; t++, weight += p->planes * bytes, at += digits * width) {
            /* the rows after these: a fifth of the time at 11008 x 4096, whose signs no near cache holds */
            if (!g && t % line == 0)
                for (int r = ROWS; r < 2 * ROWS; r++) __builtin_prefetch(weight + r * p->row_bytes);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                NAME(vector) signs[8];
                NAME(expand)(NAME(spread)(load_plane(weight + r * p->row_bytes, bytes), width), width, signs);
                sum[r] += NAME(dot)(signs, at, width, digits) * scales[r * tiles + t];
            }
        }
        if (whole == tiles) continue;
        weight -= plane * (bytes - p->last_bytes);
        for (int r = 0; r < ROWS; r++) {
            NAME(vector) signs[8];
            NAME(expand)(NAME(spread)(load_plane(weight + r * p->row_bytes, p->last_bytes), width), width, signs);
            sum[r] += NAME(dot)(signs, at, width, digits) * scales[r * tiles + whole];
        }
    }
    float totals[ROWS], bias[ROWS] = {0};
    if (p->bias) load_floats(p->bias, p->bias_type, row, ROWS, bias);
    for (int r = 0; r < ROWS; r++) sum[r] = NAME(finish_lanes)(w, sum[r], m, width, row_scales + r * count);
    NAME(sum_rows)(sum, totals);
    for (int r = 0; r < ROWS; r++) totals[r] += bias[r];
    store_floats(p->out, p->x_type, (w->first_token + m) * p->rows + row, ROWS, totals);
}

/* The same for `count` tokens from `first` on: a tile's signs are expanded once for all of them, a token's digits loaded
   once for all rows. `sums` has room for [count, ROWS]. */
ALWAYS_INLINE TARGET void NAME(direct_block)(const work_t *w, int64_t row, int64_t first, int count, int width, int digits,
                                             const float *row_scales, NAME(floats) *sums) {
    const problem_t *p = w->problem;
    const int64_t tiles = p->tiles, scale_count = p->blocks * p->row_scales, bytes = width / 8;
    const int64_t whole = tiles - (p->last_bytes < bytes);
    const int64_t line = 64 / (p->planes * bytes), tile_digits = digits * width, token_scales = p->variant_count * tiles;
    for (int i = 0; i < count * ROWS; i++) sums[i] = (NAME(floats)){0};
    for (int g = 0; g < w->group_count; g++) {
        const term_t *term = p->terms + w->groups[g].first;
        const int plane = __builtin_ctz(w->groups[g].planes);
        const float factor = 2 * term->factor, *from = w->scales + first * token_scales + term->variant * tiles;
        const int8_t *at = w->digits + (first * token_scales + term->variant * tiles) * tile_digits;
        const float *row_scale = row_scales + term->row; /* of the tile's block */
        for (int64_t t = 0, left = p->tiles_per_block; t < tiles; t++, left--) {
            if (!left) row_scale += p->row_scales, left = p->tiles_per_block;
            const int64_t stored = t < whole ? bytes : p->last_bytes;
            const uint8_t *weight = p->weight + row * p->row_bytes + t * p->planes * bytes + plane * stored;
            if (!g && t % line == 0)
                for (int r = ROWS; r < 2 * ROWS; r++) __builtin_prefetch(weight + r * p->row_bytes);
            NAME(vector) signs[ROWS][8];
            float scales[ROWS];
            for (int r = 0; r < ROWS; r++) {
                bytes_t packed = t < whole ? load_plane(weight + r * p->row_bytes, bytes)
                                           : load_plane(weight + r * p->row_bytes, p->last_bytes);
                NAME(expand)(NAME(spread)(packed, width), width, signs[r]);
                scales[r] = factor * row_scale[r * scale_count];
            }
            for (int m = 0; m < count; m++) {
                const int8_t *of_token = at + m * token_scales * tile_digits + t * tile_digits;
                const float scale = from[m * token_scales + t];
                NAME(floats) found[ROWS];
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) found[r] = NAME(dot)(signs[r], of_token, width, digits);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) sums[m * ROWS + r] += found[r] * (scales[r] * scale);
            }
        }
    }
    float totals[ROWS], bias[ROWS] = {0};
    if (p->bias) load_floats(p->bias, p->bias_type, row, ROWS, bias);
    for (int m = 0; m < count; m++) {
        NAME(floats) sum[ROWS];
        for (int r = 0; r < ROWS; r++)
            sum[r] = NAME(finish_lanes)(w, sums[m * ROWS + r], first + m, width, row_scales + r * scale_count);
        NAME(sum_rows)(sum, totals);
        for (int r = 0; r < ROWS; r++) totals[r] += bias[r];
        store_floats(p->out, p->x_type, (w->first_token + first + m) * p->rows + row, ROWS, totals);
    }
}

/* All tokens of the chunk; the sizes are constants where speed depends on it. */
ALWAYS_INLINE TARGET void NAME(direct_sized)(const work_t *w, int64_t start, int64_t stop, int width, int digits,
                                             uint8_t *scratch) {
    const problem_t *p = w->problem;
    const int64_t count = p->blocks * p->row_scales, fours = w->tokens - w->tokens % DIRECT_TOKENS;
    NAME(floats) *sums = (NAME(floats) *)scratch;
    float *row_scales = (float *)(scratch + BLOCK_BYTES), *scales = row_scales + MAX_ROWS * count;
    uint8_t *own = scratch + w->own_offset;
    for (int64_t row = start; row < stop;) {
        const int64_t rows = w->plain && row + ROWS <= stop ? ROWS : 1;
        load_floats(p->row_scale, p->row_scale_type, row * count, rows * count, row_scales);
        if (rows > 1) {
            for (int64_t m = 0; m < w->tokens; m += BLOCK_TOKENS) {
                const int64_t left = w->tokens - m, together = left < BLOCK_TOKENS ? left : BLOCK_TOKENS;
                if (together >= LEAST_BLOCK)
                    NAME(direct_block)(w, row, m, together, width, digits, row_scales, sums);
                else
                    for (int64_t i = 0; i < together; i++)
                        NAME(direct_rows)(w, row, m + i, width, digits, row_scales, scales);
            }
        } else {
            unpack_own(w, row, own);
            for (int64_t m = 0; m < fours; m += DIRECT_TOKENS)
                NAME(direct_row)(w, row, m, DIRECT_TOKENS, width, digits, own, row_scales, scales);
            for (int64_t m = fours; m < w->tokens; m++)
                NAME(direct_row)(w, row, m, 1, width, digits, own, row_scales, scales);
        }
        row += rows;
    }
}

static TARGET void NAME(direct)(const work_t *w, int64_t start, int64_t stop, uint8_t *scratch) {
    const problem_t *p = w->problem;
    if (p->width == 128 && p->digits == 2)
        NAME(direct_sized)(w, start, stop, 128, 2, scratch);
    else if (p->width == 128)
        NAME(direct_sized)(w, start, stop, 128, 3, scratch);
    else if (p->digits == 2)
        NAME(direct_sized)(w, start, stop, 64, 2, scratch);
    else
        NAME(direct_sized)(w, start, stop, 64, 3, scratch);
}

#undef LANES
#undef ROWS
