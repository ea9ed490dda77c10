// Small networks for the C++ tests: random weights, their .rdp file, and what they compute, in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "checks.h"
#include "rdp.h"

namespace test {

constexpr int kImages = -1, kNothing = -2;

// Everything that a convolution may differ in.
struct Conv {
    int source, out;
    int kernel_h = 3, kernel_w = 3, stride = 1, padding = 1;
    bool relu = true;
    int add = kNothing;
};

class Network {
  public:
    // The images: channels, height, width. `bf16`: of the weights and maps.
    Network(bool bf16, int channels, int height, int width, std::uint64_t seed = 1)
        : bf16_(bf16), images_{channels, height, width}, random_(seed) {}

    // Each returns the number of its output, which later steps may read.
    int conv(const Conv &c) {
        const Size in = size(c.source);
        Step step{"conv", c, in, {c.out, slides(in.height, c.kernel_h, c), slides(in.width, c.kernel_w, c)}, {}, {}};
        draw_weights(step, in.channels * c.kernel_h * c.kernel_w);
        return append(step);
    }
    int pointwise(int source, int out, bool relu = true, int add = kNothing) {
        return conv({source, out, 1, 1, 1, 0, relu, add});
    }
    int max_pool(int source, int kernel, int stride, int padding) {
        const Conv window{source, 0, kernel, kernel, stride, padding};
        const Size in = size(source);
        return append({"maxpool",
                       window,
                       in,
                       {in.channels, slides(in.height, kernel, window), slides(in.width, kernel, window)},
                       {},
                       {}});
    }
    // The average over the last map's pixels, and the classifier.
    void finish(int classes) {
        const int last = static_cast<int>(steps_.size()) - 1;
        const Size in = size(last);
        append({"avgpool", {last, 0}, in, {in.channels, 1, 1}, {}, {}});
        Step linear{"linear", {last + 1, classes, 1, 1, 1, 0, false}, {in.channels, 1, 1}, {classes, 1, 1}, {}, {}};
        draw_weights(linear, in.channels);
        append(linear);
    }

    int steps() const { return static_cast<int>(steps_.size()); }
    int classes() const { return steps_.back().out.channels; }
    int channels(int number) const { return size(number).channels; }
    int height(int number) const { return size(number).height; }
    int width(int number) const { return size(number).width; }
    bool bf16() const { return bf16_; }
    std::size_t image_values() const { return images_.values(); }
    // Bytes of a map of one image, as the engine stores it.
    std::size_t map_bytes(int number) const {
        const Size map = size(number);
        return up(static_cast<std::size_t>(map.channels), 16) * static_cast<std::size_t>(map.height * map.width) *
               (bf16_ ? 2 : 4);
    }
    // Multiply-accumulates for one image.
    std::uint64_t macs() const {
        std::uint64_t sum = 0;
        for (const Step &step : steps_)
            sum += step.weights.size() * static_cast<std::uint64_t>(step.out.height * step.out.width);
        return sum;
    }

    // For messages.
    std::string description() const {
        std::vector<std::byte> weights;
        return json(weights);
    }

    // Images of random values, (count, channels, height, width).
    std::vector<float> images(int count) const {
        Random random(7);
        std::vector<float> values(static_cast<std::size_t>(count) * images_.values());
        for (float &value : values) value = random.value();
        return values;
    }

    // Its .rdp file, as docs/rdp.md says.
    Array<std::byte> file() const {
        std::vector<std::byte> weights;
        const std::string text = json(weights);
        const std::size_t at = up(sizeof(rd::rdp::Header) + text.size(), 64);
        Array<std::byte> file(at + weights.size());
        rd::rdp::Header header{{}, rd::rdp::kVersion, 0, sizeof header, text.size(), at, weights.size(), file.size(),
                               0};
        std::memcpy(header.magic, rd::rdp::kMagic, sizeof header.magic);
        std::memcpy(file.data(), &header, sizeof header);
        std::memcpy(file.data() + sizeof header, text.data(), text.size());
        std::memcpy(file.data() + at, weights.data(), weights.size());
        header.checksum = rd::rdp::checksum(file.data(), file.size());
        std::memcpy(file.data(), &header, sizeof header);
        return file;
    }

    // The logits of one image in float64; maps are rounded to bfloat16 where the engine stores them so.
    std::vector<double> logits(const float *image) const {
        std::vector<std::vector<double>> maps;
        std::vector<double> input;
        for (std::size_t i = 0; i < images_.values(); i++) input.push_back(stored(static_cast<double>(image[i])));
        for (const Step &step : steps_) {
            const std::vector<double> &in =
                step.window.source == kImages ? input : maps[static_cast<std::size_t>(step.window.source)];
            maps.push_back(
                run(step, in, step.window.add < 0 ? nullptr : &maps[static_cast<std::size_t>(step.window.add)]));
        }
        return maps.back();
    }

  private:
    struct Size {
        int channels, height, width;
        std::size_t values() const {
            return static_cast<std::size_t>(channels) * static_cast<std::size_t>(height * width);
        }
    };
    struct Step {
        std::string op;
        Conv window;  // of a pooling too; a linear layer is a 1x1 convolution
        Size in, out;
        std::vector<float> weights, bias;  // (out, in, height, width)
    };

    static std::size_t up(std::size_t value, std::size_t multiple) {
        return (value + multiple - 1) / multiple * multiple;
    }
    static int slides(int side, int kernel, const Conv &window) {
        return (side + 2 * window.padding - kernel) / window.stride + 1;
    }
    const Size &size(int number) const {
        return number == kImages ? images_ : steps_[static_cast<std::size_t>(number)].out;
    }

    int append(const Step &step) {
        steps_.push_back(step);
        return static_cast<int>(steps_.size()) - 1;
    }

    // He et al. 2015: outputs vary about as much as inputs.
    void draw_weights(Step &step, int fan_in) {
        const float scale = std::sqrt(6 / static_cast<float>(fan_in));
        step.weights.resize(static_cast<std::size_t>(step.out.channels) * static_cast<std::size_t>(fan_in));
        for (float &weight : step.weights)
            weight = static_cast<float>(stored(static_cast<double>(random_.value() * scale)));
        step.bias.resize(static_cast<std::size_t>(step.out.channels));
        for (float &bias : step.bias) bias = random_.value() / 4;
    }

    double stored(double value) const {
        return static_cast<double>(bf16_ ? from_bf16(to_bf16(static_cast<float>(value))) : static_cast<float>(value));
    }

    // --- the file

    std::string json(std::vector<std::byte> &weights) const {
        std::string steps, classes, constants;
        for (std::size_t i = 0; i < steps_.size(); i++)
            steps += (i > 0 ? "," : "") + json(steps_[i], static_cast<int>(i), weights);
        for (int i = 0; i < this->classes(); i++)
            classes += (i > 0 ? ",\"class " : "\"class ") + std::to_string(i) + "\"";
        for (int i = 0; i < images_.channels; i++) constants += i > 0 ? ",0.5" : "0.5";
        const std::string size = std::to_string(std::min(images_.height, images_.width));
        return std::string("{\"format\":\"residual-distillation-rdp/1\",\"name\":\"small\",\"precision\":\"") +
               (bf16_ ? "bf16" : "fp32") + "\",\"input\":" + list({images_.channels, images_.height, images_.width}) +
               ",\"steps\":[" + steps + "],\"preprocessing\":{\"size\":" + size + ",\"resize\":" + size +
               ",\"pad\":0,\"channels\":" + std::to_string(images_.channels) + ",\"mean\":[" + constants +
               "],\"std\":[" + constants + "]},\"classes\":[" + classes +
               "],\"arch\":{},\"provenance\":{},\"weights_sha256\":\"" + std::string(64, '0') + "\"}";
    }

    static std::string list(std::initializer_list<int> values) {
        std::string text;
        for (const int value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
        return "[" + text + "]";
    }

    static std::string name(int number) {
        return number == kImages ? "\"images\"" : "\"map" + std::to_string(number) + "\"";
    }

    std::string json(const Step &step, int number, std::vector<std::byte> &weights) const {
        const Conv &c = step.window;
        const std::string window =
            ",\"stride\":" + std::to_string(c.stride) + ",\"padding\":" + std::to_string(c.padding);
        std::string text = "{\"op\":\"" + step.op + "\",\"name\":" + name(number) + ",\"source\":" + name(c.source);
        if (step.op == "maxpool") text += ",\"kernel\":" + std::to_string(c.kernel_h) + window;
        if (step.op == "conv") {
            text += ",\"kernel\":" + list({c.kernel_h, c.kernel_w}) + window +
                    ",\"relu\":" + (c.relu ? "true" : "false") + ",\"add\":" + (c.add < 0 ? "null" : name(c.add));
        }
        if (!step.weights.empty()) text += packed(step, weights);
        return text + "}";
    }

    // Appends a step's packed weights and bias; returns their part of the JSON.
    std::string packed(const Step &step, std::vector<std::byte> &weights) const {
        const Conv &c = step.window;
        const bool rows = c.source == kImages;  // a tap per row of the kernel
        const int row = rows ? c.kernel_w * step.in.channels : step.in.channels,
                  taps = rows ? c.kernel_h : c.kernel_h * c.kernel_w;
        const std::size_t pitch = up(static_cast<std::size_t>(row), rows ? 32 : 16),
                          blocks = up(static_cast<std::size_t>(c.out), 16) / 16;
        const Elements matrix(bf16_ ? Format::bf16 : Format::fp32,
                              blocks * static_cast<std::size_t>(taps) * pitch * 16);
        const std::size_t at = weights.size(), bias = at + matrix.size() * matrix.width();
        for (std::size_t i = 0; i < matrix.size(); i++) matrix.set(i, 0);
        for (int n = 0; n < c.out; n++)
            for (int i = 0; i < step.in.channels; i++)
                for (int y = 0; y < c.kernel_h; y++)
                    for (int x = 0; x < c.kernel_w; x++) {
                        const int tap = rows ? y : y * c.kernel_w + x, k = rows ? x * step.in.channels + i : i;
                        const std::size_t first = static_cast<std::size_t>(n / 16 * taps + tap) * pitch * 16;
                        const int within = bf16_ ? (k / 2 * 16 + n % 16) * 2 + k % 2 : k * 16 + n % 16;
                        matrix.set(first + static_cast<std::size_t>(within), step.weights[weight(step, n, i, y, x)]);
                    }
        weights.resize(bias + blocks * 16 * sizeof(float));
        std::memcpy(&weights[at], matrix.at(0), bias - at);
        std::memcpy(&weights[bias], step.bias.data(), step.bias.size() * sizeof(float));
        return ",\"in\":" + std::to_string(step.in.channels) + ",\"out\":" + std::to_string(c.out) +
               ",\"weight\":" + std::to_string(at) + ",\"bias\":" + std::to_string(bias);
    }

    static std::size_t weight(const Step &step, int n, int i, int y, int x) {
        const Conv &c = step.window;
        return static_cast<std::size_t>(((n * step.in.channels + i) * c.kernel_h + y) * c.kernel_w + x);
    }

    // --- what it computes

    std::vector<double> run(const Step &step, const std::vector<double> &in, const std::vector<double> *add) const {
        if (step.op == "avgpool") return average(step, in);
        std::vector<double> out;
        for (int n = 0; n < step.out.channels; n++)
            for (int y = 0; y < step.out.height; y++)
                for (int x = 0; x < step.out.width; x++) {
                    double value = step.op == "maxpool" ? largest(step, in, n, y, x) : sum(step, in, n, y, x);
                    if (add) value += (*add)[out.size()];
                    if (step.op == "conv" && step.window.relu) value = std::max(value, 0.0);
                    out.push_back(step.op == "linear" ? value : stored(value));
                }
        return out;
    }

    std::vector<double> average(const Step &step, const std::vector<double> &in) const {
        const std::size_t pixels = static_cast<std::size_t>(step.in.height * step.in.width);
        std::vector<double> out(static_cast<std::size_t>(step.out.channels));
        for (std::size_t i = 0; i < in.size(); i++) out[i / pixels] += in[i] / static_cast<double>(pixels);
        for (double &value : out) value = stored(value);
        return out;
    }

    // Calls visit(value, y, x) with the pixels of channel i that a window covers, (y, x) within the window.
    template <class Visit>
    static void visit_window(const Step &step, const std::vector<double> &in, int i, int y, int x, Visit visit) {
        const Conv &c = step.window;
        for (int ky = 0; ky < c.kernel_h; ky++)
            for (int kx = 0; kx < c.kernel_w; kx++) {
                const int row = y * c.stride - c.padding + ky, column = x * c.stride - c.padding + kx;
                if (row < 0 || row >= step.in.height || column < 0 || column >= step.in.width) continue;
                visit(in[static_cast<std::size_t>((i * step.in.height + row) * step.in.width + column)], ky, kx);
            }
    }

    static double sum(const Step &step, const std::vector<double> &in, int n, int y, int x) {
        double total = static_cast<double>(step.bias[static_cast<std::size_t>(n)]);
        for (int i = 0; i < step.in.channels; i++)
            visit_window(step, in, i, y, x, [&](double value, int ky, int kx) {
                total += value * static_cast<double>(step.weights[weight(step, n, i, ky, kx)]);
            });
        return total;
    }

    static double largest(const Step &step, const std::vector<double> &in, int n, int y, int x) {
        double found = -INFINITY;
        visit_window(step, in, n, y, x, [&](double value, int, int) { found = std::max(found, value); });
        return found;
    }

    bool bf16_;
    Size images_;
    Random random_;
    std::vector<Step> steps_;
};

// Networks of every kind of step that fit together at random; sides up to `side` pixels.
class RandomNetwork {
  public:
    RandomNetwork(std::uint64_t seed, int side)
        : random_(seed),
          network_(random_.flip(), random_.between(1, 4), random_.between(1, side), random_.between(1, side), seed) {}

    Network run() {
        while (!convolution(kImages)) {
        }
        for (int steps = random_.between(0, 8); steps > 0; steps--) {
            const int kind = random_.below(8);
            if (kind == 0)
                pool(last());
            else if (kind == 1)
                branch(random_.between(kImages, last()));
            else
                convolution(last());
        }
        network_.finish(random_.between(1, 40));
        return network_;
    }

  private:
    int last() const { return network_.steps() - 1; }

    Conv any_window(int source) {
        const int sizes[] = {1, 1, 1, 3, 3, 3, 3, 2, source == kImages ? 7 : 4};
        Conv c{source, random_.any({3, 8, 16, 16, 17, 32, 48}), random_.any(sizes), 0, 1, 0, random_.below(4) > 0};
        c.kernel_w = random_.below(8) ? c.kernel_h : random_.any(sizes);
        c.stride = random_.below(4) ? 1 : random_.between(2, 3);
        c.padding = random_.below(4) ? c.kernel_h / 2 : random_.below(4);
        return c;
    }
    bool fits(const Conv &c) const { return rows(c) >= 1 && columns(c) >= 1; }
    int rows(const Conv &c) const { return slides(network_.height(c.source), c.kernel_h, c); }
    int columns(const Conv &c) const { return slides(network_.width(c.source), c.kernel_w, c); }
    static int slides(int side, int kernel, const Conv &c) {
        const int room = side + 2 * c.padding - kernel;
        return room < 0 ? 0 : room / c.stride + 1;
    }

    bool convolution(int source) {
        Conv c = any_window(source);
        if (!fits(c)) return false;
        if (random_.flip() && source >= 0) c.out = network_.channels(source);
        c.add = any_like(c.out, rows(c), columns(c));
        network_.conv(c);
        return true;
    }

    // A convolution of an earlier map, or of the images, to which the last map is added, as in a projection shortcut.
    void branch(int source) {
        Conv c = any_window(source);
        c.add = last();
        c.out = network_.channels(last());
        if (fits(c) && rows(c) == network_.height(last()) && columns(c) == network_.width(last())) network_.conv(c);
    }

    void pool(int source) {
        const int kernel = random_.between(1, 4), padding = random_.below(kernel / 2 + 1);
        if (std::min(network_.height(source), network_.width(source)) + 2 * padding < kernel) return;
        network_.max_pool(source, kernel, random_.between(1, 3), padding);
    }

    // A map of this shape, or nothing.
    int any_like(int channels, int height, int width) {
        std::vector<int> found;
        for (int i = 0; i < network_.steps(); i++)
            if (network_.channels(i) == channels && network_.height(i) == height && network_.width(i) == width)
                found.push_back(i);
        if (found.empty() || random_.below(3) == 0) return kNothing;
        return found[static_cast<std::size_t>(random_.below(static_cast<int>(found.size())))];
    }

    Random random_;
    Network network_;
};

}  // namespace test
