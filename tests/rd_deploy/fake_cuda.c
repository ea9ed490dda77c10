/* A stand-in for NVIDIA's driver, so that cuda-core and cuda-bindings themselves can be tested without a GPU.
 *
 * Memory is the host's, work is done at once, and what is put on a stream that is being recorded is kept for the graph.
 * Contexts, addresses and streams are checked as the driver would check them: a wrong one is an error. `fake_live`
 * tells what was not freed, `fake_put` puts work on a stream as TensorRT would. fake_cuda_checks.py uses it.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };
enum { NOT_FOUND = 500, CAPTURE_INVALIDATED = 901 };
enum { MAX = 64, PRIMARY = 0x1001 };

typedef int Result;
typedef uintptr_t Handle;
typedef struct {
    Handle dst, src;
    size_t size;
    void (*function)(void *);
    void *argument;
} Work;
typedef struct {
    void (*destroy)(void *);
    void *argument;
    unsigned count;
} Object; /* what cuda-core hangs on a graph, to be destroyed with the last graph that has it */
typedef struct {
    int used, objects;
    Work work[MAX];
    Object *object[MAX];
} Graph;
typedef struct {
    Handle context;
    int capturing; /* 2: it failed */
    Graph *graph;
} Stream;
typedef struct {
    Handle address, context;
    size_t size;
    int host;
} Block;

static Handle stack[MAX], *top = stack;
static Block blocks[MAX];
static int live, primaries, clock_ms;

int fake_live(void) { return live; }
void fake_enter(Handle context) { *top++ = context; }
void fake_leave(void) { --top; }
int fake_capturing(Handle stream) { return stream > 2 && ((Stream *)stream)->capturing; }
int fake_primaries(void) { return primaries; }
Handle fake_current(void) { return top > stack ? top[-1] : 0; }

static int is_known(Handle address, size_t size) {
    for (int i = 0; i < MAX; ++i)
        if (blocks[i].address && address >= blocks[i].address && address + size <= blocks[i].address + blocks[i].size)
            return 1;
    return 0;
}

static Result allocate(Handle *address, size_t size, int host) {
    if (!fake_current()) return INVALID_CONTEXT;
    if (size > 1 << 24) return OUT_OF_MEMORY;
    for (int i = 0; i < MAX; ++i)
        if (!blocks[i].address) {
            *address = (Handle)aligned_alloc(256, (size + 255) / 256 * 256);
            blocks[i] = (Block){*address, fake_current(), size, host};
            ++live;
            return SUCCESS;
        }
    return OUT_OF_MEMORY;
}

static Result release(Handle address, int host) {
    if (!fake_current()) return INVALID_CONTEXT;
    for (int i = 0; i < MAX; ++i)
        if (blocks[i].address == address && blocks[i].host == host && blocks[i].context == fake_current()) {
            free((void *)address);
            blocks[i].address = 0;
            --live;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

static void do_work(const Work *work) {
    if (work->function)
        work->function(work->argument);
    else
        memcpy((void *)work->dst, (void *)work->src, work->size);
}

static Result put(Handle handle, Work work) {
    if (!fake_current()) return INVALID_CONTEXT;
    if (handle > 2) {
        Stream *stream = (Stream *)handle;
        if (stream->context != fake_current()) return INVALID_HANDLE;
        if (stream->capturing) {
            if (stream->graph->used == MAX) return OUT_OF_MEMORY;
            stream->graph->work[stream->graph->used++] = work;
            return SUCCESS;
        }
    }
    do_work(&work);
    return SUCCESS;
}

Result fake_put(Handle stream, void (*function)(void *), void *argument) {
    return put(stream, (Work){0, 0, 0, function, argument});
}

static Result cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
static Result cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
static Result cuDeviceGetCount(int *count) { return *count = getenv("FAKE_NO_GPU") ? 0 : 2, SUCCESS; }
static Result cuDeviceGet(int *device, int ordinal) { return *device = ordinal, SUCCESS; }
static Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 9 - device : 1;
    return SUCCESS;
}
static Result cuGetErrorName(int error, const char **name) {
    return *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE", SUCCESS;
}
static Result cuGetErrorString(int error, const char **text) { return (void)error, *text = "fake", SUCCESS; }

/* A context's handle says which device it is of: 0x1001 and 0x1002 are the primary ones, 0x2001 is pycuda's. */
static Result cuCtxGetCurrent(Handle *context) { return *context = fake_current(), SUCCESS; }
static Result cuCtxGetDevice(int *device) {
    return fake_current() ? (*device = (int)(fake_current() & 0xf) - 1, SUCCESS) : INVALID_CONTEXT;
}
static Result cuCtxPushCurrent(Handle context) { return context ? (*top++ = context, SUCCESS) : INVALID_CONTEXT; }
static Result cuCtxPopCurrent(Handle *context) { return top > stack ? (*context = *--top, SUCCESS) : INVALID_CONTEXT; }
static Result cuCtxSetCurrent(Handle context) {
    if (top == stack) ++top;
    return top[-1] = context, SUCCESS;
}
static Result cuCtxSynchronize(void) { return fake_current() ? SUCCESS : INVALID_CONTEXT; }
static Result cuCtxGetStreamPriorityRange(int *low, int *high) { return *low = *high = 0, SUCCESS; }
static Result cuDevicePrimaryCtxRetain(Handle *context, int device) {
    return ++primaries, *context = PRIMARY + (Handle)device, SUCCESS;
}
static Result cuDevicePrimaryCtxRelease(int device) { return (void)device, --primaries, SUCCESS; }

static Result cuMemAlloc(Handle *address, size_t size) { return allocate(address, size, 0); }
static Result cuMemFree(Handle address) { return release(address, 0); }
static Result cuMemAllocHost(Handle *address, size_t size) { return allocate(address, size, 1); }
static Result cuMemFreeHost(Handle address) { return release(address, 1); }
static Result cuMemcpyHtoDAsync(Handle dst, Handle src, size_t size, Handle stream) {
    return is_known(dst, size) && is_known(src, size) ? put(stream, (Work){dst, src, size, 0, 0}) : INVALID_VALUE;
}
static Result cuMemcpyDtoHAsync(Handle dst, Handle src, size_t size, Handle stream) {
    return cuMemcpyHtoDAsync(dst, src, size, stream);
}
static Result cuPointerGetAttribute(void *value, int attribute, Handle address) {
    for (int i = 0; i < MAX; ++i)
        if (blocks[i].address && address >= blocks[i].address && address < blocks[i].address + blocks[i].size) {
            if (attribute == 9) *(int *)value = (int)(blocks[i].context & 0xf) - 1;
            if (attribute == 1) *(Handle *)value = blocks[i].context;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

static Result cuStreamCreate(Handle *handle, unsigned flags) {
    if (!fake_current() || flags != 1) return INVALID_CONTEXT;
    Stream *stream = calloc(1, sizeof(Stream));
    stream->context = fake_current();
    ++live;
    return *handle = (Handle)stream, SUCCESS;
}
static Result cuStreamDestroy(Handle stream) { return free((void *)stream), --live, SUCCESS; }
static Result cuStreamGetCtx(Handle stream, Handle *context) {
    return *context = stream > 2 ? ((Stream *)stream)->context : fake_current(), SUCCESS;
}
static Result cuStreamSynchronize(Handle stream) {
    if (stream > 2 && ((Stream *)stream)->capturing) return ((Stream *)stream)->capturing = 2, CAPTURE_INVALIDATED;
    return SUCCESS;
}
static Result cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) {
    return (void)stream, event && !flags ? SUCCESS : INVALID_HANDLE;
}

typedef struct {
    Handle context;
    unsigned flags;
    int ms;
} Event;
static Result cuEventCreate(Handle *handle, unsigned flags) {
    if (!fake_current()) return INVALID_CONTEXT;
    Event *event = calloc(1, sizeof(Event));
    *event = (Event){fake_current(), flags, -1};
    ++live;
    return *handle = (Handle)event, SUCCESS;
}
static Result cuEventDestroy(Handle event) { return free((void *)event), --live, SUCCESS; }
static Result cuEventRecord(Handle handle, Handle stream) {
    Event *event = (Event *)handle;
    Handle context;
    cuStreamGetCtx(stream, &context);
    if (event->context != context) return INVALID_HANDLE;
    if (stream > 2 && ((Stream *)stream)->capturing) return ((Stream *)stream)->capturing = 2, CAPTURE_INVALIDATED;
    return event->ms = clock_ms++, SUCCESS;
}
static Result cuEventSynchronize(Handle event) { return event ? SUCCESS : INVALID_HANDLE; }
static Result cuEventQuery(Handle event) { return event ? SUCCESS : INVALID_HANDLE; }
static Result cuEventElapsedTime(float *ms, Handle from, Handle to) {
    Event *a = (Event *)from, *b = (Event *)to;
    if (((a->flags | b->flags) & 2) || a->ms < 0 || b->ms < 0) return INVALID_HANDLE; /* 2: without times */
    return *ms = (float)(b->ms - a->ms), SUCCESS;
}

static Result cuStreamBeginCapture(Handle handle, int mode) {
    Stream *stream = (Stream *)handle;
    if (handle <= 2 || stream->capturing || mode != 1) return INVALID_VALUE; /* 1: of this thread */
    stream->capturing = 1;
    stream->graph = calloc(1, sizeof(Graph));
    ++live;
    return SUCCESS;
}
static Result cuStreamGetCaptureInfo(Handle handle, int *status, uint64_t *id, Handle *graph, const Handle **nodes,
                                     const void **edges, size_t *count) {
    Stream *stream = (Stream *)handle;
    *status = stream->capturing;
    if (id) *id = 1;
    if (graph) *graph = (Handle)stream->graph;
    if (nodes) *nodes = 0;
    if (edges) *edges = 0;
    if (count) *count = 0;
    return SUCCESS;
}
static Result cuStreamGetCaptureInfo_v2(Handle stream, int *status, uint64_t *id, Handle *graph, const Handle **nodes,
                                        size_t *count) { /* that of CUDA before 12.3 */
    return cuStreamGetCaptureInfo(stream, status, id, graph, nodes, 0, count);
}
static Result cuStreamIsCapturing(Handle stream, int *status) {
    return *status = stream > 2 ? ((Stream *)stream)->capturing : 0, SUCCESS;
}
static Result cuStreamEndCapture(Handle handle, Handle *graph) {
    Stream *stream = (Stream *)handle;
    int state = stream->capturing;
    stream->capturing = 0;
    if (graph) *graph = state == 1 ? (Handle)stream->graph : 0;
    return state == 1 ? SUCCESS : CAPTURE_INVALIDATED;
}
static Result cuUserObjectCreate(Handle *object, void *argument, void (*destroy)(void *), unsigned count,
                                 unsigned flags) {
    (void)flags;
    Object *made = malloc(sizeof(Object));
    *made = (Object){destroy, argument, count};
    return *object = (Handle)made, SUCCESS;
}
static Result cuUserObjectRetain(Handle object, unsigned count) { return ((Object *)object)->count += count, SUCCESS; }
static Result cuUserObjectRelease(Handle handle, unsigned count) {
    Object *object = (Object *)handle;
    object->count -= count;
    if (!object->count) {
        object->destroy(object->argument);
        free(object);
    }
    return SUCCESS;
}
static Result cuGraphRetainUserObject(Handle handle, Handle object, unsigned count, unsigned flags) {
    Graph *graph = (Graph *)handle;
    if (!(flags & 1)) cuUserObjectRetain(object, count); /* 1: the caller's references become the graph's */
    for (unsigned i = 0; i < count; ++i) graph->object[graph->objects++] = (Object *)object;
    return SUCCESS;
}
static Result cuGraphReleaseUserObject(Handle handle, Handle object, unsigned count) {
    Graph *graph = (Graph *)handle;
    for (int i = 0; i < graph->objects && count; ++i)
        if ((Handle)graph->object[i] == object) {
            graph->object[i--] = graph->object[--graph->objects];
            cuUserObjectRelease(object, 1);
            --count;
        }
    return SUCCESS;
}
static Result cuGraphDestroy(Handle handle) {
    Graph *graph = (Graph *)handle;
    for (int i = 0; i < graph->objects; ++i) cuUserObjectRelease((Handle)graph->object[i], 1);
    return free(graph), --live, SUCCESS;
}
static Result cuGraphInstantiate(Handle *exec, Handle graph, unsigned long long flags) {
    (void)flags;
    Graph *copy = malloc(sizeof(Graph));
    memcpy(copy, (void *)graph, sizeof(Graph));
    for (int i = 0; i < copy->objects; ++i) cuUserObjectRetain((Handle)copy->object[i], 1);
    ++live;
    return *exec = (Handle)copy, SUCCESS;
}
typedef struct {
    uint64_t flags;
    Handle stream, node;
    int result;
} Parameters;
static Result cuGraphInstantiateWithParams(Handle *exec, Handle graph, Parameters *parameters) {
    parameters->result = 0;
    return cuGraphInstantiate(exec, graph, 0);
}
static Result cuGraphExecDestroy(Handle exec) { return cuGraphDestroy(exec); }
static Result cuGraphLaunch(Handle exec, Handle stream) {
    if (!fake_current()) return INVALID_CONTEXT;
    if (stream > 2 && ((Stream *)stream)->context != fake_current()) return INVALID_HANDLE;
    for (int i = 0; i < ((Graph *)exec)->used; ++i) do_work(&((Graph *)exec)->work[i]);
    return SUCCESS;
}

static Result cuGetProcAddress(const char *name, void **function, int version, uint64_t flags, int *status);
#define ENTRY(name) {#name, (void *)name}
static const struct {
    const char *name;
    void *function;
} TABLE[] = {
    ENTRY(cuInit),
    ENTRY(cuDriverGetVersion),
    ENTRY(cuDeviceGetCount),
    ENTRY(cuDeviceGet),
    ENTRY(cuDeviceGetAttribute),
    ENTRY(cuGetErrorName),
    ENTRY(cuGetErrorString),
    ENTRY(cuCtxGetCurrent),
    ENTRY(cuCtxGetDevice),
    ENTRY(cuCtxPushCurrent),
    ENTRY(cuCtxPopCurrent),
    ENTRY(cuCtxSetCurrent),
    ENTRY(cuCtxSynchronize),
    ENTRY(cuCtxGetStreamPriorityRange),
    ENTRY(cuDevicePrimaryCtxRetain),
    ENTRY(cuDevicePrimaryCtxRelease),
    ENTRY(cuMemAlloc),
    ENTRY(cuMemFree),
    ENTRY(cuMemAllocHost),
    ENTRY(cuMemFreeHost),
    ENTRY(cuMemcpyHtoDAsync),
    ENTRY(cuMemcpyDtoHAsync),
    ENTRY(cuPointerGetAttribute),
    ENTRY(cuStreamCreate),
    ENTRY(cuStreamDestroy),
    ENTRY(cuStreamGetCtx),
    ENTRY(cuStreamSynchronize),
    ENTRY(cuStreamWaitEvent),
    ENTRY(cuEventCreate),
    ENTRY(cuEventDestroy),
    ENTRY(cuEventRecord),
    ENTRY(cuEventSynchronize),
    ENTRY(cuEventQuery),
    ENTRY(cuEventElapsedTime),
    ENTRY(cuStreamBeginCapture),
    ENTRY(cuStreamGetCaptureInfo),
    ENTRY(cuStreamIsCapturing),
    ENTRY(cuStreamEndCapture),
    ENTRY(cuGraphDestroy),
    ENTRY(cuGraphInstantiate),
    ENTRY(cuGraphInstantiateWithParams),
    ENTRY(cuGraphExecDestroy),
    ENTRY(cuGraphLaunch),
    ENTRY(cuUserObjectCreate),
    ENTRY(cuUserObjectRetain),
    ENTRY(cuUserObjectRelease),
    ENTRY(cuGraphRetainUserObject),
    ENTRY(cuGraphReleaseUserObject),
    ENTRY(cuGetProcAddress),
};

static Result cuGetProcAddress(const char *name, void **function, int version, uint64_t flags, int *status) {
    (void)flags;
    *function = 0;
    for (size_t i = 0; i < sizeof(TABLE) / sizeof(TABLE[0]); ++i)
        if (!strcmp(TABLE[i].name, name)) *function = TABLE[i].function;
    if (!strcmp(name, "cuStreamGetCaptureInfo") && version < 12030) *function = (void *)cuStreamGetCaptureInfo_v2;
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

Result cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    return cuGetProcAddress(name, function, version, flags, status);
}
