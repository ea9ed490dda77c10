// Running through the C interface: what networks compute, that a run allocates nothing and writes nothing but its arena
// and the logits, and that mistakes and lack of memory end in a status.
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <string>
#include <thread>

#include "networks.h"
#include "rd.h"

// Of AddressSanitizer, whose header sanitizer/allocator_interface.h not every GCC installs.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*allocated)(const volatile void *, std::size_t),
                                                         void (*released)(const volatile void *));

namespace {

using test::Array;
using test::describe;
using test::Network;

// --- allocations: every one is seen by the sanitizer's hook, and those of C++ can be made to fail

thread_local bool running = false;    // this thread is in a run
std::atomic<long> allocations{0};     // of all threads
std::atomic<long> until_failure{-1};  // allocations that still succeed; negative: all

void on_allocation(const volatile void *, std::size_t) {
    allocations++;
    if (!running) return;
    running = false;  // what reports it may allocate
    test::failed(__FILE__, __LINE__, "a run allocates nothing");
}
void on_release(const volatile void *) {}

constexpr std::size_t kUsual = 16;  // alignment of memory without a wish

// Null when the allocation is to fail.
void *allocate(std::size_t bytes, std::size_t alignment) {
    if (until_failure >= 0 && until_failure-- == 0) return nullptr;
    return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}
void *required(void *memory) {
    if (!memory) throw std::bad_alloc();
    return memory;
}

}  // namespace

void *operator new(std::size_t bytes) { return required(allocate(bytes, kUsual)); }
void *operator new(std::size_t bytes, const std::nothrow_t &) noexcept { return allocate(bytes, kUsual); }
void *operator new(std::size_t bytes, std::align_val_t alignment) {
    return required(allocate(bytes, static_cast<std::size_t>(alignment)));
}
void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, const std::nothrow_t &) noexcept { std::free(memory); }
void operator delete(void *memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void *memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void *memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

// --- the C interface's objects, freed at the end

void succeeded(rd_status status) {
    if (status != RD_OK) std::fprintf(stderr, "%s\n", rd_last_error());
    CHECK(status == RD_OK);
}

class Loaded {
  public:
    explicit Loaded(const Network &network) : file_(network.file()) {
        succeeded(rd_network_from_memory(file_.data(), file_.size(), &handle));
    }
    ~Loaded() { rd_network_free(handle); }
    Loaded(const Loaded &) = delete;
    Loaded &operator=(const Loaded &) = delete;

    rd_network *handle = nullptr;

  private:
    Array<std::byte> file_;
};

class Planned {
  public:
    Planned(const Loaded &network, const rd_options &options) {
        succeeded(rd_plan_create(network.handle, &options, &handle));
        succeeded(rd_plan_get_info(handle, &info));
    }
    ~Planned() { rd_plan_free(handle); }
    Planned(const Planned &) = delete;
    Planned &operator=(const Planned &) = delete;

    std::size_t image_values() const { return std::size_t{info.channels} * info.height * info.width * info.batch; }
    std::size_t logits() const { return std::size_t{info.batch} * info.classes; }

    rd_plan *handle = nullptr;
    rd_plan_info info{};
};

// A context in an arena between guards. Before a run the arena is filled with NaNs, so that no result depends on it.
class Guarded {
  public:
    explicit Guarded(const Planned &plan) : plan_(plan), memory_(plan.info.arena_bytes + 2 * kGuard, std::byte{0xff}) {
        succeeded(rd_context_create(plan.handle, memory_.data() + kGuard, plan.info.arena_bytes, &handle));
    }
    ~Guarded() { rd_context_free(handle); }
    Guarded(const Guarded &) = delete;
    Guarded &operator=(const Guarded &) = delete;

    std::vector<float> run(const std::vector<float> &images) {
        std::memset(memory_.data(), 0xff, memory_.size());
        const std::vector<float> before = images;
        const std::size_t count = plan_.logits();
        std::vector<float> logits(count + 16, kUntouched);
        running = true;
        const rd_status status = rd_context_run(handle, images.data(), logits.data());
        running = false;
        succeeded(status);
        for (std::size_t i = 0; i < kGuard; i++) {
            CHECK(memory_[i] == std::byte{0xff});
            CHECK(memory_[memory_.size() - 1 - i] == std::byte{0xff});
        }
        for (std::size_t i = count; i < logits.size(); i++) CHECK(logits[i] == kUntouched);
        CHECK(images == before);
        logits.resize(count);
        return logits;
    }

    rd_context *handle = nullptr;

  private:
    static constexpr std::size_t kGuard = 4096;
    static constexpr float kUntouched = 12345;
    const Planned &plan_;
    Array<std::byte> memory_;
};

rd_options options(std::uint32_t batch, std::uint32_t threads, std::uint32_t flags = 0, const char *isa = nullptr) {
    return {batch, threads, 0, 0, flags, isa};
}

bool same_bits(const std::vector<float> &a, const std::vector<float> &b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// --- what networks compute

constexpr char kBf16x2[] = "amx_bf16x2";  // runs fp32 networks, where it is named

// The first and the last image of a batch against float64. In bfloat16 a map's value can round the other way than the
// reference's, which the next steps carry on: the tolerance is what a few such differences make.
void check_logits(const Network &network, const std::vector<float> &images, const std::vector<float> &logits,
                  bool bf16x2 = false) {
    const std::size_t classes = static_cast<std::size_t>(network.classes()), batch = logits.size() / classes;
    for (const std::size_t image : {std::size_t{0}, batch - 1}) {
        const std::vector<double> expected = network.logits(&images[image * network.image_values()]);
        double largest = 0.25, difference = 0;  // what logits are sums of is about 1, and may cancel
        for (std::size_t i = 0; i < classes; i++) {
            largest = std::max(largest, std::abs(expected[i]));
            const double error = std::abs(expected[i] - static_cast<double>(logits[image * classes + i]));
            difference = std::isnan(error) ? INFINITY : std::max(difference, error);
        }
        const double allowed = largest * (network.bf16() ? 0.04 : bf16x2 ? 4e-4 : 2e-5);
        if (difference > allowed)
            std::fprintf(stderr, "%s\nlogits up to %g differ by %g\n", network.description().c_str(), largest,
                         difference);
        CHECK(difference <= allowed);
    }
}

std::vector<std::string> isas(bool bf16) {
    std::vector<std::string> found;
    std::string names = rd_available_isas() + std::string(",");
    for (std::size_t end; (end = names.find(',')) != std::string::npos; names.erase(0, end + 1)) {
        const std::string name = names.substr(0, end);
        if (name == kBf16x2 ? !bf16 : bf16 || name.find("bf16") == std::string::npos) found.push_back(name);
    }
    return found;
}

// The best one (null), and the one that only its name chooses where it is offered.
std::vector<const char *> best_and_named(bool bf16) {
    std::vector<const char *> found = {nullptr};
    if (isas(bf16).back() == kBf16x2) found.push_back(kBf16x2);
    return found;
}

// In all plans, on 1, 2 and 5 threads. The number of threads does not change a bit of the logits.
void check_plans(const Network &network, std::uint32_t batch, const char *isa) {
    constexpr std::uint32_t flags[] = {0, RD_FLAG_SMALL, RD_FLAG_NO_WINOGRAD, RD_FLAG_UNFUSED,
                                       RD_FLAG_UNFUSED | RD_FLAG_NO_WINOGRAD};
    const std::string which = test::current;
    const Loaded loaded(network);
    const std::vector<float> images = network.images(static_cast<int>(batch));
    for (const std::uint32_t chosen : flags) {
        std::vector<float> alone;
        for (const std::uint32_t threads : {1u, 2u, 5u}) {
            describe("%s, batch %u, threads %u, flags %u, %s", which.c_str(), batch, threads, chosen,
                     isa ? isa : "best");
            const Planned plan(loaded, options(batch, threads, chosen, isa));
            const std::vector<float> logits = Guarded(plan).run(images);
            if (threads > 1) CHECK(same_bits(logits, alone));
            alone = logits;
        }
        check_logits(network, images, alone, isa && std::strcmp(isa, kBf16x2) == 0);
    }
    std::snprintf(test::current, sizeof test::current, "%s", which.c_str());
}

void check_plans(const Network &network, std::uint32_t batch) {
    for (const char *isa : best_and_named(network.bf16())) check_plans(network, batch, isa);
}

// However a network is planned, it is the same function.
void test_random_networks() {
#if defined(RD_EMULATE_TILES)
    constexpr std::uint64_t first = 1, count = 30;  // tiles in plain code are slow under sanitizers
#else
    constexpr std::uint64_t first = 1, count = 60;
#endif
    for (std::uint64_t seed = first; seed < first + count; seed++) {
        test::Random random(seed);
        const Network network = test::RandomNetwork(seed, 12).run();
        const std::vector<std::string> names = isas(network.bf16());
        describe("network %llu", static_cast<unsigned long long>(seed));
        check_plans(network, random.any({1u, 1u, 3u, 8u}),
                    names[static_cast<std::size_t>(random.below(static_cast<int>(names.size())))].c_str());
    }
}

// Sums that cannot take the place of what is added: in each, something reads that map once more in the same operation.
void test_sums() {
    for (const bool bf16 : {false, true}) {
        describe("a layer adds its own input, bf16 %d", bf16);
        Network own(bf16, 2, 9, 7);
        own.pointwise(own.conv({test::kImages, 48}), 48, true, 0);
        own.finish(3);
        check_plans(own, 3);

        describe("two layers of an operation add one map, bf16 %d", bf16);
        Network twice(bf16, 2, 9, 7);
        const int x = twice.conv({test::kImages, 48}), a = twice.conv({twice.conv({x, 48}), 48, 3, 3, 1, 1, true, x});
        const int b = twice.pointwise(twice.pointwise(a, 16), 48, true, x);
        twice.conv({b, 48, 3, 3, 1, 1, true, a});
        twice.finish(3);
        check_plans(twice, 3);

        for (const bool pooled : {false, true}) {
            describe("a convolution of the images adds a map, bf16 %d, pooled %d", bf16, pooled);
            Network stem(bf16, 2, 9, 7);
            stem.conv({test::kImages, 48, 5, 5, 1, 2, true, stem.conv({test::kImages, 48})});
            if (pooled) stem.max_pool(1, 3, 2, 1);
            stem.finish(3);
            check_plans(stem, 3);
        }
    }
}

// Convolutions of one or two maps, so that the operations that share out outputs, stream, and average have their turn.
Network bottlenecks(bool bf16, bool shortcuts, int size) {
    Network network(bf16, 3, size, size, 5);
    int last = network.max_pool(network.conv({test::kImages, 16, 7, 7, 2, 3}), 3, 2, 1);
    last = network.pointwise(last, 64);
    for (int block = 0; block < 3; block++) {
        const int reduced = network.pointwise(last, 16), window = network.conv({reduced, 16});
        last = network.pointwise(window, 64, true, shortcuts ? last : test::kNothing);
    }
    network.finish(10);
    return network;
}

// A context's own arena, and a profile, change nothing.
void check_own_memory(const Planned &plan, const std::vector<float> &images, const std::vector<float> &logits) {
    rd_context *context = nullptr;
    succeeded(rd_context_create(plan.handle, nullptr, 0, &context));
    std::vector<float> found(logits.size());
    succeeded(rd_context_run(context, images.data(), found.data()));
    CHECK(same_bits(found, logits));
    std::vector<double> seconds(plan.info.steps + 1, -1);
    std::fill(found.begin(), found.end(), 0.0f);
    succeeded(rd_context_profile(context, images.data(), found.data(), seconds.data()));
    CHECK(same_bits(found, logits));
    CHECK(std::all_of(seconds.begin(), seconds.end() - 1, [](double s) { return s >= 0; }) && seconds.back() == -1);
    rd_context_free(context);
}

// Nor do a context's other threads allocate, but for what the sanitizer does when they start, which may be late.
void check_allocations(const Guarded &context, const std::vector<float> &images, std::vector<float> logits) {
    for (int attempt = 0; attempt < 200; attempt++) {
        const long before = allocations;
        for (int i = 0; i < 5; i++) succeeded(rd_context_run(context.handle, images.data(), logits.data()));
        if (allocations == before) return;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    CHECK(!"a run's threads allocate nothing");
}

void test_repeated_runs() {
    for (const bool bf16 : {false, true})
        for (const bool shortcuts : {false, true})
            for (const char *isa : best_and_named(bf16)) {
                describe("bottlenecks, bf16 %d, shortcuts %d, %s", bf16, shortcuts, isa ? isa : "best");
                const Network network = bottlenecks(bf16, shortcuts, 40);
                const Loaded loaded(network);
                const Planned plan(loaded, options(3, 2, 0, isa));
                const std::vector<float> images = network.images(3);
                Guarded one(plan), other(plan);
                const std::vector<float> logits = one.run(images);
                check_logits(network, images, logits, isa != nullptr);
                CHECK(same_bits(logits, one.run(images)));
                CHECK(same_bits(logits, other.run(images)));
                check_own_memory(plan, images, logits);
                check_allocations(one, images, logits);
            }
}

// Images of another size than the file's.
void test_image_sizes() {
    const Network small = bottlenecks(false, true, 33), large = bottlenecks(false, true, 57);
    const Loaded loaded(small);
    for (const char *isa : best_and_named(false)) {
        rd_options wanted = options(1, 2, 0, isa);
        wanted.height = wanted.width = 57;
        const Planned plan(loaded, wanted);
        CHECK(plan.info.height == 57 && plan.info.width == 57);
        const std::vector<float> images = large.images(1);
        check_logits(large, images, Guarded(plan).run(images), isa != nullptr);
    }
}

// A network may be freed before its plans, and a plan before its contexts.
void test_lifetimes(const char *isa) {
    const Network network = bottlenecks(false, false, 32);
    const Array<std::byte> file = network.file();
    rd_network *loaded = nullptr;
    rd_plan *plan = nullptr;
    rd_context *context = nullptr;
    const rd_options wanted = options(1, 2, 0, isa);
    succeeded(rd_network_from_memory(file.data(), file.size(), &loaded));
    succeeded(rd_plan_create(loaded, &wanted, &plan));
    rd_network_free(loaded);
    succeeded(rd_context_create(plan, nullptr, 0, &context));
    rd_plan_free(plan);
    const std::vector<float> images = network.images(1);
    std::vector<float> logits(10);
    succeeded(rd_context_run(context, images.data(), logits.data()));
    check_logits(network, images, logits, isa != nullptr);
    rd_context_free(context);
}

// --- the process

// Threads start in the mode of who starts them, and the caller changes its own when it likes.
void test_rounding() {
    const Network network = bottlenecks(false, true, 40);
    const Loaded loaded(network);
    const std::vector<float> images = network.images(2);
    const Planned one(loaded, options(2, 1)), three(loaded, options(2, 3));
    const std::vector<float> expected = Guarded(one).run(images);
    CHECK(std::fesetround(FE_UPWARD) == 0);
    const Planned late(loaded, options(2, 3));  // which transforms weights
    Guarded alone(one), together(three), planned(late);
    CHECK(std::fegetround() == FE_UPWARD);
    for (int i = 0; i < 20; i++) {
        CHECK(same_bits(alone.run(images), expected) && same_bits(together.run(images), expected));
        CHECK(same_bits(planned.run(images), expected));
        CHECK(std::fegetround() == FE_UPWARD);
    }
    std::fesetround(FE_TONEAREST);
    for (int i = 0; i < 20; i++) CHECK(same_bits(together.run(images), expected));
}

// A child of the process has none of the context's threads: it is told so, and can free the context.
void test_fork() {
    const Network network = bottlenecks(false, false, 32);
    const Loaded loaded(network);
    const std::vector<float> images = network.images(1);
    for (const std::uint32_t threads : {1u, 3u}) {
        const Planned plan(loaded, options(1, threads));
        rd_context *context = nullptr;
        std::vector<float> logits(10);
        succeeded(rd_context_create(plan.handle, nullptr, 0, &context));
        succeeded(rd_context_run(context, images.data(), logits.data()));
        std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the threads fall asleep
        const pid_t child = ::fork();
        CHECK(child >= 0);
        if (child == 0) {
            ::alarm(60);
            std::vector<float> found(10);
            const rd_status status = rd_context_run(context, images.data(), found.data());
            const bool right = threads == 1 ? status == RD_OK && same_bits(found, logits)
                                            : status == RD_ERROR_ARGUMENT && std::strstr(rd_last_error(), "forked");
            rd_context_free(context);
            ::_exit(right ? 0 : 1);
        }
        int status = -1;
        CHECK(::waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        succeeded(rd_context_run(context, images.data(), logits.data()));
        rd_context_free(context);
    }
}

#if defined(__x86_64__) && defined(__linux__) && !defined(RD_EMULATE_TILES)
std::uint64_t permitted() {
    constexpr long get_permission = 0x1022;  // arch_prctl
    std::uint64_t features = 0;
    return ::syscall(SYS_arch_prctl, get_permission, &features) == 0 ? features : 0;
}

// The permission to use tiles is of the whole process and for ever: nothing asks for it that does not use them.
void test_permission() {
    constexpr std::uint64_t tiles = 1u << 18;
    if ((permitted() & tiles) != 0) return;  // whoever started this process asked
    const Loaded loaded(bottlenecks(false, false, 32)), halves(bottlenecks(true, false, 32));
    const Planned usual(loaded, options(1, 1));
    CHECK((permitted() & tiles) == 0);
    const Planned plan(halves, options(1, 1));
    CHECK(((permitted() & tiles) != 0) == (std::string(plan.info.isa) == "amx_bf16"));
}
#else
void test_permission() {}  // nobody to ask
#endif

// --- mistakes

void refused(rd_status status, rd_status expected, const char *hint) {
    const std::string reason = rd_last_error();
    describe("'%s', status %d", reason.c_str(), status);
    CHECK(status == expected);
    CHECK(reason.find('\n') == std::string::npos && reason.find(hint) != std::string::npos);
}

void test_network_mistakes() {
    const Network network = bottlenecks(false, false, 32);
    const Array<std::byte> file = network.file();
    rd_network *made = nullptr;
    refused(rd_network_load(nullptr, &made), RD_ERROR_ARGUMENT, "path");
    refused(rd_network_load("missing.rdp", &made), RD_ERROR_FILE, "missing.rdp");
    refused(rd_network_load("a\nb\x1b.rdp", &made), RD_ERROR_FILE, "a?b?.rdp");
    refused(rd_network_load(".", &made), RD_ERROR_FILE, "not a file");
    refused(rd_network_from_memory(nullptr, 64, &made), RD_ERROR_ARGUMENT, "data");
    refused(rd_network_from_memory(file.data(), file.size(), nullptr), RD_ERROR_ARGUMENT, "network");
    refused(rd_network_from_memory(file.data() + 1, file.size() - 1, &made), RD_ERROR_ARGUMENT, "align");
    refused(rd_network_from_memory(file.data(), file.size() - 64, &made), RD_ERROR_FORMAT, "");
    CHECK(made == nullptr);
    rd_network_info info;
    refused(rd_network_get_info(nullptr, &info), RD_ERROR_ARGUMENT, "network");
    const Loaded loaded(network);
    refused(rd_network_get_info(loaded.handle, nullptr), RD_ERROR_ARGUMENT, "info");
    refused(rd_network_get_preprocessing(loaded.handle, nullptr), RD_ERROR_ARGUMENT, "preprocessing");
    CHECK(std::string(rd_network_class(loaded.handle, 9)) == "class 9");
    CHECK(rd_network_class(loaded.handle, 10) == nullptr && rd_network_class(nullptr, 0) == nullptr);
    CHECK(rd_network_json(nullptr, nullptr) == nullptr && *rd_network_json(loaded.handle, nullptr) == '{');
}

void test_plan_mistakes() {
    const Loaded loaded(bottlenecks(false, false, 32));
    rd_plan *made = nullptr;
    const auto refuse = [&](rd_options wanted, rd_status expected, const char *hint) {
        refused(rd_plan_create(loaded.handle, &wanted, &made), expected, hint);
        CHECK(made == nullptr);
    };
    refuse(options(0, 1), RD_ERROR_ARGUMENT, "batch");
    refuse(options(5000, 1), RD_ERROR_ARGUMENT, "batch");
    refuse(options(1, 0), RD_ERROR_ARGUMENT, "threads");
    refuse(options(1, 5000), RD_ERROR_ARGUMENT, "threads");
    refuse(options(1, 1025), RD_ERROR_ARGUMENT, "threads");
    refuse(options(4294967295u, 4294967295u), RD_ERROR_ARGUMENT, "batch");
    refuse(options(1, 1, 0, "sse9"), RD_ERROR_UNSUPPORTED, "sse9");
    refuse(options(1, 1, 0, "x\ny"), RD_ERROR_UNSUPPORTED, "'x?y'");
    refuse(options(1, 1, RD_FLAG_UNFUSED | RD_FLAG_SMALL), RD_ERROR_ARGUMENT, "contradict");
    refuse({1, 1, 5000, 32, 0, nullptr}, RD_ERROR_ARGUMENT, "height");
    refuse({4096, 1, 4096, 4096, 0, nullptr}, RD_ERROR_ARGUMENT, "large");
    refuse(options(1, 1, 0, "amx_bf16"), RD_ERROR_UNSUPPORTED, "amx_bf16");  // it has no fp32, where it is
    const rd_options usual = options(1, 1);
    refused(rd_plan_create(nullptr, &usual, &made), RD_ERROR_ARGUMENT, "network");
    refused(rd_plan_create(loaded.handle, nullptr, &made), RD_ERROR_ARGUMENT, "options");
    refused(rd_plan_create(loaded.handle, &usual, nullptr), RD_ERROR_ARGUMENT, "plan");
    Network wide(false, 3, 32, 32);
    wide.conv({test::kImages, 16, 9, 9, 1, 0});
    wide.finish(2);
    const Loaded large(wide);
    const rd_options tiny{1, 1, 8, 8, 0, nullptr};
    refused(rd_plan_create(large.handle, &tiny, &made), RD_ERROR_ARGUMENT, "too small");
    // Two paths whose maps are of one size for images of an even number of pixels only.
    Network meeting(false, 3, 32, 32);
    const int first = meeting.conv({test::kImages, 16}), shortcut = meeting.conv({first, 16, 2, 2, 2, 0});
    meeting.conv({first, 16, 3, 3, 2, 1, true, shortcut});
    meeting.finish(2);
    const Loaded paths(meeting);
    const rd_options odd{1, 1, 33, 33, 0, nullptr};
    refused(rd_plan_create(paths.handle, &odd, &made), RD_ERROR_ARGUMENT, "different sizes");
    CHECK(Planned(paths, {1, 1, 34, 34, 0, nullptr}).info.height == 34);
    const Planned plan(loaded, usual);
    rd_step_info step;
    succeeded(rd_plan_get_step(plan.handle, plan.info.steps - 1, &step));
    refused(rd_plan_get_step(plan.handle, plan.info.steps, &step), RD_ERROR_ARGUMENT, "steps");
    refused(rd_plan_get_step(plan.handle, 0, nullptr), RD_ERROR_ARGUMENT, "info");
    refused(rd_plan_get_info(nullptr, nullptr), RD_ERROR_ARGUMENT, "");
}

void test_context_mistakes() {
    const Network network = bottlenecks(false, false, 32);
    const Loaded loaded(network);
    const Planned plan(loaded, options(1, 2));
    const std::size_t bytes = plan.info.arena_bytes;
    const Array<std::byte> arena(bytes + 64);
    rd_context *made = nullptr;
    refused(rd_context_create(nullptr, nullptr, 0, &made), RD_ERROR_ARGUMENT, "plan");
    refused(rd_context_create(plan.handle, nullptr, 0, nullptr), RD_ERROR_ARGUMENT, "context");
    refused(rd_context_create(plan.handle, arena.data(), bytes - 1, &made), RD_ERROR_ARGUMENT, "needs");
    refused(rd_context_create(plan.handle, arena.data() + 32, bytes, &made), RD_ERROR_ARGUMENT, "align");
    CHECK(made == nullptr);
    Guarded context(plan);
    const std::vector<float> images = network.images(1);
    std::vector<float> logits(10);
    std::vector<double> seconds(plan.info.steps);
    refused(rd_context_run(nullptr, images.data(), logits.data()), RD_ERROR_ARGUMENT, "context");
    refused(rd_context_run(context.handle, nullptr, logits.data()), RD_ERROR_ARGUMENT, "images");
    refused(rd_context_run(context.handle, images.data(), nullptr), RD_ERROR_ARGUMENT, "logits");
    refused(rd_context_profile(context.handle, images.data(), logits.data(), nullptr), RD_ERROR_ARGUMENT, "seconds");
    check_logits(network, images, context.run(images));  // it still works
}

void test_other_mistakes() {
    double found;
    refused(rd_measure_product("sse9", "fp32", 1, &found), RD_ERROR_UNSUPPORTED, "sse9");
    refused(rd_measure_product(nullptr, "int8", 1, &found), RD_ERROR_ARGUMENT, "precision");
    refused(rd_measure_product(nullptr, nullptr, 1, &found), RD_ERROR_ARGUMENT, "precision");
    refused(rd_measure_product(nullptr, "fp32", 0, &found), RD_ERROR_ARGUMENT, "threads");
    refused(rd_measure_product(nullptr, "fp32", 1, nullptr), RD_ERROR_ARGUMENT, "flops_per_second");
    refused(rd_measure_read(4096, 5000, &found), RD_ERROR_ARGUMENT, "threads");
    rd_network_free(nullptr);
    rd_plan_free(nullptr);
    rd_context_free(nullptr);
}

// --- lack of memory: whichever allocation fails, the status says so, and nothing is lost or left half made

// Calls make(&made) until it succeeds, with one more allocation each time; returns what it made.
template <class Object, class Make>
Object *make_at_last(const char *what, Make make) {
    Object *made = nullptr;
    for (long successes = 0;; successes++) {
        describe("%s, %ld allocations before one fails", what, successes);
        until_failure = successes;
        const rd_status status = make(&made);
        until_failure = -1;
        CHECK((status == RD_OK) == (made != nullptr));
        if (status == RD_OK) return made;
        CHECK(status == RD_ERROR_MEMORY && *rd_last_error() != '\0');
    }
}

void test_lack_of_memory(const char *isa) {
    const Array<std::byte> file = bottlenecks(false, true, 32).file();
    const rd_options wanted = options(1, 3, 0, isa);
    auto *const network = make_at_last<rd_network>(
        "a network", [&](auto made) { return rd_network_from_memory(file.data(), file.size(), made); });
    auto *const plan =
        make_at_last<rd_plan>("a plan", [&](auto made) { return rd_plan_create(network, &wanted, made); });
    auto *const context =
        make_at_last<rd_context>("a context", [&](auto made) { return rd_context_create(plan, nullptr, 0, made); });
    rd_context_free(context);
    rd_plan_free(plan);
    rd_network_free(network);
}

}  // namespace

int main() {
    CHECK(__sanitizer_install_malloc_and_free_hooks(on_allocation, on_release) != 0);
    test_permission();  // first: no other plan has asked yet
    test_network_mistakes();
    test_plan_mistakes();
    test_context_mistakes();
    test_other_mistakes();
    for (const char *isa : best_and_named(false)) test_lifetimes(isa);
    test_image_sizes();
    test_repeated_runs();
    test_sums();
    test_rounding();
    test_fork();
    test_random_networks();
    for (const char *isa : best_and_named(false)) test_lack_of_memory(isa);
}
