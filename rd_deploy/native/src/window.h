// A convolution's window as tiles read it: pixels at a constant distance, tap by tap.
//
// Where a row of a map ends, the next pixel is not the next one of a tap: rows overlap by the padding, and strides skip
// pixels. So the rows that a chunk of outputs needs are copied with their padding, and the outputs computed as if
// those rows were one line: output (y, x) stands at position y * width + x of the line, and what is computed at the few
// positions between two rows is dropped. Of a stride, each phase (pixels that are a multiple of it apart) is a
// plane of its own, so that every tap's pixels are neighbours.
#pragma once

#include <algorithm>
#include <cstring>

#include "network.h"

namespace rd {

constexpr int whole_groups(int pixels, int group) { return (pixels + group - 1) / group * group; }

struct Window {
    int stride = 1, padding = 0, kernel_h = 1, kernel_w = 1;
    int phases_h = 1, phases_w = 1;  // those that a tap meets
    int out_width = 0, in_height = 0, in_width = 0;
    int width = 0;          // pixels of a plane's row
    std::size_t pixel = 0;  // bytes

    Window() = default;
    Window(const Step &step, int input_height, int input_width, int output_width, std::size_t pixel_bytes)
        : stride(step.stride),
          padding(step.padding),
          kernel_h(step.kernel_h),
          kernel_w(step.kernel_w),
          phases_h(std::min(step.stride, step.kernel_h)),
          phases_w(std::min(step.stride, step.kernel_w)),
          out_width(output_width),
          in_height(input_height),
          in_width(input_width),
          width(output_width + (step.kernel_w - 1) / step.stride),
          pixel(pixel_bytes) {}

    // Of a plane, for so many rows of outputs.
    std::size_t row_bytes() const { return static_cast<std::size_t>(width) * pixel; }
    std::size_t plane_bytes(int rows) const {
        return static_cast<std::size_t>(rows + (kernel_h - 1) / stride) * row_bytes();
    }
    // From the first output of so many rows to the last one.
    int positions(int rows) const { return (rows - 1) * width + out_width; }
    // All planes of one image, of so many rows of outputs.
    std::size_t bytes(int rows) const { return static_cast<std::size_t>(phases_h * phases_w) * plane_bytes(rows); }
    // The first output's pixel of a tap.
    std::size_t tap(int rows, int ky, int kx) const {
        const int phase = ky % stride * phases_w + kx % stride;
        return static_cast<std::size_t>(phase) * plane_bytes(rows) +
               static_cast<std::size_t>(ky / stride * width + kx / stride) * pixel;
    }

    // Copies what `rows` rows of outputs from `first` on need; row(y) gives a row of the image.
    template <class Row>
    void copy(int first, int rows, const Row &row, std::byte *to) const {
        for (int phase = 0; phase < phases_h * phases_w; phase++, to += plane_bytes(rows)) {
            const int met = rows + (kernel_h - 1 - phase / phases_w) / stride;  // lines that a tap meets
            std::byte *at = to;
            for (int line = 0; line < met; line++, at += row_bytes()) {
                const int y = (first + line) * stride + phase / phases_w - padding;
                if (y < 0 || y >= in_height)
                    std::memset(at, 0, row_bytes());
                else
                    copy_line(row(y), phase % phases_w - padding, at);
            }
        }
    }

  private:
    // Every stride-th pixel from `x` on, zeros outside.
    void copy_line(const std::byte *row, int x, std::byte *to) const {
        const int before = x < 0 ? std::min((-x + stride - 1) / stride, width) : 0, left = in_width - 1 - x;
        const int inside = left < 0 ? 0 : std::min(left / stride + 1, width);  // the first one that is not
        const auto bytes = [this](int pixels) { return static_cast<std::size_t>(pixels) * pixel; };
        std::memset(to, 0, bytes(before));
        if (inside > before) {
            const std::byte *from = row + bytes(x + before * stride);
            if (stride == 1) {
                std::memcpy(to + bytes(before), from, bytes(inside - before));
            } else {
                for (int i = before; i < inside; i++, from += bytes(stride)) std::memcpy(to + bytes(i), from, pixel);
            }
        }
        const int end = std::max(before, inside);
        std::memset(to + bytes(end), 0, bytes(width - end));
    }
};

}  // namespace rd
