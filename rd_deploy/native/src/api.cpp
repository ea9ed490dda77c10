// The C interface (rd.h): exceptions become statuses here, and nowhere else.
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "context.h"
#include "error.h"
#include "isa.h"
#include "limits.h"
#include "network.h"
#include "plan.h"

struct rd_network {
    std::shared_ptr<const rd::Network> network;
};
struct rd_plan {
    std::shared_ptr<const rd::Plan> plan;
};
struct rd_context {
    rd::Context context;
};

namespace {

thread_local std::string last_error;

rd_status failed(rd_status status, const char *message) {
    try {
        last_error = message;
    } catch (...) {
        last_error.clear();
    }
    return status;
}

template <class Call>
rd_status guarded(Call call) {
    try {
        call();
        return RD_OK;
    } catch (const rd::Error &error) {
        return failed(error.status, error.what());
    } catch (const std::bad_alloc &) {
        return failed(RD_ERROR_MEMORY, "not enough memory");
    } catch (const std::exception &error) {
        return failed(RD_ERROR_UNSUPPORTED, error.what());
    }
}

template <class T>
T *required(T *pointer, const char *name) {
    if (!pointer) throw rd::Error(RD_ERROR_ARGUMENT, std::string(name) + " must not be null");
    return pointer;
}

int checked_threads(uint32_t threads) {
    if (threads < 1 || threads > 1024) throw rd::Error(RD_ERROR_ARGUMENT, "threads must be from 1 to 1024");
    return static_cast<int>(threads);
}

}  // namespace

extern "C" {

const char *rd_version(void) { return "0.1.0"; }
const char *rd_last_error(void) { return last_error.c_str(); }
const char *rd_available_isas(void) { return rd::available_isas(); }

rd_status rd_network_load(const char *path, rd_network **network) {
    return guarded([&] {
        required(network, "network");
        *network = new rd_network{rd::load_network(required(path, "path"))};
    });
}

rd_status rd_network_from_memory(const void *data, size_t bytes, rd_network **network) {
    return guarded([&] {
        required(network, "network");
        *network = new rd_network{rd::parse_network(required(data, "data"), bytes, nullptr)};
    });
}

const char *rd_network_json(const rd_network *network, size_t *bytes) {
    if (!network) return nullptr;
    if (bytes) *bytes = network->network->json.size();
    return network->network->json.data();
}

rd_status rd_network_get_info(const rd_network *network, rd_network_info *info) {
    return guarded([&] {
        const rd::Network &n = *required(network, "network")->network;
        *required(info, "info") = {static_cast<uint32_t>(n.channels),
                                   static_cast<uint32_t>(n.height),
                                   static_cast<uint32_t>(n.width),
                                   static_cast<uint32_t>(n.classes.size()),
                                   static_cast<uint32_t>(n.steps.size()),
                                   n.weight_bytes,
                                   n.name.c_str(),
                                   n.precision == rd::Precision::bf16 ? "bf16" : "fp32"};
    });
}

const char *rd_network_class(const rd_network *network, uint32_t index) {
    return network && index < network->network->classes.size() ? network->network->classes[index].c_str() : nullptr;
}

rd_status rd_network_get_preprocessing(const rd_network *network, rd_preprocessing *preprocessing) {
    return guarded(
        [&] { *required(preprocessing, "preprocessing") = required(network, "network")->network->preprocessing; });
}

void rd_network_free(rd_network *network) { delete network; }

rd_status rd_plan_create(const rd_network *network, const rd_options *options, rd_plan **plan) {
    return guarded([&] {
        required(network, "network");
        required(plan, "plan");
        const rd_options &given = *required(options, "options");
        for (const uint32_t value : {given.batch, given.height, given.width})
            if (value > 4096) throw rd::Error(RD_ERROR_ARGUMENT, "batch, height and width must be at most 4096");
        const rd::Options wanted{static_cast<int>(given.batch),
                                 checked_threads(given.threads),
                                 static_cast<int>(given.height),
                                 static_cast<int>(given.width),
                                 given.flags,
                                 given.isa};
        *plan = new rd_plan{rd::make_plan(network->network, wanted)};
    });
}

rd_status rd_plan_get_info(const rd_plan *plan, rd_plan_info *info) {
    return guarded([&] { *required(info, "info") = required(plan, "plan")->plan->info; });
}

rd_status rd_plan_get_step(const rd_plan *plan, uint32_t index, rd_step_info *info) {
    return guarded([&] {
        const rd::Plan &p = *required(plan, "plan")->plan;
        if (index >= p.operations.size())
            throw rd::Error(RD_ERROR_ARGUMENT, "the plan has " + std::to_string(p.operations.size()) + " steps");
        *required(info, "info") = p.operations[index].info;
    });
}

void rd_plan_free(rd_plan *plan) { delete plan; }

rd_status rd_context_create(const rd_plan *plan, void *arena, size_t arena_bytes, rd_context **context) {
    return guarded([&] {
        required(context, "context");
        *context = new rd_context{rd::Context(required(plan, "plan")->plan, arena, arena_bytes)};
    });
}

rd_status rd_context_run(rd_context *context, const float *images, float *logits) {
    return guarded([&] {
        required(context, "context")->context.run(required(images, "images"), required(logits, "logits"), nullptr);
    });
}

rd_status rd_context_profile(rd_context *context, const float *images, float *logits, double *seconds) {
    return guarded([&] {
        required(context, "context")
            ->context.run(required(images, "images"), required(logits, "logits"), required(seconds, "seconds"));
    });
}

void rd_context_free(rd_context *context) { delete context; }

rd_status rd_measure_product(const char *isa, const char *precision, uint32_t threads, double *flops_per_second) {
    return guarded([&] {
        const std::string name = required(precision, "precision");
        if (name != "fp32" && name != "bf16") throw rd::Error(RD_ERROR_ARGUMENT, "precision must be fp32 or bf16");
        const int count = checked_threads(threads);
        *required(flops_per_second, "flops_per_second") = rd::measure_product(isa, name == "bf16", count);
    });
}

rd_status rd_measure_read(size_t bytes, uint32_t threads, double *bytes_per_second) {
    return guarded([&] {
        const int count = checked_threads(threads);
        *required(bytes_per_second, "bytes_per_second") = rd::measure_read(bytes, count);
    });
}

}  // extern "C"
