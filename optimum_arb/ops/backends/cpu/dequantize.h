/* The weight itself, row by row: included once per instruction set. NAME(f) is f's name for it, TARGET its attribute,
   WIDTH the floats of one of its registers. */

#define PARTS (16 / WIDTH)

typedef float NAME(weights) __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t NAME(bits) __attribute__((vector_size(4 * WIDTH)));
typedef uint8_t NAME(narrow) __attribute__((vector_size(WIDTH)));

ALWAYS_INLINE TARGET NAME(weights) NAME(load)(const float *from) {
    NAME(weights) value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* WIDTH of the bytes, from part * WIDTH on, each in 32 bits and inverted: 1 = -1. */
ALWAYS_INLINE TARGET NAME(bits) NAME(negative)(const bytes_t *bytes, int part) {
    NAME(narrow) narrow;
    memcpy(&narrow, (const uint8_t *)bytes + part * WIDTH, WIDTH);
    return ~__builtin_convertvector(narrow, NAME(bits));
}

/* The columns of bit j with their signs. */
ALWAYS_INLINE TARGET NAME(weights) NAME(flip)(NAME(weights) value, NAME(bits) negative, int j) {
    return (NAME(weights))((NAME(bits))value ^ (negative << (31 - j) & 0x80000000u));
}

static TARGET void NAME(dequantize_row)(const dequantize_problem_t *p, int64_t row, float *scales) {
    load_floats(p->row_scale, p->row_scale_type, row * p->blocks * p->row_scales, p->blocks * p->row_scales, scales);
    for (int64_t i = 0; i < p->tiles; i++) {
        const uint8_t *tile = p->weight + row * p->row_bytes + i * p->planes * p->tile_bytes;
        int nbytes = i + 1 < p->tiles ? p->tile_bytes : p->last_bytes;
        const float *row_scales = scales + i / p->tiles_per_block * p->row_scales;
        float out[TILE_FLOATS] __attribute__((aligned(64)));
        for (int t = 0; t < p->term_count; t++) {
            const term_t *term = p->terms + t;
            const float *columns = p->columns + (term->variant * p->tiles + i) * TILE_FLOATS;
            bytes_t bytes; /* a product of no planes is +1: all bits set */
            memset(&bytes, 255, sizeof bytes);
            if (term->planes) bytes = load_bytes(tile, nbytes, term->planes);
            float scale = term->factor * row_scales[term->row];
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++) {
                NAME(bits) negative = NAME(negative)(&bytes, part);
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++) {
                    float *to = out + j * 16 + part * WIDTH;
                    NAME(weights) value = scale * NAME(flip)(NAME(load)(columns + (to - out)), negative, j);
                    if (t) value += NAME(load)(to);
                    memcpy(to, &value, sizeof value);
                }
            }
        }
        memcpy(p->out + (row * p->tiles + i) * TILE_FLOATS, out, sizeof out);
    }
}

#undef PARTS
