// A context's threads: every item once, results visible to the next round, and an end at any time. Made to run under
// ThreadSanitizer, which sees whatever is read or written without order.
#include <array>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "checks.h"
#include "networks.h"
#include "rd.h"
#include "threads.h"

namespace {

using rd::Threads;
using test::describe;
using test::Random;

constexpr int kCounts[] = {1, 2, 3, 5, 16};  // of threads: more than there are cores, too

std::size_t index(int i) { return static_cast<std::size_t>(i); }

// --- each item once

struct Round {
    std::vector<int> done;                    // times that each item was done
    std::array<std::atomic<bool>, 16> *busy;  // threads that are at work
    int threads, number;                      // of the round
    std::atomic<int> wrong{0};
};

void do_item(void *state, int item, int thread) {
    Round &round = *static_cast<Round *>(state);
    if (thread < 0 || thread >= round.threads || (*round.busy)[index(thread)].exchange(true)) round.wrong++;
    round.done[index(item)]++;  // no other thread has this item
    if ((round.number + item) % 97 == 0) std::this_thread::yield();
    (*round.busy)[index(thread)] = false;
}

// Rounds of any number of items; the state lives for one round only. At times the threads fall asleep in between.
void test_items() {
    constexpr int rounds = 10000;
    for (const int count : kCounts) {
        describe("%d threads", count);
        Random random(static_cast<std::uint64_t>(count));
        std::array<std::atomic<bool>, 16> busy{};
        Threads threads(count, nullptr, nullptr);
        for (int number = 0; number < rounds / static_cast<int>(std::size(kCounts)); number++) {
            Round round{std::vector<int>(index(random.below(40))), &busy, count, number, {}};
            threads.run(do_item, &round, static_cast<int>(round.done.size()));
            CHECK(round.wrong == 0);
            for (const int times : round.done) CHECK(times == 1);
            if (number % 200 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
}

// --- what a round wrote is there for the next one, on whatever thread

struct Shift {
    const std::vector<int> *from;
    std::vector<int> *to;
};

void shift(void *state, int item, int) {
    const Shift &s = *static_cast<const Shift *>(state);
    (*s.to)[index(item)] = (*s.from)[(index(item) + 1) % s.from->size()] + 1;
}

void test_order() {
    constexpr int rounds = 1000;
    for (const int count : kCounts) {
        describe("%d threads", count);
        Threads threads(count, nullptr, nullptr);
        for (const std::size_t items : {std::size_t{1}, std::size_t{2}, std::size_t{31}}) {
            std::vector<int> a(items), b(items);
            for (int round = 0; round < rounds; round++) {
                Shift state{round % 2 ? &b : &a, round % 2 ? &a : &b};
                threads.run(shift, &state, static_cast<int>(items));
            }
            for (const int value : a) CHECK(value == rounds);
        }
    }
}

// --- begin and end

std::atomic<int> begun{0}, ended{0};
thread_local bool framed = false;

void begin() {
    framed = true;
    begun++;
}
void end() {
    CHECK(framed);
    ended++;
}

// The caller's thread is not one of those that begin and end; the others are ended wherever they are: at once after
// their start, while they look for work, and asleep.
void test_lives() {
    for (const int milliseconds : {0, 0, 1, 20})
        for (const int count : kCounts) {
            describe("%d threads that end after %d ms", count, milliseconds);
            begun = ended = 0;
            std::atomic<int> done{0};
            {
                Threads threads(count, begin, end);
                const auto work = [](void *state, int, int thread) {
                    CHECK(framed || thread == 0);
                    ++*static_cast<std::atomic<int> *>(state);
                };
                if (milliseconds > 0) threads.run(work, &done, 10);
                std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
                if (milliseconds > 1) threads.run(work, &done, 10);  // wakes them
            }
            CHECK(begun == count - 1 && ended == count - 1);
            CHECK(done == (milliseconds > 1 ? 20 : milliseconds > 0 ? 10 : 0));
        }
}

// --- contexts

void succeeded(rd_status status) { CHECK(status == RD_OK); }

std::vector<float> run(const rd_plan *plan, const std::vector<float> &images, std::size_t logits, int times) {
    rd_context *context = nullptr;
    succeeded(rd_context_create(plan, nullptr, 0, &context));
    std::vector<float> first(logits), again(logits);
    succeeded(rd_context_run(context, images.data(), first.data()));
    for (int i = 1; i < times; i++) {
        succeeded(rd_context_run(context, images.data(), again.data()));
        CHECK(again == first);
    }
    rd_context_free(context);
    return first;
}

// Callers with contexts of their own share a plan, or a network of which each makes its plan.
void test_contexts() {
    constexpr std::size_t callers = 3, classes = 10;
    test::Network network(false, 3, 24, 24);
    network.pointwise(network.pointwise(network.conv({network.conv({test::kImages, 16}), 16}), 32), 16);
    network.finish(classes);
    const test::Array<std::byte> file = network.file();
    const std::vector<float> images = network.images(2);
    rd_network *loaded = nullptr;
    succeeded(rd_network_from_memory(file.data(), file.size(), &loaded));
    for (const bool shared : {true, false}) {
        describe("contexts of a shared plan: %d", shared);
        const rd_options options{2, 2, 0, 0, 0, nullptr};
        rd_plan *plan = nullptr;
        succeeded(rd_plan_create(loaded, &options, &plan));
        std::vector<std::vector<float>> logits(callers);
        std::vector<std::thread> threads;
        for (std::size_t i = 0; i < callers; i++)
            threads.emplace_back([&, i] {
                rd_plan *own = nullptr;
                if (!shared) succeeded(rd_plan_create(loaded, &options, &own));
                logits[i] = run(shared ? plan : own, images, 2 * classes, 30);
                rd_plan_free(own);
            });
        for (std::thread &thread : threads) thread.join();
        for (const std::vector<float> &found : logits) CHECK(found == logits[0]);
        rd_plan_free(plan);
    }
    rd_network_free(loaded);
}

// A thread's last error is its own.
void test_errors() {
    rd_network *network = nullptr;
    CHECK(rd_network_load("missing.rdp", &network) == RD_ERROR_FILE && *rd_last_error() != '\0');
    std::thread([] { CHECK(*rd_last_error() == '\0'); }).join();
    CHECK(*rd_last_error() != '\0');
}

}  // namespace

int main() {
    test_items();
    test_order();
    test_lives();
    test_contexts();
    test_errors();
}
