/*
 * Packed linear layers on the CPU: y = x W^T and W itself, from sign planes, row scales and prepared columns.
 *
 * Plain C without Python or torch headers, called through ctypes by native.py. Compiled with -fopenmp but not linked
 * with an OpenMP library: its symbols resolve to the library that torch has loaded, so both share one pool of threads.
 *
 * The caller prepares columns tile by tile: `[variants, tiles, 8, 16]` floats where `[v, t, j, i]` is the column whose
 * sign is bit j of byte i in tile t (optimum_arb/packing.py draws it), times column scale and zone mask of variant v,
 * and 0 where the tile has no such column. Sixteen neighbouring floats so belong to one bit of the sixteen bytes.
 *
 * Every sum runs in float32, lane by lane and tile by tile in one fixed order: results do not depend on the threads.
 * With AVX-512 an infinite column makes a sum NaN where other instruction sets keep the infinity.
 */
#include <stdint.h>
#include <string.h>

#define MAX_PLANES 3
#define LANES 16
#define TILE_FLOATS 128 /* 8 bits x 16 lanes */
#define ROWS_OF_X 4     /* that share the unpacking of one row of the weight */

typedef uint8_t bytes_t __attribute__((vector_size(16)));
typedef uint64_t words_t __attribute__((vector_size(16)));

typedef struct {
    int32_t planes;  /* bit p set: plane p is a factor of the sign; 0: the sign is +1 */
    int32_t row;     /* index of the row scale */
    int32_t variant; /* index of the prepared columns */
    float factor;    /* negative where the product of the planes is the complement of the xor of their bits */
} term_t;

typedef struct {
    const uint8_t *weight;   /* [rows, row_bytes] */
    const void *row_scale;   /* [rows, blocks, row_scales] */
    const float *columns;    /* [m, variants, tiles, 8, 16] */
    const float *sums;       /* [m, variants, tiles, 16]: the columns summed over the 8 bits */
    const term_t *terms;
    float *scales;           /* scratch [threads, blocks * row_scales] */
    float *out;              /* linear: [m, out_stride]; dequantize: [rows, tiles, 8, 16] */
    int64_t rows, m, out_stride, row_bytes, tiles, tiles_per_block, blocks;
    int32_t scale_type;      /* 0 float32, 1 float16, 2 bfloat16 */
    int32_t row_scales, variants, term_count, planes;
    int32_t tile_bytes;      /* bytes of a plane of a whole tile: 16 or 8 */
    int32_t last_bytes;      /* of the last tile: 1 .. tile_bytes */
    int32_t threads;
} problem_t;

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* IEEE half to float in integer steps that every compiler vectorises: rebias the exponent by a multiplication, which
   also normalises subnormals; inf and NaN keep theirs. */
static inline float half_to_float(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float value = from_bits(magnitude) * 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits |= magnitude >= 0x0f800000 ? 0x7f800000 : 0;
    return from_bits(bits | sign);
}

static inline __attribute__((always_inline)) void load_scales(const problem_t *p, int64_t row, float *scales) {
    int64_t count = p->blocks * p->row_scales, start = row * count;
    if (p->scale_type == 1) {
        const uint16_t *from = (const uint16_t *)p->row_scale + start;
        for (int64_t i = 0; i < count; i++) scales[i] = half_to_float(from[i]);
    } else if (p->scale_type == 2) {
        const uint16_t *from = (const uint16_t *)p->row_scale + start;
        for (int64_t i = 0; i < count; i++) scales[i] = from_bits((uint32_t)from[i] << 16);
    } else {
        memcpy(scales, (const float *)p->row_scale + start, count * sizeof(float));
    }
}

/* The same code for several instruction sets, chosen at run time. */
#define NAME(name) name##_baseline
#define TARGET
#define WIDTH 4
#include "rows.h"
#undef NAME
#undef TARGET
#undef WIDTH

#if defined(__x86_64__)
#define NAME(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WIDTH 8
#include "rows.h"
#undef NAME
#undef TARGET
#undef WIDTH

#include <immintrin.h>
#define NAME(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define WIDTH 16
#define MASKED_ADD
#include "rows.h"
#undef MASKED_ADD
#undef NAME
#undef TARGET
#undef WIDTH
#endif

typedef void (*kernel_t)(const problem_t *, int64_t row, float *scales);

/* Best instruction set that this machine has: 2 AVX-512BW, 1 AVX2, 0 what the compiler assumes anyway. */
int arb_instruction_set(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

static void for_rows(const problem_t *p, kernel_t kernel) {
#pragma omp parallel num_threads(p->threads)
    {
        int thread = 0;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        thread = omp_get_thread_num();
#endif
        float *scales = p->scales + thread * p->blocks * p->row_scales;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p->rows; row++) kernel(p, row, scales);
    }
}

/* out[m, row] = sum over terms, blocks of factor * row_scale * (signs . columns); every element is written. */
void arb_linear(const problem_t *p, int instruction_set) {
    kernel_t kernel = linear_row_baseline;
#if defined(__x86_64__)
    if (instruction_set == 1) kernel = linear_row_avx2;
    if (instruction_set == 2) kernel = linear_row_avx512;
#endif
    for_rows(p, kernel);
}

/* out[row, tile, j, i] = sum over terms of factor * row_scale * sign * column; m is 1; every element is written. */
void arb_dequantize(const problem_t *p, int instruction_set) {
    kernel_t kernel = dequantize_row_baseline;
#if defined(__x86_64__)
    if (instruction_set == 1) kernel = dequantize_row_avx2;
    if (instruction_set == 2) kernel = dequantize_row_avx512;
#endif
    for_rows(p, kernel);
}
