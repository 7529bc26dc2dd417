/* What the parts of native.c share: the problem as native.py describes it, and conversions of its numbers. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MAX_PLANES 4  /* of all columns and of the salient ones alone */
#define MAX_TERMS 16
#define MAX_DIGITS 3
#define MAX_TILE 128

#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef uint8_t bytes_t __attribute__((vector_size(16)));

enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum { ZONE_ALL = 0, ZONE_REST = 1, ZONE_SALIENT = 2 };

/* Columns of x multiplied by a column scale and restricted to a zone. */
typedef struct {
    int32_t col;  /* index of the column scale; -1: none */
    int32_t own;  /* 1: it is one of the salient columns' own */
    int32_t zone;
} variant_t;

typedef struct {
    int32_t planes;  /* bit p set: plane p is a factor of the sign; 0: the sign is +1; terms are sorted by it */
    int32_t row;     /* index of the row scale */
    int32_t variant;
    float factor;    /* negative where the product of the planes is the complement of the xor of their bits */
} term_t;

typedef struct {
    const void *x;                /* [m, columns] */
    const uint8_t *weight;        /* [rows, row_bytes] */
    const void *row_scale;        /* [rows, blocks, row_scales] */
    const void *col_scale;        /* [col_scales, columns] */
    const void *permutation;      /* [columns] or NULL */
    const void *salient_columns;  /* [salient], ascending, or NULL */
    const uint8_t *salient_weight; /* [rows, salient_bytes] or NULL */
    const void *salient_col_scale; /* [*, salient] or NULL */
    const void *bias;             /* [rows] or NULL */
    void *out;                    /* [m, rows], of x's type */
    const variant_t *variants;
    const term_t *terms;
    int64_t m, rows, columns, salient;
    int64_t row_bytes, salient_bytes; /* of a row */
    int64_t tiles, tiles_per_block, blocks;
    int32_t x_type, row_scale_type, col_scale_type, salient_col_scale_type, bias_type;
    int32_t permutation_bytes, salient_columns_bytes; /* of one index: 2 or 4 */
    int32_t planes;     /* of all columns; the salient columns' own planes follow them in `term_t.planes` */
    int32_t row_scales, variant_count, term_count;
    int32_t width;      /* columns of a whole tile: 128 or 64 */
    int32_t last_bytes; /* bytes of a plane of the last tile: 1 .. width / 8 */
    int32_t digits;     /* of a column of x: 2 or 3 */
    int32_t threads;
} problem_t;

ALWAYS_INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

ALWAYS_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* IEEE half to float in integer steps that every compiler vectorises: rebias the exponent by a multiplication, which
   also normalises subnormals; inf and NaN keep theirs. */
ALWAYS_INLINE float half_to_float(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t bits = to_bits(from_bits(magnitude) * 0x1p112f);
    bits |= magnitude >= 0x0f800000 ? 0x7f800000 : 0;
    return from_bits(bits | sign);
}

/* Float to IEEE half, to nearest, ties to even. */
ALWAYS_INLINE uint16_t float_to_half(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    uint32_t normal = (size + 0xc8000fffu + (size >> 13 & 1)) >> 13;
    uint32_t subnormal = to_bits(from_bits(size) + 0.5f) - 0x3f000000;
    uint32_t result = size < 0x38800000 ? subnormal : normal;
    result = size >= 0x47800000 ? 0x7c00 : result;
    result = size > 0x7f800000 ? 0x7e00 : result;
    return (uint16_t)(result | sign);
}

/* Float to bfloat16, to nearest, ties to even. */
ALWAYS_INLINE uint16_t float_to_bfloat(float value) {
    uint32_t bits = to_bits(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* to[i] = from[start + i], for `count` numbers of `type`. */
ALWAYS_INLINE void load_floats(const void *from, int32_t type, int64_t start, int64_t count, float *to) {
    if (type == FLOAT16) {
        const uint16_t *values = (const uint16_t *)from + start;
        for (int64_t i = 0; i < count; i++) to[i] = half_to_float(values[i]);
    } else if (type == BFLOAT16) {
        const uint16_t *values = (const uint16_t *)from + start;
        for (int64_t i = 0; i < count; i++) to[i] = from_bits((uint32_t)values[i] << 16);
    } else {
        memcpy(to, (const float *)from + start, count * sizeof(float));
    }
}

/* from[i] to out[start + i], for `count` numbers of `type`. */
ALWAYS_INLINE void store_floats(void *out, int32_t type, int64_t start, int64_t count, const float *from) {
    if (type == FLOAT16) {
        uint16_t *to = (uint16_t *)out + start;
        for (int64_t i = 0; i < count; i++) to[i] = float_to_half(from[i]);
    } else if (type == BFLOAT16) {
        uint16_t *to = (uint16_t *)out + start;
        for (int64_t i = 0; i < count; i++) to[i] = float_to_bfloat(from[i]);
    } else {
        memcpy((float *)out + start, from, count * sizeof(float));
    }
}

ALWAYS_INLINE int64_t load_index(const void *from, int32_t bytes, int64_t i) {
    return bytes == 2 ? ((const int16_t *)from)[i] : ((const int32_t *)from)[i];
}
