#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <limits>

#include "error.h"

namespace rd {
namespace {

bool overlap_in_time(const Buffer &a, const Buffer &b) { return a.first <= b.last && b.first <= a.last; }

// The lowest offset at which `buffer` fits between those already placed.
std::size_t lowest_fit(const Buffer &buffer, const std::vector<Buffer *> &placed) {
    std::size_t offset = 0;
    for (const Buffer *other : placed) {  // by ascending offset
        if (!overlap_in_time(buffer, *other)) continue;
        if (offset + aligned(buffer.bytes) <= other->offset) break;
        offset = std::max(offset, other->offset + aligned(other->bytes));
    }
    return offset;
}

// Place buffers in an order, each at the lowest place that is free throughout its life; returns the arena's bytes.
std::size_t place_in_order(const std::vector<Buffer *> &order) {
    std::vector<Buffer *> placed;
    std::size_t arena = 0;
    for (Buffer *buffer : order) {
        buffer->offset = lowest_fit(*buffer, placed);
        arena = std::max(arena, buffer->offset + aligned(buffer->bytes));
        placed.insert(std::upper_bound(placed.begin(), placed.end(), buffer,
                                       [](const Buffer *a, const Buffer *b) { return a->offset < b->offset; }),
                      buffer);
    }
    return arena;
}

// No arena can be smaller than what lives at one step.
std::size_t lower_bound(const std::vector<Buffer> &buffers) {
    std::size_t bound = 0;
    for (const Buffer &at : buffers) {  // the live set is largest where some buffer begins
        std::size_t live = 0;
        for (const Buffer &buffer : buffers)
            if (buffer.first <= at.first && at.first <= buffer.last) live += aligned(buffer.bytes);
        bound = std::max(bound, live);
    }
    return bound;
}

}  // namespace

std::size_t place(std::vector<Buffer> &buffers) {
    constexpr int tries = 64;
    std::vector<Buffer *> order;
    for (Buffer &buffer : buffers) order.push_back(&buffer);
    std::stable_sort(order.begin(), order.end(), [](const Buffer *a, const Buffer *b) { return a->bytes > b->bytes; });
    std::vector<Buffer *> best;
    std::size_t least = std::numeric_limits<std::size_t>::max();
    const std::size_t bound = lower_bound(buffers);
    for (int attempt = 0; attempt < tries && least > bound; attempt++) {
        const std::size_t arena = place_in_order(order);
        if (arena < least) {
            least = arena;
            best = order;
        }
        std::stable_partition(order.begin(), order.end(),
                              [arena](const Buffer *b) { return b->offset + aligned(b->bytes) == arena; });
    }
    return place_in_order(best);
}

Live live_at(const std::vector<Buffer> &buffers, int step) {
    Live live;
    for (const Buffer &buffer : buffers)
        if (buffer.first <= step && step <= buffer.last) (buffer.scratch ? live.scratch : live.maps) += buffer.bytes;
    return live;
}

void trace_maxima(const std::vector<Buffer> &buffers, const std::vector<std::string> &steps, std::size_t arena) {
    std::size_t largest = 0;
    for (int step = 0; step < static_cast<int>(steps.size()); step++) {
        const Live live = live_at(buffers, step);
        if (live.maps + live.scratch <= largest) continue;
        largest = live.maps + live.scratch;
        std::fprintf(stderr, "rd: %10zu bytes live at %s:", largest,
                     printable(steps[static_cast<std::size_t>(step)]).c_str());
        for (const Buffer &buffer : buffers)
            if (buffer.first <= step && step <= buffer.last)
                std::fprintf(stderr, " %s %zu@%zu", printable(buffer.name).c_str(), buffer.bytes, buffer.offset);
        std::fputc('\n', stderr);
    }
    std::fprintf(stderr, "rd: %10zu bytes of arena\n", arena);
}

}  // namespace rd
