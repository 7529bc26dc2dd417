/* Many tokens in bfloat16, on the matrix unit of recent Intel processors (AMX) or by AVX-512's products of pairs:
   y = x W^T + bias.

   W is dequantized a block of rows and columns at a time, straight into tiles of the unit, and meets every token while
   it is in the second-level cache; it is never written to memory. x is packed into tiles once. Sums are float32, in one
   order for every row and token: results depend neither on the threads nor on the other tokens of a batch. */

#define GEMM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
#define GEMM_AMX_TARGET \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
/* A block of W is 512 KiB of bfloat16 and the sums of its rows at most 1 MiB, beside each other in a second-level cache of
   2 MiB. At 4096 x 4096 and 512 tokens half the rows or half the columns take 9 and 4 % longer, twice the columns 4 %. */
#define GEMM_ROWS 256
#define GEMM_DEPTH 1024
#define GEMM_TOKENS 1024
#define STEP 32          /* columns of a tile of the matrix unit */
#define TILE_VALUES 512  /* 16 rows x 32 bfloat16, or 16 x 16 float32 of twice the bytes */

/* One token in the order of the packing tiles, `lanes` columns to a bit. */
static void gemm_order(const gemm_problem_t *p, int64_t token, int lanes, uint16_t *to) {
    const uint16_t *x = p->x + token * p->columns;
    const int64_t whole = p->columns / (8 * lanes) * (8 * lanes), left = p->columns - whole;
    uint16_t last[MAX_TILE];
    if (!p->permutation) {
        memcpy(to, x, whole * sizeof *to);
        memcpy(last, x + whole, left * sizeof *last);
    } else if (p->permutation_bytes == 2) {
        const int16_t *from = p->permutation;
        for (int64_t k = 0; k < whole; k++) to[k] = x[from[k]];
        for (int64_t k = 0; k < left; k++) last[k] = x[from[whole + k]];
    } else {
        const int32_t *from = p->permutation;
        for (int64_t k = 0; k < whole; k++) to[k] = x[from[k]];
        for (int64_t k = 0; k < left; k++) last[k] = x[from[whole + k]];
    }
    if (!left) return;
    memset(to + whole, 0, 8 * lanes * sizeof *to);
    const int64_t bytes = (left + 7) / 8;
    for (int64_t k = 0; k < left; k++) to[whole + k / bytes * lanes + k % bytes] = last[k];
}

/* 16 tokens as tiles: pairs of columns, and beside each other the tokens. `rows` has room for 16 tokens. */
static GEMM_TARGET void gemm_pack(const gemm_problem_t *p, int64_t first, int64_t padded, int lanes, uint16_t *rows,
                                  uint16_t *to) {
    const int64_t stride = padded + STEP; /* rows at a multiple of 4096 bytes would push each other out of the cache */
    for (int i = 0; i < 16; i++) {
        if (first + i < p->m)
            gemm_order(p, first + i, lanes, rows + i * stride);
        else
            memset(rows + i * stride, 0, padded * sizeof *rows);
    }
    const __m512i index = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32((int)(stride / 2)));
    for (int64_t pair = 0; pair < padded / 2; pair++)
        _mm512_storeu_si512(to + pair * 32, _mm512_i32gather_epi32(index, rows + pair * 2, 4));
}

/* Packing tiles `from` to `to` of one row in bfloat16: 64 bytes in each tile of the matrix unit. */
ALWAYS_INLINE GEMM_TARGET void gemm_expand_tiles(const dequantize_problem_t *p, int64_t row, int64_t from, int64_t to,
                                                 const float *scales, int lanes, int terms, uint16_t *out) {
    const int64_t first_block = from / p->tiles_per_block;
    for (int64_t i = from; i < to; i++) {
        const float *row_scales = scales + (i / p->tiles_per_block - first_block) * p->row_scales;
        __m512 sum[8];
        tile_values_bfloat(p, row, i, row_scales, terms, sum);
        if (lanes == 16) {
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++, out += TILE_VALUES)
                _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(sum[2 * s + 1], sum[2 * s]));
        } else {
            uint16_t *at = out;
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                _mm_storeu_si128((__m128i *)(at + j % 4 * 8), _mm256_castsi256_si128((__m256i)_mm512_cvtneps_pbh(sum[j])));
                if (j == 3) at += TILE_VALUES;
            }
            out += 2 * TILE_VALUES;
        }
    }
}

/* sums[a][b] += the products of tiles of 16 rows with tiles of 16 tokens: two of the rows and one or two of tokens. */
typedef void (*gemm_tiles_t)(const uint16_t *rows, int64_t rows_apart, const uint16_t *tokens, int64_t tokens_apart,
                             int64_t steps, float *sums, int first, int pair, const uint16_t *ahead,
                             int64_t ahead_lines);

ALWAYS_INLINE GEMM_AMX_TARGET void gemm_tiles_amx_sized(const uint16_t *rows, int64_t rows_apart, const uint16_t *tokens,
                                                        int64_t tokens_apart, int64_t steps, float *sums, int first,
                                                        int pair, const uint16_t *ahead, int64_t ahead_lines) {
    if (first) {
        _tile_zero(0);
        _tile_zero(2);
        if (pair) {
            _tile_zero(1);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(2, sums + 512, 64);
        if (pair) {
            _tile_loadd(1, sums + 256, 64);
            _tile_loadd(3, sums + 768, 64);
        }
    }
    for (int64_t s = 0; s < steps; s++) {
        for (int64_t i = 0; i < ahead_lines; i++) __builtin_prefetch(ahead + s * TILE_VALUES + i * 32, 0, 2);
        _tile_loadd(6, tokens + s * TILE_VALUES, 64);
        _tile_loadd(4, rows + s * TILE_VALUES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, rows + rows_apart + s * TILE_VALUES, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (!pair) continue;
        _tile_loadd(7, tokens + tokens_apart + s * TILE_VALUES, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 512, 64);
    if (pair) {
        _tile_stored(1, sums + 256, 64);
        _tile_stored(3, sums + 768, 64);
    }
}

static GEMM_AMX_TARGET void gemm_tiles_amx(const uint16_t *rows, int64_t rows_apart, const uint16_t *tokens,
                                           int64_t tokens_apart, int64_t steps, float *sums, int first, int pair,
                                           const uint16_t *ahead, int64_t ahead_lines) {
    if (pair)
        gemm_tiles_amx_sized(rows, rows_apart, tokens, tokens_apart, steps, sums, first, 1, ahead, ahead_lines);
    else
        gemm_tiles_amx_sized(rows, rows_apart, tokens, tokens_apart, steps, sums, first, 0, ahead, ahead_lines);
}

/* `count` of 16 rows with one or two tiles of tokens, which have a lane each: a pair of a row's columns is repeated over
   them. */
ALWAYS_INLINE GEMM_TARGET void gemm_rows_bfloat(const uint16_t *rows, const uint16_t *tokens, int64_t tokens_apart,
                                                int64_t steps, float *sums, int first, int count, int pair,
                                                const uint16_t *ahead, int64_t ahead_lines) {
    __m512 sum[2][16];
#pragma GCC unroll 16
    for (int r = 0; r < count; r++)
#pragma GCC unroll 2
        for (int b = 0; b <= pair; b++)
            sum[b][r] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + b * 256 + r * 16);
    for (int64_t s = 0; s < steps; s++, rows += TILE_VALUES, tokens += TILE_VALUES, ahead += TILE_VALUES) {
        for (int64_t i = 0; i < ahead_lines; i++) __builtin_prefetch(ahead + i * 32, 0, 2);
        for (int k = 0; k < STEP; k += 2) {
            const __m512bh one = (__m512bh)_mm512_loadu_si512(tokens + k * 16);
            const __m512bh other = pair ? (__m512bh)_mm512_loadu_si512(tokens + tokens_apart + k * 16) : one;
#pragma GCC unroll 16
            for (int r = 0; r < count; r++) {
                int32_t columns;
                memcpy(&columns, rows + r * STEP + k, sizeof columns);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(columns);
                sum[0][r] = _mm512_dpbf16_ps(sum[0][r], one, both);
                if (pair) sum[1][r] = _mm512_dpbf16_ps(sum[1][r], other, both);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < count; r++)
#pragma GCC unroll 2
        for (int b = 0; b <= pair; b++) _mm512_storeu_ps(sums + b * 256 + r * 16, sum[b][r]);
}

static GEMM_TARGET void gemm_tiles_bfloat(const uint16_t *rows, int64_t rows_apart, const uint16_t *tokens,
                                          int64_t tokens_apart, int64_t steps, float *sums, int first, int pair,
                                          const uint16_t *ahead, int64_t ahead_lines) {
    for (int a = 0; a < 2; a++, rows += rows_apart, sums += 512, ahead_lines = 0) {
        if (!pair) {
            gemm_rows_bfloat(rows, tokens, tokens_apart, steps, sums, first, 16, 0, ahead, ahead_lines);
            continue;
        }
        gemm_rows_bfloat(rows, tokens, tokens_apart, steps, sums, first, 8, 1, ahead, ahead_lines);
        gemm_rows_bfloat(rows + 8 * STEP, tokens, tokens_apart, steps, sums + 128, first, 8, 1, ahead, 0);
    }
}

/* Sums of 32 rows for tokens 0 to `tokens` to out[first + token, start + row], rounded once. */
static GEMM_TARGET void gemm_store(const gemm_problem_t *p, int64_t start, int64_t first, int64_t tokens,
                                   const float *sums) {
    const __m512i index = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(16));
    for (int half = 0; half < 2; half++) {
        const int64_t row = start + half * 16, left = p->weight.rows - row;
        if (left <= 0) return;
        const int64_t count = left < 16 ? left : 16;
        const __mmask16 kept = (__mmask16)((1u << count) - 1);
        float bias[16] = {0};
        if (p->bias) load_floats(p->bias, p->bias_type, row, count, bias);
        const __m512 added = _mm512_loadu_ps(bias);
        for (int64_t m = 0; m < tokens; m++) {
            const float *from = sums + m / 32 * 1024 + half * 512 + m % 32 / 16 * 256 + m % 16;
            __m512 value = _mm512_add_ps(_mm512_i32gather_ps(index, from, 4), added);
            _mm256_mask_storeu_epi16(p->out + (first + m) * p->weight.rows + row, kept, (__m256i)_mm512_cvtneps_pbh(value));
        }
    }
}

/* Rows `start` to `stop` (a multiple of 32 apart, but for the last) for the packed tokens of the chunk. */
static GEMM_TARGET void gemm_block(const gemm_problem_t *p, gemm_tiles_t multiply, int64_t start, int64_t stop,
                                   int64_t first, int64_t tokens, const uint16_t *x, int lanes, uint16_t *block,
                                   float *sums, float *scales) {
    const dequantize_problem_t *w = &p->weight;
    const int64_t tile_steps = lanes / 4, steps = w->tiles * tile_steps, depth = GEMM_DEPTH / (8 * lanes);
    const int64_t panels = (stop - start + 31) / 32, groups = (tokens + 15) / 16, wide = (groups + 1) / 2;
    for (int64_t from = 0; from < w->tiles; from += depth) {
        const int64_t to = from + depth < w->tiles ? from + depth : w->tiles, count = (to - from) * tile_steps;
        const int64_t first_block = from / w->tiles_per_block, last_block = (to - 1) / w->tiles_per_block;
        for (int64_t i = 0; i < panels * 32; i++) { /* rows past the last repeat it */
            const int64_t row = start + i < w->rows ? start + i : w->rows - 1;
            uint16_t *at = block + i / 16 * count * TILE_VALUES + i % 16 * STEP;
            load_floats(w->row_scale, w->row_scale_type, (row * w->blocks + first_block) * w->row_scales,
                        (last_block - first_block + 1) * w->row_scales, scales);
            if (lanes == 16 && w->term_count == 1)
                gemm_expand_tiles(w, row, from, to, scales, 16, 1, at);
            else if (lanes == 16)
                gemm_expand_tiles(w, row, from, to, scales, 16, w->term_count, at);
            else
                gemm_expand_tiles(w, row, from, to, scales, 8, w->term_count, at);
        }
        for (int64_t g = 0; g < wide; g++) {
            const uint16_t *columns = x + (g * 2 * steps + from * tile_steps) * TILE_VALUES;
            /* the next tokens are far away: each panel fetches a few lines of each of their tiles */
            const int64_t lines = panels < 2 ? 16 : (32 + panels - 1) / panels;
            for (int64_t panel = 0; panel < panels; panel++) {
                const uint16_t *rows = block + panel * 2 * count * TILE_VALUES;
                float *sum = sums + (panel * wide + g) * 1024;
                const int64_t line = panel * lines, apart = steps * TILE_VALUES;
                const uint16_t *ahead = columns + (line < 16 ? 2 : 3) * apart + line % 16 * 32;
                const int64_t fetched = g + 1 < wide && line < 32 ? lines : 0;
                multiply(rows, count * TILE_VALUES, columns, apart, count, sum, !from, g * 2 + 1 < groups, ahead, fetched);
            }
        }
    }
    for (int64_t panel = 0; panel < panels; panel++)
        gemm_store(p, start + panel * 32, first, tokens, sums + panel * wide * 1024);
}

/* All of a problem. Returns 0, or 1 where memory was short. */
static int gemm(const gemm_problem_t *p, int amx) {
    const dequantize_problem_t *w = &p->weight;
    const int lanes = w->tile_bytes, threads = w->threads;
    const int64_t padded = w->tiles * 8 * lanes, chunk = p->m < GEMM_TOKENS ? p->m : GEMM_TOKENS;
    const int64_t groups = (chunk + 15) / 16, panels = (w->rows + 31) / 32;
    const int64_t x_bytes = align64(groups * 16 * padded * 2);
    const int64_t order_bytes = align64(16 * (padded + STEP) * 2), block_bytes = GEMM_ROWS * GEMM_DEPTH * 2;
    const int64_t sums_bytes = GEMM_ROWS * (groups + 1) / 2 * 32 * sizeof(float);
    const int64_t scales_bytes = align64((GEMM_DEPTH / (8 * lanes) + 1) * w->row_scales * sizeof(float));
    const int64_t rows_bytes = block_bytes + sums_bytes + scales_bytes;
    const int64_t thread_bytes = rows_bytes > order_bytes ? rows_bytes : order_bytes;
    uint8_t *memory = malloc(64 + x_bytes + threads * thread_bytes);
    if (!memory) return 1;
    uint16_t *x = (uint16_t *)align64((intptr_t)memory);
    for (int64_t first = 0; first < p->m; first += chunk) {
        const int64_t tokens = p->m - first < chunk ? p->m - first : chunk;
#pragma omp parallel num_threads(threads)
        {
            const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
            uint8_t *scratch = (uint8_t *)x + x_bytes + thread * thread_bytes;
            const int64_t last_group = (tokens + 15) / 16 * (thread + 1) / team;
            for (int64_t g = (tokens + 15) / 16 * thread / team; g < last_group; g++)
                gemm_pack(p, first + g * 16, padded, lanes, (uint16_t *)scratch, x + g * 16 * padded);
#pragma omp barrier
            if (amx) amx_start();
            const int64_t last = panels * (thread + 1) / team * 32;
            for (int64_t start = panels * thread / team * 32; start < last; start += GEMM_ROWS)
                gemm_block(p, amx ? gemm_tiles_amx : gemm_tiles_bfloat, start,
                           start + GEMM_ROWS < last ? start + GEMM_ROWS : last, first, tokens, x, lanes,
                           (uint16_t *)scratch, (float *)(scratch + block_bytes),
                           (float *)(scratch + block_bytes + sums_bytes));
            if (amx) amx_stop();
        }
    }
    free(memory);
    return 0;
}
