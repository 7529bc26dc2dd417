/* Launches compiled kernels whose parameters are known but for a few addresses: one call for all launches of a product.
 *
 * A plain object without headers of Python, torch or CUDA, loaded through ctypes by native_launch.py. What it needs of
 * the driver's interface is declared here as in cuda.h of CUDA 12 and looked up in the library when it is opened.
 */

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    MAX_BLOCK = 16384, /* bytes of the parameters of all launches of a plan: 4400 of three products of four launches */
    MAX_PARAMS = 64,  /* of one launch */
    MAX_ATTRIBUTES = 4
};

/* of cuda.h */

typedef struct {
    uint32_t id;
    char pad[4];
    union {
        char pad[64];
        uint32_t words[3];
    } value;
} cuda_attribute_t;

typedef struct {
    uint32_t grid[3], block[3], shared;
    void *stream;
    cuda_attribute_t *attributes;
    uint32_t attribute_count;
} cuda_config_t;

typedef struct {
    _Alignas(64) uint64_t opaque[16];
} cuda_tensor_map_t;

static int (*launch_kernel)(const cuda_config_t *config, void *function, void **params, void **extra);
static int (*replace_address)(cuda_tensor_map_t *map, void *address);
static int (*error_string)(int code, const char **text);
static int (*get_context)(void **context);
static int (*set_context)(void *context);
static int (*get_device)(int *device, int ordinal);
static int (*retain_context)(void **context, int device);

/* of native_launch.py, field by field */

typedef struct {
    uint32_t id, words[3];
} attribute_t;

typedef struct {
    void *function;
    uint32_t grid[3], threads, shared, first_param, param_count, attribute_count;
    attribute_t attributes[MAX_ATTRIBUTES];
} launch_t;

typedef struct {
    uint64_t offset;      /* bytes from the address of the run */
    uint32_t at, address; /* where in the block it goes, and which of the six addresses of a run it is */
    uint32_t is_map;      /* whether a tensor map lies there, which is to describe this address */
    uint32_t unused;
} patch_t;

typedef struct {
    const unsigned char *block; /* the parameters of all launches */
    const uint32_t *params;     /* where in the block each one lies */
    const launch_t *launches;
    const patch_t *patches;
    uint32_t block_size, launch_count, patch_count;
    int32_t device;
} plan_t;

static int find(void *library, const char *name, void *function) {
    void *found = dlsym(library, name);
    memcpy(function, &found, sizeof found);
    return found != NULL;
}

/* Opens the driver's library; returns 0, or 1 where there is none that has what is needed. */
int arb_open(const char *path) {
    void *library = dlopen(path, RTLD_LAZY);
    if (!library) return 1;
    return !(find(library, "cuLaunchKernelEx", &launch_kernel) &&
             find(library, "cuTensorMapReplaceAddress", &replace_address) &&
             find(library, "cuGetErrorString", &error_string) &&
             find(library, "cuCtxGetCurrent", &get_context) && find(library, "cuCtxSetCurrent", &set_context) &&
             find(library, "cuDeviceGet", &get_device) && find(library, "cuDevicePrimaryCtxRetain", &retain_context));
}

/* What the driver says of an error that one of these functions returned. */
const char *arb_error(int code) {
    const char *text = NULL;
    if (error_string(code, &text) || !text) return "unknown error";
    return text;
}

/* Gives the map in these 128 bytes another address. */
int arb_move_map(void *map, void *address) {
    cuda_tensor_map_t moved;
    memcpy(&moved, map, sizeof moved);
    const int code = replace_address(&moved, address);
    if (!code) memcpy(map, &moved, sizeof moved);
    return code;
}

/* A thread that has not used the device yet has no context. */
static int ensure_context(int ordinal) {
    void *context = NULL;
    int code = get_context(&context), device;
    if (code || context) return code;
    if ((code = get_device(&device, ordinal))) return code;
    if ((code = retain_context(&context, device))) return code;
    return set_context(context);
}

/* Queues the launches of a plan, in order, with these six addresses in its parameters. Several threads may use one plan.
 * Returns the driver's first error, or 0. */
int arb_launch_at(const plan_t *plan, void *stream, const uint64_t *addresses) {
    _Alignas(128) unsigned char block[MAX_BLOCK];
    int code = ensure_context(plan->device);
    if (code) return code;
    memcpy(block, plan->block, plan->block_size);
    for (uint32_t i = 0; i < plan->patch_count; ++i) {
        const patch_t *patch = &plan->patches[i];
        const uint64_t address = addresses[patch->address] + patch->offset;
        if (!patch->is_map)
            memcpy(block + patch->at, &address, sizeof address);
        else if ((code = replace_address((cuda_tensor_map_t *)(block + patch->at), (void *)(uintptr_t)address)))
            return code;
    }
    for (uint32_t i = 0; i < plan->launch_count; ++i) {
        const launch_t *launch = &plan->launches[i];
        cuda_attribute_t attributes[MAX_ATTRIBUTES];
        void *params[MAX_PARAMS];
        memset(attributes, 0, launch->attribute_count * sizeof *attributes);
        for (uint32_t j = 0; j < launch->attribute_count; ++j) {
            attributes[j].id = launch->attributes[j].id;
            memcpy(attributes[j].value.words, launch->attributes[j].words, sizeof launch->attributes[j].words);
        }
        for (uint32_t j = 0; j < launch->param_count; ++j) params[j] = block + plan->params[launch->first_param + j];
        const cuda_config_t config = {
            {launch->grid[0], launch->grid[1], launch->grid[2]}, {launch->threads, 1, 1}, launch->shared, stream,
            attributes, launch->attribute_count};
        if ((code = launch_kernel(&config, launch->function, params, NULL))) return code;
    }
    return 0;
}

/* The same for one product. */
int arb_launch(const plan_t *plan, void *stream, uint64_t x, uint64_t out, uint64_t extra, uint64_t scratch) {
    const uint64_t addresses[6] = {x, out, extra, scratch, 0, 0};
    return arb_launch_at(plan, stream, addresses);
}

/* The same for up to three products of one input, each of which has a result of its own. */
int arb_launch_group(const plan_t *plan, void *stream, uint64_t x, uint64_t scratch, uint64_t first, uint64_t second,
                     uint64_t third) {
    const uint64_t addresses[6] = {x, first, 0, scratch, second, third};
    return arb_launch_at(plan, stream, addresses);
}

/* The most that a plan may hold: bytes of its block, parameters and attributes of a launch. */
void arb_limits(uint32_t *block, uint32_t *params, uint32_t *attributes) {
    *block = MAX_BLOCK;
    *params = MAX_PARAMS;
    *attributes = MAX_ATTRIBUTES;
}
