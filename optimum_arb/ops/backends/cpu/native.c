/*
 * Packed linear layers on the CPU: y = x W^T from sign planes, row scales and digits of x, and W itself.
 *
 * Plain C without Python or torch headers, called through ctypes by native.py. Compiled with -fopenmp but not linked
 * with an OpenMP library: its symbols resolve to the library that torch has loaded, so both share one pool of threads.
 *
 * x is written as block fixed point (prepare.h), so that a tile of a row is an exact integer sum of signed bytes, to
 * which the scales apply afterwards. The sums of tiles run in float32 in one fixed order for every row and token:
 * results depend neither on the threads nor on the other tokens of a batch.
 */
#include "native.h"

#include <stdlib.h>

#define DIRECT_TOKENS 4 /* that share the signs of one row of the weight */
#define MAX_ROWS 8      /* of the weight that share the digits of one token */
#define BLOCK_TOKENS 32 /* that meet these rows tile by tile, with their signs expanded once */
#define LEAST_BLOCK 4   /* fewer meet them one after the other, with sums in registers: 0.83 for 0.88 ms of three */
#define BLOCK_BYTES (BLOCK_TOKENS * MAX_ROWS * 64) /* of the sums of both, in registers of up to 64 bytes */
#define PANEL 32        /* rows that the matrix unit takes at once: two of its tiles */
#define EXPANDED 4      /* packing tiles of a panel expanded to bytes at once: 16 KiB */

#if defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define X86 0
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef _OPENMP
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

static int64_t align64(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

/* Terms with the same planes: one sign matrix. */
typedef struct {
    int32_t planes, first, count;
    int32_t tokens;                /* whose columns share a tile of the matrix unit */
    int64_t digits_offset, scales_offset;
    int32_t row[16];               /* the row scale of each column of that tile */
} group_t;

/* A salient column's bit among the salient columns' own planes, and where it goes among the planes of all columns. */
typedef struct {
    uint32_t from, to; /* bytes, of the first plane */
    uint16_t step;     /* bytes from plane to plane */
    uint8_t from_bit, to_bit;
} own_bit_t;

typedef struct {
    const problem_t *problem;
    int32_t first_term, group_count; /* terms below first_term have no plane */
    group_t groups[MAX_TERMS];
    int64_t first_token, tokens;     /* of x, in this chunk */
    int8_t *digits;                  /* [tokens, variants, tiles, digits, width] */
    float *scales;                   /* [tokens, variants, tiles] */
    float *lines;                    /* [tokens, blocks, row_scales] */
    int8_t *amx_digits;
    float *amx_scales;
    int64_t amx_sums;                /* floats of the sums of a panel */
    own_bit_t *own_bits;             /* [salient] */
    int64_t own_offset;              /* bytes, of the own planes in a thread's scratch */
    int32_t own_planes;
    int32_t plain;                   /* 1: every sign matrix is a plane of all columns and has one term */
} work_t;

/* nbytes of a plane, and 0 after them. Whole tiles do not pass through memory: a wide load after narrow stores would
   stall. */
ALWAYS_INLINE bytes_t load_plane(const uint8_t *from, int nbytes) {
    typedef uint64_t words_t __attribute__((vector_size(16)));
    bytes_t part = {0};
    if (nbytes == 16) {
        memcpy(&part, from, 16);
    } else if (nbytes == 8) {
        uint64_t low;
        memcpy(&low, from, 8);
        part = (bytes_t)(words_t){low, 0};
    } else {
        memcpy(&part, from, nbytes);
    }
    return part;
}

/* The planes whose xor is a sign matrix, in one row: where each begins and the bytes from whole tile to whole tile. */
typedef struct {
    const uint8_t *plane[MAX_PLANES];
    int64_t step[MAX_PLANES];
    int32_t whole[MAX_PLANES]; /* 1: the last tile of this plane has room for a whole one */
    int32_t index[MAX_PLANES];
    int32_t count;
} signs_t;

/* `own` has the planes of the salient columns in this row. */
ALWAYS_INLINE signs_t row_signs(const problem_t *p, int64_t row, const uint8_t *own, int32_t planes) {
    const int whole = p->width / 8;
    signs_t signs = {.count = 0};
    for (int plane = 0; planes >> plane; plane++) {
        if (!(planes >> plane & 1)) continue;
        const int at = signs.count++, inside = plane < p->planes;
        signs.plane[at] = inside ? p->weight + row * p->row_bytes + plane * whole : own + (plane - p->planes) * p->tiles * whole;
        signs.step[at] = inside ? p->planes * whole : whole;
        signs.whole[at] = !inside;
        signs.index[at] = plane;
    }
    return signs;
}

/* The bytes of a sign in whole tile t. */
ALWAYS_INLINE bytes_t tile_signs(const signs_t *signs, int64_t t, int whole, int count) {
    bytes_t bytes = load_plane(signs->plane[0] + t * signs->step[0], whole);
    for (int i = 1; i < count; i++) bytes ^= load_plane(signs->plane[i] + t * signs->step[i], whole);
    return bytes;
}

/* The same of the last tile, whose planes may be narrower and so nearer to each other. */
ALWAYS_INLINE bytes_t last_signs(const signs_t *signs, int64_t t, int whole, int last) {
    bytes_t bytes = {0};
    for (int i = 0; i < signs->count; i++) {
        const uint8_t *from = signs->plane[i] + t * signs->step[i];
        bytes ^= load_plane(signs->whole[i] ? from : from - signs->index[i] * (whole - last), last);
    }
    return bytes;
}

/* Where the bit of column k of `columns` lies in a plane of tiles of `width`. */
static void find_bit(int64_t k, int64_t columns, int width, uint32_t *byte, uint8_t *bit) {
    int64_t tile = k / width, left = columns - tile * width;
    int64_t nbytes = left >= width ? width / 8 : (left + 7) / 8;
    *byte = (uint32_t)(tile * (width / 8) + k % width % nbytes);
    *bit = (uint8_t)(k % width / nbytes);
}

/* The salient columns' own planes of one row, spread over all columns: `[own planes, tiles * width / 8]`. */
static void unpack_own(const work_t *w, int64_t row, uint8_t *to) {
    const problem_t *p = w->problem;
    const int64_t bytes = p->tiles * (p->width / 8);
    if (!w->own_planes) return;
    memset(to, 0, w->own_planes * bytes);
    const uint8_t *from = p->salient_weight + row * p->salient_bytes;
    for (int plane = 0; plane < w->own_planes; plane++)
        for (const own_bit_t *at = w->own_bits; at < w->own_bits + p->salient; at++)
            to[plane * bytes + at->to] |= (from[at->from + plane * at->step] >> at->from_bit & 1) << at->to_bit;
}

/* The weight, or a part of it, in float32; columns are prepared by the caller, tile by tile. */
#define TILE_FLOATS 128 /* 8 bits x 16 lanes */

typedef struct {
    const uint8_t *weight;   /* [rows, row_bytes] */
    const void *row_scale;   /* [rows, blocks, row_scales] */
    const float *columns;    /* [variants, tiles, 8, 16]: column scale times zone, 0 where a tile has no such column */
    const term_t *terms;
    float *scales;           /* scratch [threads, blocks * row_scales] */
    float *out;              /* [rows, tiles, 8, 16] */
    int64_t rows, row_bytes, tiles, tiles_per_block, blocks;
    int32_t row_scale_type, row_scales, term_count, planes;
    int32_t tile_bytes, last_bytes; /* of a plane of a whole tile, and of the last one */
    int32_t threads;
} dequantize_problem_t;

/* Many tokens times that weight. */
typedef struct {
    dequantize_problem_t weight; /* its scales and out are not looked at */
    const uint16_t *x;           /* [m, columns] bfloat16 */
    const void *permutation;     /* [columns] or NULL */
    const void *bias;            /* [rows] or NULL */
    uint16_t *out;               /* [m, rows] bfloat16 */
    int64_t m, columns;
    int32_t permutation_bytes, bias_type;
} gemm_problem_t;

ALWAYS_INLINE bytes_t load_bytes(const uint8_t *tile, int nbytes, int32_t planes) {
    bytes_t bytes = {0};
    for (int plane = 0; plane < MAX_PLANES; plane++)
        if (planes >> plane & 1) bytes ^= load_plane(tile + plane * nbytes, nbytes);
    return bytes;
}

#define NAME(name) name##_portable
#define TARGET
#define WIDTH 4
#include "prepare.h"
#include "dequantize.h"
#include "portable.h"
#undef WIDTH
#undef NAME
#undef TARGET

#if X86
#define NAME(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WIDTH 8
#include "prepare.h"
#include "dequantize.h"
#include "avx2.h"
#undef WIDTH
#undef NAME
#undef TARGET

#define NAME(name) name##_avxvnni
#define TARGET __attribute__((target("avxvnni,avx2,fma,f16c")))
#define WITH_VNNI
#include "avx2.h"
#undef WITH_VNNI
#undef NAME
#undef TARGET

#define NAME(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#include "prepare.h"
#include "dequantize_avx512.h"
#include "avx512.h"
#undef NAME
#undef TARGET

#define NAME(name) name##_bfloat
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
#include "dequantize_avx512.h"
#undef NAME
#undef TARGET

#include "amx.h"
#include "gemm.h"
#endif

#if defined(__aarch64__)
#define NAME(name) name##_neon
#define TARGET
#define WIDTH 4
#include "prepare.h"
#include "dequantize.h"
#include "neon.h"
#undef WIDTH
#undef NAME
#undef TARGET

#define NAME(name) name##_dotprod
#define TARGET __attribute__((target("+dotprod")))
#define WITH_DOTPROD
#include "neon.h"
#undef WITH_DOTPROD
#undef NAME
#undef TARGET
#endif

typedef void (*prepare_t)(const problem_t *, int64_t, int, float *, int8_t *, float *, float *);
typedef void (*direct_t)(const work_t *, int64_t, int64_t, uint8_t *);
typedef void (*dequantize_t)(const dequantize_problem_t *, int64_t, float *);

typedef struct {
    const char *name;
    prepare_t prepare;
    direct_t direct; /* NULL: the matrix unit */
    dequantize_t dequantize;
} kernels_t;

/* From the slowest to the fastest; each needs what `arb_supported` asks of the machine. */
static const kernels_t kernels[] = {
    {"portable", prepare_token_portable, direct_portable, dequantize_row_portable},
#if X86
    {"avx2", prepare_token_avx2, direct_avx2, dequantize_row_avx2},
    {"avx-vnni", prepare_token_avx2, direct_avxvnni, dequantize_row_avx2},
    {"avx512-vnni", prepare_token_avx512, direct_avx512, dequantize_row_avx512},
    {"avx512-bf16", prepare_token_avx512, direct_avx512, dequantize_row_bfloat},
    {"amx", prepare_token_avx512, NULL, dequantize_row_bfloat},
#endif
#if defined(__aarch64__)
    {"neon", prepare_token_neon, direct_neon, dequantize_row_neon},
    {"dotprod", prepare_token_neon, direct_dotprod, dequantize_row_neon},
#endif
};

int arb_kernel_count(void) { return sizeof kernels / sizeof *kernels; }

const char *arb_kernel_name(int index) { return kernels[index].name; }

#if X86
#include "detect_x86.h"
#elif defined(__aarch64__)
#include "detect_arm.h"
#endif

/* Whether this machine and its operating system can run these kernels. */
int arb_supported(int index) {
    if (!index) return 1;
#if X86
    return x86_supported(kernels[index].name);
#elif defined(__aarch64__)
    return arm_supported(kernels[index].name);
#else
    return 0;
#endif
}

/* Signs groups and their places among the digits; returns bytes of digits and scales of the matrix unit for `tokens`. */
static void plan_groups(work_t *w, int64_t tokens, int64_t *digits_bytes, int64_t *scale_count) {
    const problem_t *p = w->problem;
    *digits_bytes = *scale_count = w->group_count = w->first_term = 0;
    while (w->first_term < p->term_count && !p->terms[w->first_term].planes) w->first_term++;
    for (int i = w->first_term; i < p->term_count;) {
        group_t *group = w->groups + w->group_count++;
        *group = (group_t){.planes = p->terms[i].planes, .first = i};
        const int most = 16 / p->digits;
        for (; i < p->term_count && p->terms[i].planes == group->planes && group->count < most; i++) group->count++;
        group->tokens = 16 / (group->count * p->digits);
        for (int u = 0; u < group->count * p->digits; u++)
            for (int m = 0; m < group->tokens; m++)
                group->row[u * group->tokens + m] = p->terms[group->first + u / p->digits].row;
        int64_t batches = (tokens + group->tokens - 1) / group->tokens;
        group->digits_offset = *digits_bytes;
        group->scales_offset = *scale_count;
        *digits_bytes += batches * p->tiles * p->width * 16;
        *scale_count += batches * p->tiles * 16;
        int64_t sums = batches * PANEL * 16;
        if (sums > w->amx_sums) w->amx_sums = sums;
    }
}

/* Tokens prepared at once: as many as keep their digits in the second-level cache while the rows pass by. */
static int64_t chunk_tokens(const problem_t *p, int amx) {
    int64_t bytes = p->tiles * p->width * p->digits * p->variant_count;
    int64_t tokens = (1 << 20) / bytes;
    int64_t least = amx ? 40 : DIRECT_TOKENS;
    if (tokens < least) tokens = least;
    return tokens < p->m ? tokens : p->m;
}

/* out[m, row] = bias + sum over terms and blocks of factor * row_scale * (signs . columns); every element is written.
   Returns 0, or 1 where memory was short. */
int arb_linear(const problem_t *p, int index) {
    const kernels_t *kernel = kernels + index;
    const int amx = !kernel->direct;
    const int64_t chunk = chunk_tokens(p, amx), scale_count = p->blocks * p->row_scales;
    const int64_t token_digits = p->variant_count * p->tiles * p->digits * p->width;
    const int64_t token_scales = p->variant_count * p->tiles;
    work_t work = {.problem = p};
    int64_t amx_digits, amx_scales;
    plan_groups(&work, chunk, &amx_digits, &amx_scales);
    for (int i = 0; i < p->term_count; i++)
        while (p->terms[i].planes >> (p->planes + work.own_planes)) work.own_planes++;

    /* one block of memory: shared parts, then each thread's */
    const int64_t lines_bytes = align64(chunk * scale_count * sizeof(float));
    const int64_t own_bits_bytes = align64(work.own_planes ? p->salient * sizeof(own_bit_t) : 0);
    const int64_t digits_bytes = align64(amx ? amx_digits : chunk * token_digits);
    const int64_t scales_bytes = align64((amx ? amx_scales : chunk * token_scales) * sizeof(float));
    const int64_t token_bytes = align64((2 * p->columns + MAX_TILE) * sizeof(float)) +
                                (amx ? align64(token_digits) + align64(token_scales * sizeof(float)) : 0);
    const int64_t own_row = p->tiles * (p->width / 8) * work.own_planes;
    work.plain = 1;
    for (int g = 0; g < work.group_count; g++) {
        const int32_t planes = work.groups[g].planes;
        work.plain &= work.groups[g].count == 1 && !(planes & (planes - 1)) && planes < 1 << p->planes;
    }
    int64_t rows_bytes;
    if (amx)
        work.own_offset = align64(EXPANDED * MAX_TILE * PANEL + (2 * 256 + work.amx_sums + chunk * PANEL +
                                                    PANEL * scale_count + 16) * sizeof(float));
    else
        work.own_offset =
            BLOCK_BYTES + align64((MAX_ROWS * scale_count + MAX_ROWS * p->term_count * p->tiles) * sizeof(float));
    rows_bytes = work.own_offset + align64(own_row * (amx ? PANEL : 1));
    const int64_t thread_bytes = rows_bytes > token_bytes ? rows_bytes : token_bytes;
    uint8_t *memory = malloc(64 + lines_bytes + own_bits_bytes + digits_bytes + scales_bytes + p->threads * thread_bytes);
    if (!memory) return 1;
    uint8_t *at = (uint8_t *)align64((intptr_t)memory);
    work.lines = (float *)at;
    at += lines_bytes;
    work.own_bits = (own_bit_t *)at;
    at += own_bits_bytes;
    work.digits = work.amx_digits = (int8_t *)at;
    at += digits_bytes;
    work.scales = work.amx_scales = (float *)at;
    at += scales_bytes;
    for (int64_t s = 0; work.own_planes && s < p->salient; s++) {
        own_bit_t *own = work.own_bits + s;
        find_bit(s, p->salient, p->width, &own->from, &own->from_bit);
        const int64_t tile = s / p->width * p->width, left = (p->salient - tile + 7) / 8;
        own->step = left < p->width / 8 ? left : p->width / 8;
        own->from += tile / 8 * (work.own_planes - 1);
        find_bit(load_index(p->salient_columns, p->salient_columns_bytes, s), p->columns, p->width, &own->to, &own->to_bit);
    }

    if (amx) memset(work.amx_scales, 0, scales_bytes); /* unused columns count nothing */

    const int64_t step = amx ? PANEL : 16;
    const int64_t steps = (p->rows + step - 1) / step;
    for (int64_t first = 0; first < p->m; first += chunk) {
        work.first_token = first;
        work.tokens = p->m - first < chunk ? p->m - first : chunk;
        int64_t next_token = 0;
#pragma omp parallel num_threads(p->threads)
        {
            uint8_t *scratch = at + omp_get_thread_num() * thread_bytes;
            for (int64_t m; (m = __atomic_fetch_add(&next_token, 1, __ATOMIC_RELAXED)) < work.tokens;) {
                float *buffer = (float *)scratch, *line = work.lines + m * scale_count;
                int8_t *digits = work.digits + m * token_digits;
                float *scales = work.scales + m * token_scales;
                if (amx) {
                    digits = (int8_t *)scratch + align64((2 * p->columns + MAX_TILE) * sizeof(float));
                    scales = (float *)(digits + align64(token_digits));
                }
                kernel->prepare(p, first + m, !amx, buffer, digits, scales, line);
#if X86
                if (amx) amx_place_token(&work, m, digits, scales);
#endif
            }
#pragma omp barrier
#if X86
            if (amx) amx_start();
#endif
            /* each thread has the same rows in every call, so that they stay in its cache where they fit */
            const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            const int64_t last_step = steps * (thread + 1) / threads;
            for (int64_t i = steps * thread / threads; i < last_step; i++) {
                int64_t start = i * step, stop = start + step < p->rows ? start + step : p->rows;
                if (!amx) kernel->direct(&work, start, stop, scratch);
#if X86
                else amx_panel(&work, i, scratch);
#endif
            }
#if X86
            if (amx) amx_stop();
#endif
        }
    }
    free(memory);
    return 0;
}

/* out[row, tile, j, i] = sum over terms of factor * row_scale * sign * column; every element is written. */
void arb_dequantize(const dequantize_problem_t *p, int index) {
    const int64_t count = p->blocks * p->row_scales;
#pragma omp parallel num_threads(p->threads)
    {
        int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float *scales = p->scales + thread * count;
        for (int64_t row = p->rows * thread / threads; row < p->rows * (thread + 1) / threads; row++)
            kernels[index].dequantize(p, row, scales);
    }
}

/* out = x W^T + bias of many tokens in bfloat16, by kernels that convert to it ("avx512-bf16" or "amx"); every element is
   written. Returns 0, or 1 where memory was short. */
int arb_gemm(const gemm_problem_t *p, int index) {
#if X86
    return gemm(p, !kernels[index].direct);
#else
    (void)p, (void)index;
    return 1;
#endif
}
