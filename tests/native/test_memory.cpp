// The placement of buffers in the arena: never two in the same place at the same time, aligned, and tight where the
// tightest placement is known.
#include <algorithm>
#include <vector>

#include "checks.h"
#include "memory.h"

namespace {

using rd::Buffer;
using test::describe;
using test::Random;

constexpr std::uint64_t kSeed = 20261125;

Buffer buffer(std::size_t bytes, int first, int last) { return {"", bytes, first, last, false, 0}; }

bool live_together(const Buffer &a, const Buffer &b) { return a.first <= b.last && b.first <= a.last; }

// The most bytes that live at one step, each buffer aligned: no arena is smaller.
std::size_t most_live(const std::vector<Buffer> &buffers) {
    std::size_t most = 0;
    for (const Buffer &at : buffers) {
        std::size_t live = 0;
        for (const Buffer &other : buffers)
            if (other.first <= at.first && at.first <= other.last) live += rd::aligned(other.bytes);
        most = std::max(most, live);
    }
    return most;
}

std::size_t checked_place(std::vector<Buffer> &buffers) {
    const std::vector<Buffer> before = buffers;
    const std::size_t arena = rd::place(buffers);
    std::size_t end = 0;
    for (std::size_t i = 0; i < buffers.size(); i++) {
        const Buffer &a = buffers[i];
        CHECK(a.bytes == before[i].bytes && a.first == before[i].first && a.last == before[i].last);
        CHECK(a.offset % rd::kAlignment == 0);
        end = std::max(end, a.offset + rd::aligned(a.bytes));
        for (std::size_t j = 0; j < i; j++) {
            const Buffer &b = buffers[j];
            const bool apart = a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
            CHECK(!live_together(a, b) || a.bytes == 0 || b.bytes == 0 || apart);
        }
    }
    CHECK(arena == end);
    CHECK(arena >= most_live(buffers));
    std::vector<Buffer> again = before;
    CHECK(rd::place(again) == arena);
    return arena;
}

void test_random_lives() {
    for (std::uint64_t seed = kSeed; seed < kSeed + 200; seed++) {
        describe("seed %llu", static_cast<unsigned long long>(seed));
        Random random(seed);
        std::vector<Buffer> buffers;
        for (int count = random.between(1, 30); count > 0; count--) {
            const int first = random.below(20);
            buffers.push_back(buffer(random.next() % 5000, first, first + random.below(6)));
        }
        checked_place(buffers);
    }
}

// Each map is read by the next step only: the arena is the largest pair of neighbours.
void test_chains() {
    for (std::uint64_t seed = kSeed; seed < kSeed + 100; seed++) {
        describe("chain, seed %llu", static_cast<unsigned long long>(seed));
        Random random(seed);
        std::vector<Buffer> buffers;
        for (int i = 0; i < 12; i++) buffers.push_back(buffer(64 * (1 + random.next() % 40), i, i + 1));
        CHECK(checked_place(buffers) == most_live(buffers));
    }
}

// Placements whose arena is known.
void test_known() {
    std::vector<Buffer> none;
    CHECK(checked_place(none) == 0);
    std::vector<Buffer> one = {buffer(100, 0, 0)};
    CHECK(checked_place(one) == 128);
    std::vector<Buffer> apart = {buffer(640, 0, 1), buffer(640, 2, 3), buffer(320, 1, 2)};
    CHECK(checked_place(apart) == 960);
    // A shortcut: kept from the first step to the last, while others come and go above it.
    std::vector<Buffer> shortcut = {buffer(256, 0, 3), buffer(512, 0, 1), buffer(512, 1, 2), buffer(512, 2, 3)};
    CHECK(checked_place(shortcut) == 1280);
    std::vector<Buffer> meeting = {buffer(128, 0, 2), buffer(64, 2, 4), buffer(128, 4, 6), buffer(64, 0, 0),
                                   buffer(64, 6, 6)};
    CHECK(checked_place(meeting) == 192);
    // In this order, each at its lowest place, the last one would lie above the first and the third.
    std::vector<Buffer> tie = {buffer(64, 4, 5), buffer(64, 1, 2), buffer(64, 1, 3), buffer(64, 3, 5)};
    CHECK(checked_place(tie) == 128);
}

void test_live() {
    const std::vector<Buffer> buffers = {
        {"map", 100, 0, 2, false, 0}, {"scratch", 30, 1, 1, true, 0}, {"other", 7, 2, 3, false, 0}};
    CHECK(rd::live_at(buffers, 0).maps == 100 && rd::live_at(buffers, 0).scratch == 0);
    CHECK(rd::live_at(buffers, 1).maps == 100 && rd::live_at(buffers, 1).scratch == 30);
    CHECK(rd::live_at(buffers, 2).maps == 107 && rd::live_at(buffers, 4).maps == 0);
}

}  // namespace

int main() {
    test_random_lives();
    test_chains();
    test_known();
    test_live();
}
