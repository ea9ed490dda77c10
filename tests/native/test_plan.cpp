// Plans of small networks: what runs, which memory it uses when, and what they say of themselves.
#include <algorithm>
#include <memory>
#include <vector>

#include "checks.h"
#include "networks.h"
#include "plan.h"

namespace {

using rd::Buffer;
using rd::Operation;
using rd::OperationKind;
using rd::Plan;
using test::describe;
using test::Network;

std::size_t index(int i) { return static_cast<std::size_t>(i); }

// A network and the file that it lies in.
struct Loaded {
    explicit Loaded(const Network &described)
        : file(described.file()), network(rd::parse_network(file.data(), file.size(), nullptr)) {}

    std::shared_ptr<const Plan> plan(int batch, int threads, unsigned flags = 0, const char *isa = nullptr) const {
        rd::Options options;
        options.batch = batch;
        options.threads = threads;
        options.flags = flags;
        options.isa = isa;
        return rd::make_plan(network, options);
    }

    test::Array<std::byte> file;
    std::shared_ptr<const rd::Network> network;
};

// An operation's parts, or itself.
std::vector<const Operation *> parts(const Operation &o) {
    std::vector<const Operation *> found;
    for (const Operation &part : o.parts) found.push_back(&part);
    return found.empty() ? std::vector<const Operation *>{&o} : found;
}

std::vector<int> maps_of(const Operation &o, bool read) {
    std::vector<int> maps;
    for (const Operation *part : parts(o)) {
        if (read) maps.push_back(part->source);
        if (!read) maps.push_back(part->pool_map);
        for (const rd::Layer &layer : part->layers) maps.push_back(read ? layer.add : layer.map);
    }
    maps.erase(std::remove_if(maps.begin(), maps.end(), [](int map) { return map < 0; }), maps.end());
    return maps;
}

// --- memory

// No two buffers that are needed at the same operation overlap, and the arena ends where the last of them does.
void check_buffers(const Plan &plan) {
    std::size_t end = 0;
    for (const Buffer &a : plan.buffers) {
        CHECK(a.offset % rd::kAlignment == 0);
        end = std::max(end, a.offset + rd::aligned(a.bytes));
        for (const Buffer &b : plan.buffers) {
            if (&a == &b || a.first > b.last || b.first > a.last) continue;
            CHECK(a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset);
        }
    }
    CHECK(plan.info.arena_bytes == end);
}

// Every map that an operation reads or makes lies in a buffer of its size that lives then; what an operation makes lies
// apart from what it reads, but for a sum in the place of what it adds.
void check_maps(const Plan &plan) {
    const int logits = static_cast<int>(plan.maps.size()) - 1;
    for (int at = 0; at < static_cast<int>(plan.operations.size()); at++) {
        const Operation &o = plan.operations[index(at)];
        std::vector<int> used = maps_of(o, true);
        for (const int map : maps_of(o, false)) used.push_back(map);
        for (const int map : used) {
            if (map == logits) continue;
            const rd::Map &m = plan.maps[index(map)];
            const Buffer &buffer = plan.buffers[index(m.buffer)];
            CHECK(!buffer.scratch && buffer.first <= at && at <= buffer.last);
            CHECK(buffer.bytes == index(plan.options.batch * m.shape.pixels() * m.shape.pitch()) * plan.element);
        }
        for (const Operation *part : parts(o))
            for (const rd::Layer &layer : part->layers) {
                if (layer.map < 0 || layer.map == logits) continue;
                for (const int map : used) {
                    const bool shares = plan.maps[index(map)].buffer == plan.maps[index(layer.map)].buffer;
                    CHECK(!shares || map == layer.map || map == layer.add);
                }
            }
    }
}

void check_scratch(const Plan &plan) {
    for (int at = 0; at < static_cast<int>(plan.operations.size()); at++) {
        const Operation &o = plan.operations[index(at)];
        const Buffer &buffer = plan.buffers[index(o.scratch_buffer)];
        CHECK(buffer.scratch && buffer.first == at && buffer.last == at);
        CHECK(buffer.bytes == o.scratch.bytes * index(plan.options.threads));
        CHECK(o.scratch.bytes % rd::kAlignment == 0);
    }
}

void check_figures(const Network &network, const Plan &plan) {
    const rd_plan_info &info = plan.info;
    std::uint64_t macs = 0, peak = 0;
    for (std::size_t at = 0; at < plan.operations.size(); at++) {
        const rd_step_info &step = plan.operations[at].info;
        std::uint64_t live = 0;
        for (const Buffer &buffer : plan.buffers)
            if (buffer.first <= static_cast<int>(at) && static_cast<int>(at) <= buffer.last) live += buffer.bytes;
        CHECK(step.live_bytes == live);
        CHECK(step.name == plan.operations[at].name.c_str() && *step.kernel != '\0');
        peak = std::max(peak, live);
        macs += step.macs;
    }
    CHECK(info.feature_map_bytes + info.scratch_bytes == peak);
    CHECK(info.feature_map_bytes + info.scratch_bytes + info.alignment_bytes == info.arena_bytes);
    CHECK(info.macs == network.macs() && macs == info.macs * info.batch);
    CHECK(info.steps == plan.operations.size());
}

// Every step of the network is in one operation, in order.
void check_steps(const Network &network, const Plan &plan) {
    std::vector<const rd::Step *> steps;
    for (const Operation &o : plan.operations)
        for (const Operation *part : parts(o)) {
            for (std::size_t i = 0; i < part->layers.size(); i++) {
                steps.push_back(part->layers[i].step);
                if (i == 0 && part->pool) steps.push_back(part->pool);
            }
            if (part->layers.empty()) steps.push_back(part->pool);
        }
    CHECK(static_cast<int>(steps.size()) == network.steps());
    for (std::size_t i = 0; i < steps.size(); i++) CHECK(steps[i] == &plan.network->steps[i]);
}

void check_work(const Plan &plan) {
    for (const Operation &o : plan.operations) {
        CHECK(o.items() >= 1);
        if (o.kind == OperationKind::convolution && o.tiled) {
            const int bands = o.chunks / ((plan.options.batch + o.images - 1) / o.images);
            CHECK(o.images == 1 || o.rows == o.units);
            CHECK(o.rows * (bands - 1) < o.units && o.rows * bands >= o.units);
            CHECK(o.images * (o.chunks / bands - 1) < plan.options.batch &&
                  o.images * (o.chunks / bands) >= plan.options.batch);
        } else if (o.kind == OperationKind::convolution || o.kind == OperationKind::max_pool)
            CHECK(o.chunk * (o.chunks - 1) < plan.options.batch * o.units &&
                  o.chunk * o.chunks >= plan.options.batch * o.units);
        CHECK(o.layers.size() <= 1 || o.slices == 1);
    }
}

void test_random_networks() {
    constexpr unsigned flags[] = {0, RD_FLAG_SMALL, RD_FLAG_NO_WINOGRAD, RD_FLAG_UNFUSED};
    constexpr char kBf16x2[] = "amx_bf16x2";  // never the best: fp32 in tiles
    const bool named = std::string(rd_available_isas()).find(kBf16x2) != std::string::npos;
    for (std::uint64_t seed = 1; seed <= 300; seed++) {
        test::Random random(seed);
        const Network network = test::RandomNetwork(seed, 40).run();
        const Loaded loaded(network);
        for (const unsigned chosen : flags) {
            const int batch = random.any({1, 3, 8}), threads = random.any({1, 2, 5});
            const char *const isa = named && !network.bf16() && random.flip() ? kBf16x2 : nullptr;
            describe("network %llu, batch %d, threads %d, flags %u, %s", static_cast<unsigned long long>(seed), batch,
                     threads, chosen, isa ? isa : "best");
            const std::shared_ptr<const Plan> plan = loaded.plan(batch, threads, chosen, isa);
            check_buffers(*plan);
            check_maps(*plan);
            check_scratch(*plan);
            check_figures(network, *plan);
            check_steps(network, *plan);
            check_work(*plan);
            if (chosen == RD_FLAG_UNFUSED) CHECK(static_cast<int>(plan->operations.size()) == network.steps());
        }
    }
}

// --- particular networks

const rd::Map &map_named(const Plan &plan, int number) {
    const std::string name = "map" + std::to_string(number);
    return *std::find_if(plan.maps.begin(), plan.maps.end(), [&name](const rd::Map &map) { return map.name == name; });
}

// A shortcut's sum takes the place of the shortcut, unless something reads that again.
void test_sums_in_place() {
    for (const bool again : {false, true}) {
        describe("a shortcut that is read again: %d", again);
        Network network(false, 3, 24, 24);
        const int x = network.conv({test::kImages, 32}), a = network.conv({x, 32}),
                  sum = network.conv({a, 32, 3, 3, 1, 1, true, x});
        network.conv({sum, 32, 3, 3, 1, 1, true, again ? x : sum});
        network.finish(10);
        const std::shared_ptr<const Plan> plan = Loaded(network).plan(2, 1, RD_FLAG_UNFUSED);
        CHECK((map_named(*plan, sum).buffer == map_named(*plan, x).buffer) == !again);
        CHECK(map_named(*plan, a).buffer != map_named(*plan, x).buffer);
        check_maps(*plan);
        // Two maps of the batch, or three where the shortcut must stay, and the scratch of the largest moment.
        CHECK(plan->info.feature_map_bytes == 2 * network.map_bytes(x) * (again ? 3 : 2));
    }
}

// Expand and reduce are a window's further layers: the wide map does not exist, unless unfused.
void test_fusion() {
    Network network(true, 3, 32, 32);
    const int stem = network.max_pool(network.conv({test::kImages, 16, 7, 7, 2, 3}), 3, 2, 1);
    const int window = network.conv({stem, 16}), expand = network.pointwise(window, 64),
              reduce = network.pointwise(expand, 16);
    network.pointwise(network.conv({reduce, 16}), 64);
    network.finish(10);
    const Loaded loaded(network);
    const std::shared_ptr<const Plan> fused = loaded.plan(1, 1), unfused = loaded.plan(1, 1, RD_FLAG_UNFUSED);
    CHECK(fused->operations.size() == 5);  // stem and pooling, window to reduce, window, expand and average, classifier
    CHECK(fused->operations[0].kind == OperationKind::stem && fused->operations[0].pool);
    CHECK(fused->operations[1].layers.size() == 3 && fused->operations[1].layers[1].map == rd::kScratch);
    CHECK(fused->operations[3].kind == OperationKind::convolution_average);
    CHECK(static_cast<int>(unfused->operations.size()) == network.steps());
    CHECK(fused->info.feature_map_bytes < unfused->info.feature_map_bytes);
}

// Winograd's form is chosen where it does less work, and never when it is forbidden; the choice is the same for all
// threads.
void test_winograd() {
    Network network(false, 3, 32, 32);
    network.conv({network.conv({test::kImages, 64}), 64});
    network.finish(10);
    const Loaded loaded(network);
    const auto form = [&](int threads, unsigned flags) {
        const std::shared_ptr<const Plan> plan = loaded.plan(1, threads, flags | RD_FLAG_UNFUSED);
        const rd::Winograd *const winograd = plan->operations[1].layers[0].winograd;
        return winograd ? winograd->m : 0;
    };
    CHECK(form(1, 0) == 4 && form(7, 0) == 4);
    CHECK(form(1, RD_FLAG_NO_WINOGRAD) == 0);
    CHECK(loaded.plan(1, 1)->info.packed_bytes == 64 * 64 * 36 * 4);
    CHECK(loaded.plan(1, 1, RD_FLAG_NO_WINOGRAD)->info.packed_bytes == 0);
}

// Least memory is no more memory than any other plan's.
void test_small() {
    for (std::uint64_t seed = 1; seed <= 60; seed++) {
        describe("network %llu", static_cast<unsigned long long>(seed));
        const Loaded loaded(test::RandomNetwork(seed, 40).run());
        CHECK(loaded.plan(1, 2, RD_FLAG_SMALL)->info.arena_bytes <= loaded.plan(1, 2)->info.arena_bytes);
    }
}

}  // namespace

int main() {
    test_random_networks();
    test_sums_in_place();
    test_fusion();
    test_winograd();
    test_small();
}
