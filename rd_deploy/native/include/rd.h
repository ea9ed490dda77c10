/* The C interface of the compiled engine: load a network from a .rdp file, plan it, run it.
 *
 * Three objects. A network is the file, mapped and validated. A plan is a network made ready for one batch size, number
 * of threads and instruction set: immutable, so any number of threads may share it. A context is one caller's threads
 * and memory: contexts run at the same time, but one context serves one call at a time.
 *
 * Every function that can fail returns an rd_status; rd_last_error() then says in one line what is wrong and what to
 * do. No function keeps a pointer to the caller's memory after it returns, but for two that say so. Nothing is thrown.
 */
#ifndef RD_H
#define RD_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define RD_API __attribute__((visibility("default")))
#else
#define RD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum rd_status {
    RD_OK = 0,
    RD_ERROR_ARGUMENT = 1,    /* the caller's mistake: a null pointer, a batch of 0, an arena too small */
    RD_ERROR_FILE = 2,        /* the file cannot be opened or read */
    RD_ERROR_FORMAT = 3,      /* the file is not a .rdp file, of another version, or damaged */
    RD_ERROR_UNSUPPORTED = 4, /* this CPU or this network cannot do what was asked */
    RD_ERROR_MEMORY = 5       /* not enough memory */
} rd_status;

typedef struct rd_network rd_network;
typedef struct rd_plan rd_plan;
typedef struct rd_context rd_context;

/* Version of the library, "0.1.0". */
RD_API const char *rd_version(void);
/* What the last failed call of this thread said; "" when none failed. Valid until the thread's next call. */
RD_API const char *rd_last_error(void);
/* Instruction sets that this build has and this CPU can run, separated by commas: "avx512_bf16,avx512,...". Best first,
 * but for "amx_bf16x2", which stands last and is only taken by name: it runs fp32 networks with every number as the sum
 * of two bf16, good for 2^-17. */
RD_API const char *rd_available_isas(void);

/* --- networks */

/* Map a .rdp file read-only and validate it. Nothing is repacked: kernels read the weights where they lie. */
RD_API rd_status rd_network_load(const char *path, rd_network **network);
/* The same for a file in memory, which must be 64-byte aligned and outlive the network, its plans and
 * their contexts. */
RD_API rd_status rd_network_from_memory(const void *data, size_t bytes, rd_network **network);
/* The file's JSON description, not zero-terminated; lives as long as the network. */
RD_API const char *rd_network_json(const rd_network *network, size_t *bytes);

typedef struct rd_network_info {
    uint32_t channels, height, width; /* of the images */
    uint32_t classes;                 /* logits per image */
    uint32_t steps;                   /* of the network before fusion */
    uint64_t weight_bytes;            /* weights and biases in the file, as packed there */
    const char *name;                 /* "plain50"; lives as long as the network */
    const char *precision;            /* "fp32" or "bf16" */
} rd_network_info;

RD_API rd_status rd_network_get_info(const rd_network *network, rd_network_info *info);
/* Name of a class, or NULL when there is none of this number; lives as long as the network. */
RD_API const char *rd_network_class(const rd_network *network, uint32_t index);

#define RD_MAX_CHANNELS 64
/* What is done to an image before the network sees it, in this order: the shorter side becomes `resize` pixels, `pad`
 * black pixels are added on each side, the centre `size` x `size` is cut out, and values in [0, 1] become
 * (x - mean) / std per channel. */
typedef struct rd_preprocessing {
    uint32_t size, resize, pad, channels;
    float mean[RD_MAX_CHANNELS], std[RD_MAX_CHANNELS];
} rd_preprocessing;

RD_API rd_status rd_network_get_preprocessing(const rd_network *network, rd_preprocessing *preprocessing);
/* Plans keep what they need: a network may be freed before them. NULL is allowed. */
RD_API void rd_network_free(rd_network *network);

/* --- plans */

#define RD_FLAG_TRACE_MEMORY 1u /* print the live set at each new maximum of the memory plan to stderr */
#define RD_FLAG_NO_WINOGRAD 2u  /* direct 3x3 convolutions only */
#define RD_FLAG_UNFUSED 4u      /* layer by layer: each convolution writes its map to the arena */
#define RD_FLAG_SMALL 8u        /* less memory instead of less time */

typedef struct rd_options {
    uint32_t batch;   /* images per run, 1 to 4096 */
    uint32_t threads; /* 1 to 1024, the caller's included */
    uint32_t height;  /* of the images; 0: as in the file */
    uint32_t width;
    uint32_t flags;
    /* One of rd_available_isas(); NULL: the environment's RD_ISA, else the best. A plan that uses AMX asks Linux for
     * its tiles, once and for the whole process (arch_prctl): signals then need larger stacks. */
    const char *isa;
} rd_options;

RD_API rd_status rd_plan_create(const rd_network *network, const rd_options *options, rd_plan **plan);

typedef struct rd_plan_info {
    uint32_t batch, threads, channels, height, width, classes;
    uint32_t steps;       /* fused steps */
    uint64_t arena_bytes; /* all memory that a run writes, but for the logits: the sum of the next three at the peak */
    uint64_t feature_map_bytes; /* of which feature maps */
    uint64_t scratch_bytes;     /* of which the threads' scratch: tiles of maps that never exist, windows, transforms */
    uint64_t alignment_bytes;   /* of which alignment and gaps */
    uint64_t weight_bytes;      /* weights in the file, as packed there */
    uint64_t packed_bytes;      /* weights transformed or repacked for the plan, besides those in the file */
    uint64_t macs;              /* multiply-accumulates per image, counted as direct convolutions */
    const char *isa;            /* instruction set in use; lives as long as the plan */
} rd_plan_info;

RD_API rd_status rd_plan_get_info(const rd_plan *plan, rd_plan_info *info);

typedef struct rd_step_info {
    const char *name;   /* "layer1.0.conv2+conv3+layer1.1.conv1"; lives as long as the plan */
    const char *kernel; /* how it runs: "rows, max-pooled", "fused winograd 2x2", "direct", ... */
    uint64_t macs;      /* per batch, counted as direct convolutions */
    /* floating-point operations really done in matrix products per batch, 2 per multiply-accumulate; of amx_bf16x2's
     * three products for each, one is counted, as by rd_measure_product */
    uint64_t flops;
    uint64_t weight_bytes;
    uint64_t map_bytes;  /* feature maps read and written, each once */
    uint64_t live_bytes; /* of the arena while this step runs */
} rd_step_info;

RD_API rd_status rd_plan_get_step(const rd_plan *plan, uint32_t index, rd_step_info *info);
/* Contexts keep what they need: a plan may be freed before them. NULL is allowed. */
RD_API void rd_plan_free(rd_plan *plan);

/* --- contexts */

/* `arena`: the caller's memory, 64-byte aligned, at least arena_bytes, which must outlive the context; NULL: the
 * context allocates its own. Starts threads - 1 threads, which a child of the process does not have: there a context of
 * several threads can be freed, which leaves their memory, and running it is an error. */
RD_API rd_status rd_context_create(const rd_plan *plan, void *arena, size_t arena_bytes, rd_context **context);
/* float32 images (batch, channels, height, width), normalised, to float32 logits (batch, classes). Allocates nothing.
 * Pixels must be finite: with one that is not, any logit of the batch may be NaN. Whatever the caller's rounding mode
 * and treatment of denormals, it computes in the default ones and puts the caller's back. */
RD_API rd_status rd_context_run(rd_context *context, const float *images, float *logits);
/* The same, with the seconds of each fused step written to `seconds`, one per step of the plan. */
RD_API rd_status rd_context_profile(rd_context *context, const float *images, float *logits, double *seconds);
RD_API void rd_context_free(rd_context *context);

/* --- limits of the machine, to judge a step's time by; each is measured for some tenths of a second, `threads` threads
 * (1 to 1024) at once */

/* Floating-point operations per second, 2 per multiply-accumulate, of the matrix product of an instruction set (`isa`
 * as in rd_options) for a precision ("fp32", "bf16"), on operands in the L1 cache. */
RD_API rd_status rd_measure_product(const char *isa, const char *precision, uint32_t threads, double *flops_per_second);
/* Bytes read per second, each thread over and over its own share of `bytes`. */
RD_API rd_status rd_measure_read(size_t bytes, uint32_t threads, double *bytes_per_second);

#ifdef __cplusplus
}
#endif
#endif
