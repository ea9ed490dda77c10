#include "limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "error.h"
#include "isa.h"
#include "network.h"

namespace rd {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kRounds = 4;  // the best counts: others are disturbed by whatever else runs
constexpr auto kRound = std::chrono::milliseconds(20);

// One thread's work.
class Probe {
  public:
    virtual ~Probe() = default;
    virtual void prepare() = 0;  // on the thread itself, so that its memory lies near
    virtual double pass() = 0;   // returns the amount of work done
    virtual void finish() = 0;
};

using Probes = std::vector<std::unique_ptr<Probe>>;

// Amount of work per second in each round.
void run_rounds(Probe &probe, std::atomic<int> &arrived, int threads, double *rates) {
    probe.prepare();
    for (int round = 0; round < kRounds; round++) {
        arrived.fetch_add(1);
        while (arrived.load() < threads * (round + 1)) std::this_thread::yield();
        probe.pass();  // into the caches
        double amount = 0;
        const auto start = Clock::now();
        auto now = start;
        for (; now - start < kRound; now = Clock::now()) amount += probe.pass();
        rates[round] = amount / std::chrono::duration<double>(now - start).count();
    }
    probe.finish();
}

// Sum over the threads in the best round.
double best_rate(const Probes &probes) {
    const int threads = static_cast<int>(probes.size());
    std::atomic<int> arrived{0};
    std::vector<double> rates(probes.size() * kRounds);
    std::vector<std::thread> workers;
    workers.reserve(probes.size());
    try {
        for (std::size_t i = 0; i < probes.size(); i++)
            workers.emplace_back([&, i] { run_rounds(*probes[i], arrived, threads, &rates[i * kRounds]); });
    } catch (const std::exception &) {         // no more threads, or no memory for them
        arrived.fetch_add(threads * kRounds);  // those that started must not wait for those that did not
        for (std::thread &worker : workers) worker.join();
        throw Error(RD_ERROR_MEMORY,
                    "the system refuses to start " + std::to_string(threads) + " threads: ask for fewer");
    }
    for (std::thread &worker : workers) worker.join();
    double best = 0;
    for (int round = 0; round < kRounds; round++) {
        double sum = 0;
        for (std::size_t i = 0; i < probes.size(); i++) sum += rates[i * kRounds + static_cast<std::size_t>(round)];
        best = std::max(best, sum);
    }
    return best;
}

// --- products

constexpr int kOutputBlocks = 2;

class ProductProbe : public Probe {
  public:
    ProductProbe(const Kernels &kernels, int pixels, int k) : kernels_(kernels) {
        const std::size_t bytes = kernels.bf16 ? 2 : 4;
        const std::size_t row = static_cast<std::size_t>(k) * bytes, outputs = kOutputBlocks * kLane;
        values_.resize((static_cast<std::size_t>(pixels) + outputs) * row / 2 + kSlack);
        out_.resize(static_cast<std::size_t>(pixels) * outputs * bytes / 2 + kSlack);
        std::byte *const weights = aligned(values_), *const out = aligned(out_);
        for (std::size_t pixel = 0; pixel < static_cast<std::size_t>(pixels); pixel++) {
            if (pixel % static_cast<std::size_t>(kernels.group) == 0) a_.push_back(weights + (outputs + pixel) * row);
            to_.push_back(out + pixel * outputs * bytes);
        }
        product_.a = a_.data();
        product_.out = to_.data();
        product_.a_pitch = product_.pixels = pixels;
        product_.step = static_cast<std::ptrdiff_t>(row);
        product_.taps = 1;
        product_.k = product_.k_pitch = k;
        product_.w = weights;
        product_.w_block = kLane * row;
        product_.blocks = kOutputBlocks;
        product_.out_pitch = kOutputBlocks * kLane;
    }

    void prepare() override {
        // About 0.01 in any precision: neither zeros nor denormals, which some CPUs treat in their own way.
        std::fill(values_.begin(), values_.end(), std::uint16_t{0x3C00});
        if (kernels_.begin) kernels_.begin();
    }

    void finish() override {
        if (kernels_.end) kernels_.end();
    }

    double pass() override {
        constexpr int repeats = 16;
        for (int i = 0; i < repeats; i++) kernels_.product(product_);
        return 2.0 * repeats * product_.pixels * product_.k * kOutputBlocks * kLane;
    }

  private:
    static constexpr std::size_t kSlack = 32;  // of 2 bytes: to begin at a multiple of 64
    static std::byte *aligned(std::vector<std::uint16_t> &memory) {
        const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
        return reinterpret_cast<std::byte *>((address + 63) / 64 * 64);
    }

    const Kernels &kernels_;
    std::vector<std::uint16_t> values_, out_;
    std::vector<const void *> a_;
    std::vector<void *> to_;
    Product product_{};
};

// --- reading

#if defined(__x86_64__)
#define RD_WIDE __attribute__((target("avx2")))
bool reads_wide() { return __builtin_cpu_supports("avx2"); }
#else
#define RD_WIDE
bool reads_wide() { return false; }
#endif
constexpr std::size_t kLanes = 32;  // sums that do not wait for each other

inline __attribute__((always_inline)) std::uint64_t sum_lanes(const std::uint64_t *values, std::size_t count) {
    std::uint64_t lanes[kLanes] = {};
    for (std::size_t i = 0; i < count; i += kLanes)
        for (std::size_t lane = 0; lane < kLanes; lane++) lanes[lane] += values[i + lane];
    std::uint64_t sum = 0;
    for (const std::uint64_t lane : lanes) sum += lane;
    return sum;
}

RD_WIDE std::uint64_t sum_wide(const std::uint64_t *values, std::size_t count) { return sum_lanes(values, count); }
std::uint64_t sum_plain(const std::uint64_t *values, std::size_t count) { return sum_lanes(values, count); }

class ReadProbe : public Probe {
  public:
    explicit ReadProbe(std::size_t bytes)
        : count_(std::max<std::size_t>(bytes / sizeof(std::uint64_t) / kLanes, 1) * kLanes),
          values_(new std::uint64_t[count_]) {}

    void prepare() override { std::fill_n(values_.get(), count_, std::uint64_t{1}); }

    double pass() override {
        const std::uint64_t sum = reads_wide() ? sum_wide(values_.get(), count_) : sum_plain(values_.get(), count_);
        seen_.store(sum, std::memory_order_relaxed);  // so that the compiler keeps the sum
        return static_cast<double>(count_ * sizeof(std::uint64_t));
    }

    void finish() override {}

  private:
    std::size_t count_;
    std::unique_ptr<std::uint64_t[]> values_;  // not initialised: the thread that reads it touches it first
    std::atomic<std::uint64_t> seen_{0};
};

}  // namespace

double measure_product(const char *isa, bool bf16, int threads) {
    const Kernels &kernels = choose_kernels(isa, bf16);
    double best = 0;
    for (const int tiles : {1, 2, 4}) {
        for (const int k : {64, 128, 256}) {  // what fits the L1 cache best depends on both
            Probes probes;
            for (int i = 0; i < threads; i++)
                probes.push_back(std::make_unique<ProductProbe>(kernels, tiles * kernels.pixels, k));
            best = std::max(best, best_rate(probes));
        }
    }
    return best;
}

double measure_read(std::size_t bytes, int threads) {
    Probes probes;
    for (int i = 0; i < threads; i++)
        probes.push_back(std::make_unique<ReadProbe>(bytes / static_cast<std::size_t>(threads)));
    return best_rate(probes);
}

}  // namespace rd
