/* Runs calls of native.c that come through a pipe, and answers with what they wrote: for the emulator of a processor.

A call: 0 (arb_linear) or 1 (arb_dequantize), the index of the kernels, the bytes of the structure, the number of its
pointers; for each its offset in the structure, its bytes, whether it is read (then its content follows); the offset of
the one whose content is the answer. Numbers are int64. At the start stand the names of the kernels of this processor. */
#include "native.c"

#include <stdio.h>
#include <stdlib.h>

static int64_t number(void) {
    int64_t value;
    if (fread(&value, sizeof value, 1, stdin) != 1) exit(0);
    return value;
}

static void content(void *to, int64_t size) {
    if (size && fread(to, 1, size, stdin) != (size_t)size) exit(2);
}

int main(void) {
    for (int index = 0; index < arb_kernel_count(); index++)
        if (arb_supported(index)) printf("%s ", arb_kernel_name(index));
    printf("\n");
    fflush(stdout);
    for (;;) {
        int64_t function = number(), index = number(), size = number();
        char *structure = calloc(1, size);
        content(structure, size);
        int64_t count = number(), sizes[32];
        void *blocks[32], *answer = NULL;
        if (count > 32 || size != (int64_t)(function ? sizeof(dequantize_problem_t) : sizeof(problem_t))) exit(3);
        for (int i = 0; i < count; i++) {
            int64_t offset = number();
            sizes[i] = number();
            blocks[i] = aligned_alloc(64, (sizes[i] + 127) / 64 * 64);
            memset(blocks[i], 0xff, sizes[i]);
            if (number()) content(blocks[i], sizes[i]);
            memcpy(structure + offset, blocks + i, sizeof(void *));
        }
        int64_t wanted = number(), failed = 0, bytes = 0;
        for (int i = 0; i < count; i++) {
            void *at;
            memcpy(&at, structure + wanted, sizeof at);
            if (blocks[i] == at) answer = at, bytes = sizes[i];
        }
        if (function) arb_dequantize((dequantize_problem_t *)structure, index);
        else failed = arb_linear((problem_t *)structure, index);
        fwrite(&failed, sizeof failed, 1, stdout);
        fwrite(answer, 1, bytes, stdout);
        fflush(stdout);
        for (int i = 0; i < count; i++) free(blocks[i]);
        free(structure);
    }
}
