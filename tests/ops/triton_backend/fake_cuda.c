/* A driver that launches nothing and keeps what it was asked for: as much of libcuda.so.1 as Triton and launch.c use. */

#include <stdint.h>
#include <string.h>

enum { MOST_LAUNCHES = 1024, MOST_FUNCTIONS = 256, MOST_PARAMS = 64, MOST_BYTES = 4096 };

typedef struct {
    uint32_t id;
    char pad[4];
    char value[64];
} attribute_t;

typedef struct {
    uint32_t grid[3], block[3], shared;
    void *stream;
    attribute_t *attributes;
    uint32_t attribute_count;
} config_t;

typedef struct {
    uint64_t function, stream;
    uint32_t grid[3], block[3], shared, attribute_count, param_count;
    attribute_t attributes[8];
    unsigned char params[MOST_BYTES]; /* one after another */
} record_t;

static record_t records[MOST_LAUNCHES];
static int record_count, function_count, next_error, contexts_set, replaced, version = 13000, keeps_flags = 1;
static uint64_t context = 1;
static uint32_t sizes[MOST_FUNCTIONS][MOST_PARAMS], counts[MOST_FUNCTIONS];

/* for the tests */

void fake_expect(uint64_t function, uint32_t count, const uint32_t *bytes) {
    counts[function] = count;
    memcpy(sizes[function], bytes, count * sizeof *bytes);
}
const record_t *fake_records(void) { return records; }
int fake_count(void) { return record_count; }
int fake_contexts_set(void) { return contexts_set; }
int fake_replaced(void) { return replaced; }
void fake_reset(void) { record_count = contexts_set = replaced = 0; }
void fake_error(int code) { next_error = code; }
void fake_context(uint64_t current) { context = current; }
void fake_version(int number) { version = number; }
void fake_keeps_flags(int keeps) { keeps_flags = keeps; }

/* the driver's */

int cuLaunchKernelEx(const config_t *config, void *function, void **params, void **extra) {
    const uint64_t number = (uint64_t)function;
    if (next_error) return next_error;
    if (extra || number >= MOST_FUNCTIONS || record_count == MOST_LAUNCHES) return 1;
    record_t *record = &records[record_count++];
    memset(record, 0, sizeof *record);
    record->function = number;
    record->stream = (uint64_t)config->stream;
    memcpy(record->grid, config->grid, sizeof record->grid);
    memcpy(record->block, config->block, sizeof record->block);
    record->shared = config->shared;
    record->attribute_count = config->attribute_count;
    for (uint32_t i = 0; i < config->attribute_count; ++i) {
        record->attributes[i] = config->attributes[i];
        memset(record->attributes[i].pad, 0, sizeof record->attributes[i].pad);
    }
    record->param_count = counts[number];
    unsigned char *to = record->params;
    for (uint32_t i = 0; i < counts[number]; ++i) {
        const uint32_t bytes = sizes[number][i];
        if ((uint64_t)params[i] % (bytes == 128 ? 64 : bytes)) return 1;
        memcpy(to, params[i], bytes);
        to += bytes;
    }
    return 0;
}

enum { SMALL_TENSOR_FLAG = 1 << 21 }; /* which Triton 3.7 and later take from maps of tensors of less than 128 KiB */

typedef struct {
    uint64_t address, flags, sizes[3], strides[2];
    uint32_t box[3], steps[3], type, rank, interleave, swizzle, l2_promotion, fill;
    char rest[128 - 7 * 8 - 12 * 4];
} map_t;

int cuTensorMapEncodeTiled(map_t *map, int type, uint32_t rank, void *address, const uint64_t *of, const uint64_t *strides,
                           const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int l2_promotion,
                           int fill) {
    if (rank > 3 || !address || (uint64_t)address % 16 || (uint64_t)map % 64) return 1;
    memset(map, 0, sizeof *map);
    map->address = (uint64_t)address;
    map->flags = SMALL_TENSOR_FLAG;
    memcpy(map->sizes, of, rank * 8);
    memcpy(map->strides, strides, (rank - 1) * 8);
    memcpy(map->box, box, rank * 4);
    memcpy(map->steps, steps, rank * 4);
    map->type = type, map->rank = rank, map->interleave = interleave, map->swizzle = swizzle;
    map->l2_promotion = l2_promotion, map->fill = fill;
    return 0;
}

int cuTensorMapReplaceAddress(map_t *map, void *address) {
    if (!address || (uint64_t)address % 16 || (uint64_t)map % 64) return 1;
    map->address = (uint64_t)address;
    if (!keeps_flags) map->flags |= SMALL_TENSOR_FLAG;
    ++replaced;
    return 0;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == 700 ? "an illegal memory access was encountered" : "invalid argument";
    return 0;
}

int cuDriverGetVersion(int *found) {
    *found = version;
    return 0;
}
int cuModuleUnload(void *module) {
    (void)module;
    return 0;
}
int cuCtxGetDevice(int *found) {
    *found = 0;
    return 0;
}
int cuStreamIsCapturing(void *stream, int *found) {
    (void)stream;
    *found = 0;
    return 0;
}
int cuCtxGetCurrent(void **found) {
    *found = (void *)context;
    return 0;
}
int cuCtxSetCurrent(void *found) {
    context = (uint64_t)found;
    ++contexts_set;
    return 0;
}
int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal + 100;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **found, int device) {
    *found = (void *)(uint64_t)(device + 1000);
    return 0;
}
int cuPointerGetAttribute(uint64_t *found, int attribute, uint64_t pointer) {
    (void)attribute;
    *found = pointer;
    return 0;
}
int cuDeviceGetAttribute(int *found, int attribute, int device) {
    (void)attribute, (void)device;
    *found = 232448; /* bytes of shared memory */
    return 0;
}
int cuModuleLoadData(void **module, const void *data) {
    (void)data;
    *module = (void *)1;
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module, (void)name;
    *function = (void *)(uint64_t)++function_count;
    return 0;
}
int cuFuncGetAttribute(int *found, int attribute, void *function) {
    (void)function;
    *found = attribute == 0 ? 1024 : 32; /* threads of a program */
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    (void)function, (void)attribute, (void)value;
    return 0;
}
int cuCtxGetLimit(uint64_t *value, int limit) {
    (void)limit;
    *value = 0;
    return 0;
}
int cuCtxSetLimit(int limit, uint64_t value) {
    (void)limit, (void)value;
    return 0;
}
int cuFuncSetCacheConfig(void *function, int config) {
    (void)function, (void)config;
    return 0;
}
