// Windows as tiles read them: at every position of the line, each tap meets the pixel that the convolution wants.
#include "window.h"

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
    step.kernel_h = random.between(1, 5);
    step.kernel_w = random.between(1, 5);
    step.stride = random.between(1, 3);
    step.padding = random.between(0, 2);
    const int height = random.between(step.kernel_h, 12), width = random.between(step.kernel_w, 12);
    const int out_height = (height + 2 * step.padding - step.kernel_h) / step.stride + 1;
    const int out_width = (width + 2 * step.padding - step.kernel_w) / step.stride + 1;
    const int first = random.below(out_height), rows = random.between(1, out_height - first);
    describe("a map of %d x %d, kernel %d x %d, stride %d, padding %d, rows %d to %d", height, width, step.kernel_h,
             step.kernel_w, step.stride, step.padding, first, first + rows - 1);
    std::vector<int> map(static_cast<std::size_t>(height * width));
    for (std::size_t i = 0; i < map.size(); i++) map[i] = static_cast<int>(i) + 1;
    const Window window(step, height, width, out_width, sizeof(int));
    const test::Array<int> planes(window.bytes(rows) / sizeof(int), -1);
    const auto row = [&](int y) {
        CHECK(y >= 0 && y < height);
        return reinterpret_cast<const std::byte *>(map.data() + y * width);
    };
    window.copy(first, rows, row, reinterpret_cast<std::byte *>(planes.data()));
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
