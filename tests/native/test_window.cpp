// Windows as tiles read them: at every position of the line, each tap meets the pixel that the convolution wants.
#include "window.h"

#include <algorithm>
#include <vector>

#include "checks.h"

namespace {

using rd::Window;
using test::describe;
using test::Random;

constexpr std::uint64_t kSeed = 20261130;
constexpr int kCases = 400;

// Pixels of four bytes: their number, 0 outside the map.
void test_window(Random &random) {
    rd::Step step;
    const int most = random.any({3, 3, 5, 16});
    step.kernel_h = random.between(1, most);
    step.kernel_w = random.between(1, most);
    step.stride = random.between(1, random.any({2, 3, 16}));
    step.padding = random.between(0, random.any({1, 2, 15}));
    const int height = random.between(step.kernel_h, 20), width = random.between(step.kernel_w, 20);
    const int out_height = (height + 2 * step.padding - step.kernel_h) / step.stride + 1;
    const int out_width = (width + 2 * step.padding - step.kernel_w) / step.stride + 1;
    const int first = random.below(out_height), rows = random.between(1, out_height - first);
    describe("a map of %d x %d, kernel %d x %d, stride %d, padding %d, rows %d to %d", height, width, step.kernel_h,
             step.kernel_w, step.stride, step.padding, first, first + rows - 1);
    std::vector<int> map(static_cast<std::size_t>(height * width));
    for (std::size_t i = 0; i < map.size(); i++) map[i] = static_cast<int>(i) + 1;
    const Window window(step, height, width, out_width, sizeof(int));
    const test::Array<int> planes(window.bytes(rows) / sizeof(int), -1);
    int lowest = height, highest = -1;
    const auto row = [&](int y) {
        CHECK(y >= 0 && y < height);
        lowest = std::min(lowest, y);
        highest = std::max(highest, y);
        return reinterpret_cast<const std::byte *>(map.data() + y * width);
    };
    window.copy(first, rows, row, reinterpret_cast<std::byte *>(planes.data()));
    // Of a ring of rows no more may be read than a window covers.
    CHECK(lowest >= std::max(0, first * step.stride - step.padding) || highest < 0);
    CHECK(highest < std::max(0, (first + rows - 1) * step.stride - step.padding + step.kernel_h));
    for (int y = 0; y < rows; y++)
        for (int x = 0; x < out_width; x++)
            for (int ky = 0; ky < step.kernel_h; ky++)
                for (int kx = 0; kx < step.kernel_w; kx++) {
                    const int at_y = (first + y) * step.stride + ky - step.padding;
                    const int at_x = x * step.stride + kx - step.padding;
                    const bool inside = at_y >= 0 && at_y < height && at_x >= 0 && at_x < width;
                    const int position = y * window.width + x;
                    CHECK(position < window.positions(rows));
                    const int found =
                        planes[window.tap(rows, ky, kx) / sizeof(int) + static_cast<std::size_t>(position)];
                    CHECK(found == (inside ? map[static_cast<std::size_t>(at_y * width + at_x)] : 0));
                }
}

}  // namespace

int main() {
    for (int i = 0; i < kCases; i++) {
        Random random(kSeed + static_cast<std::uint64_t>(i));
        test_window(random);
    }
}
