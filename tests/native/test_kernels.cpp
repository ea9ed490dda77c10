// Every kernel of every instruction set that this CPU has, and AMX's with emulated tiles, against float64.
//
// Inputs are rounded to the table's precision first, so what may differ from float64 is the rounding that the kernel
// does itself. With u the unit roundoff (2^-24 for float32, 2^-8 for bfloat16) and gamma(n) = n u / (1 - n u) for
// float32's, a sum of n float32 terms differs by at most gamma(n) times the sum of the terms' magnitudes, whatever the
// order (Higham 2002, "Accuracy and stability of numerical algorithms", section 4.2), and an output rounded once more
// by at most u of what it is. Where each number is two bfloat16, u is 2^-17, a product is a sum of three terms, and up
// to 2^-18 of it is left out. Every check asserts that bound for each element, and that a wrong weight exceeds it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "isa.h"

// Beside the library's copy, which is compiled for real tiles. Its vectors pass between functions of this file only.
#define RD_EMULATE_TILES
#define RD_GROUP_BYTES 6000  // so that the products below have several groups of weights
#define amx_bf16_kernels emulated_amx_bf16_kernels
#define amx_bf16x2_kernels emulated_amx_bf16x2_kernels
#pragma GCC diagnostic ignored "-Wpsabi"
#include "kernels/amx_bf16.cpp"
#include "kernels/amx_bf16x2.cpp"
#undef amx_bf16_kernels
#undef amx_bf16x2_kernels

namespace {

using rd::Kernels;
using rd::Product;
using test::describe;
using test::Elements;
using test::Format;
using test::Random;

constexpr std::uint64_t kSeed = 20261125;
constexpr int kProducts = 60, kConvolutions = 16, kPools = 10;  // cases per table
constexpr int kLane = 16;

std::size_t index(int i) { return static_cast<std::size_t>(i); }
double gamma(int n) { return n * 0x1p-24 / (1 - n * 0x1p-24); }
// Of an output that was computed in float32.
double roundoff(Format format) { return format == Format::bf16 ? 0x1p-8 : format == Format::bf16x2 ? 0x1p-17 : 0; }

Format format_of(const Kernels &table) {
    return table.place ? Format::bf16x2 : table.bf16 ? Format::bf16 : Format::fp32;
}
const char *name(Format format) { return format == Format::bf16 ? "bf16" : "fp32"; }  // of the network

using Values = std::vector<double>;

// Adds the products of two lists, and their magnitudes.
void add_products(const Values &a, const Values &b, double &sum, double &magnitude) {
    const double *const x = a.data(), *const y = b.data();
    for (std::size_t i = 0; i < a.size(); i++) {
        sum += x[i] * y[i];
        magnitude += std::abs(x[i] * y[i]);
    }
}

// --- products

// A product on random lists of pixels.
class ProductCase {
  public:
    ProductCase(Random &random, const Kernels &table)
        : table_(table),
          format_(format_of(table)),
          shape_(random, format_),
          out_format_(shape_.raw ? Format::fp32 : format_),
          a_(format_, shape_.step * (kPool - 1) + index(shape_.k_pitch), index(shape_.k_pitch)),
          zeros_(format_, index(shape_.k_pitch), index(shape_.k_pitch)),
          w_(table.bf16 ? Format::bf16 : Format::fp32, shape_.blocks * shape_.block()),
          packed_(w_.size() * w_.width()),
          bias_(index(shape_.blocks * kLane)),
          before_(out_format_, shape_.row() * index(shape_.pixels), shape_.row()),
          out_(out_format_, before_.size(), shape_.row()),
          added_(format_, shape_.add_row * index(shape_.pixels), shape_.add_row) {
        for (std::size_t i = 0; i < a_.size(); i++) a_.set(i, shape_.value(random));
        for (std::size_t i = 0; i < zeros_.size(); i++) zeros_.set(i, 0);
        fill_weights(random);
        for (std::size_t i = 0; i < bias_.size(); i++) bias_[i] = random.value();
        before_.randomise(random);
        added_.randomise(random);
        list_pixels(random);
    }

    // The product of the blocks and pixels from the first to before the last; the first pixel begins a group.
    void run(int pixel, int pixels, int block, int blocks) {
        Product p{};
        std::vector<const void *> a, add;
        std::vector<void *> out;
        const int group = table_.group, groups = (shape_.a_pitch + group - 1) / group;
        for (int i = 0; i < shape_.taps * groups; i++) {
            const int at = listed_[index(i / groups * shape_.a_pitch + i % groups * group)];
            a.push_back(at < 0 ? zeros_.at(0) : a_.at(shape_.step * index(at)));
        }
        for (const int at : rows_) {
            out.push_back(out_.at(shape_.row() * index(at)));
            add.push_back(shape_.in_place ? out.back() : added_.at(shape_.add_row * index(at)));
        }
        p.a = a.data() + pixel / group;
        p.a_pitch = groups;
        p.step = group > 1 ? static_cast<std::ptrdiff_t>(index(distance_) * shape_.step * a_.width()) : 0;
        p.taps = shape_.taps;
        p.k = shape_.k;
        p.k_pitch = shape_.k_pitch;
        p.pixels = pixels;
        p.w_block = shape_.block() * w_.width();
        p.w = weights() + index(block) * p.w_block;
        p.blocks = blocks;
        p.bias = shape_.bias ? bias_.data() + block * kLane : nullptr;
        p.add = shape_.add ? add.data() + pixel : nullptr;
        p.out = out.data() + pixel;
        p.offset = shape_.offset + block * kLane;
        p.out_pitch = static_cast<int>(shape_.row());
        p.add_offset = (shape_.in_place ? shape_.offset : shape_.add_offset) + block * kLane;
        p.add_pitch = static_cast<int>(shape_.in_place ? shape_.row() : shape_.add_row);
        p.relu = shape_.relu;
        p.raw = shape_.raw;
        p.next = shape_.next ? weights() : nullptr;
        table_.product(p);
    }

    void run() {
        out_.copy(before_);
        run(0, shape_.pixels, 0, shape_.blocks);
    }

    // The largest error, as a share of what rounding may cause. Elements that are not outputs must not change.
    double worst() const {
        const std::vector<Values> inputs = all_inputs(), weights = all_weights();
        double largest = 0;
        for (int pixel = 0; pixel < shape_.pixels; pixel++) {
            const std::size_t row = shape_.row() * index(rows_[index(pixel)]);
            for (int n = 0; n < shape_.blocks * kLane; n++)
                largest = std::max(largest, error(inputs[index(pixel)], weights[index(n)], n, rows_[index(pixel)]));
            for (std::size_t i = 0; i < shape_.row(); i++) {
                const bool output = i >= index(shape_.offset) && i < index(shape_.offset + shape_.blocks * kLane);
                CHECK(output || out_.is_same(before_, row + i));
            }
        }
        return largest;
    }

    // A pixel's result does not depend on its neighbours in the list, nor an output's on the other blocks.
    void check_independence(Random &random) {
        run();
        const Elements together(out_format_, out_.size());
        together.copy(out_);
        out_.copy(before_);
        for (int pixel = 0; pixel < shape_.pixels;) {
            const int some = random.between(1, shape_.pixels - pixel);
            const int pixels = std::min((some + table_.group - 1) / table_.group * table_.group, shape_.pixels - pixel);
            for (int block = 0; block < shape_.blocks;) {
                const int blocks = random.between(1, shape_.blocks - block);
                run(pixel, pixels, block, blocks);
                block += blocks;
            }
            pixel += pixels;
        }
        CHECK(std::memcmp(out_.at(0), together.at(0), out_.size() * out_.width()) == 0);
    }

    // The test must see a weight of the wrong sign, if any pixel meets it.
    void check_sensitivity(Random &random) {
        const int n = random.below(shape_.blocks * kLane), t = random.below(shape_.taps), i = random.below(shape_.k);
        const std::size_t at = weight(n, t, i);
        const double kept = w_.get(at);
        double met = 0;
        for (int pixel = 0; pixel < shape_.pixels; pixel++) met = std::max(met, std::abs(input(pixel, t, i)));
        if (shape_.relu || std::abs(kept) * met < 0.25) return;
        w_.set(at, static_cast<float>(-kept));
        run();
        w_.set(at, static_cast<float>(kept));
        CHECK(worst() > 1);
        sensitive_++;
    }
    static int sensitive_;

  private:
    static constexpr int kPool = 40;  // pixels of the map

    struct Shape {
        Shape(Random &random, Format format)
            : taps(random.any({1, 3, 9})),
              k_pitch(random.any({16, 32, 32, 48, 64, 64})),
              k(random.flip() ? k_pitch : k_pitch - random.below(16)),
              pixels(random.between(1, 33)),
              a_pitch(pixels + random.below(3)),
              blocks(random.between(1, 5)),
              offset(16 * random.below(3)),
              gap(random.below(4) ? 0 : 32),
              bias(random.below(4)),
              raw(random.below(4) == 0),
              relu(!raw && random.flip()),
              add(!raw && random.flip()),
              in_place(random.flip()),
              next(random.flip()),
              after(16 * random.below(2)),
              add_offset(16 * random.below(3)),
              add_row(index(add_offset + blocks * kLane + 16 * random.below(2))),
              ties(random.below(6) == 0) {
            // Pixels of a row of the images overlap; those of a map do not, nor do those whose elements are rearranged.
            step = taps == 3 ? index(random.between(1, 6)) : index(k_pitch + 16 * random.below(3));
            if (format == Format::bf16x2) step = index(k_pitch);
        }
        std::size_t block() const { return index(taps * k_pitch * kLane + gap); }
        std::size_t row() const { return index(offset + blocks * kLane + after); }
        // Of an input or a weight: any, or such as lie halfway between two bfloat16, which lose most.
        float value(Random &random) const {
            constexpr float halfway[] = {1 + 0x1p-8f, -1 - 0x1p-8f, 1 + 3 * 0x1p-8f, -1 - 3 * 0x1p-8f};
            return ties ? random.any(halfway) : random.value();
        }
        int taps, k_pitch, k, pixels, a_pitch, blocks, offset, gap;
        bool bias, raw, relu, add, in_place, next;
        int after, add_offset;  // elements behind the outputs, and before what is added
        std::size_t add_row;
        bool ties;
        std::size_t step;
    };

    // Where the weights of output n stand: as network.h says.
    std::size_t weight(int n, int t, int i) const {
        const std::size_t tap = index(n / kLane) * shape_.block() + index(t * shape_.k_pitch * kLane);
        return tap + index(table_.bf16 ? (i / 2 * kLane + n % kLane) * 2 + i % 2 : i * kLane + n % kLane);
    }

    void fill_weights(Random &random) {
        for (std::size_t i = 0; i < w_.size(); i++) w_.set(i, 0);
        for (int n = 0; n < shape_.blocks * kLane; n++)
            for (int t = 0; t < shape_.taps; t++)
                for (int i = 0; i < shape_.k; i++) {
                    const float value = shape_.value(random);
                    w_.set(weight(n, t, i), table_.pack ? test::upper_part(value) + test::lower_part(value) : value);
                }
    }

    // As the table reads them.
    const std::byte *weights() const {
        if (!table_.pack) return w_.at(0);
        for (int block = 0; block < shape_.blocks; block++) {
            const std::size_t first = index(block) * shape_.block() * w_.width();
            table_.pack(reinterpret_cast<const float *>(w_.at(0) + first), shape_.taps, shape_.k_pitch,
                        packed_.data() + first);
        }
        return packed_.data();
    }

    // Of each tap: neighbours, pixels at a distance, any, rows with padding between them, backwards, or always the
    // same.
    void list_pixels(Random &random) {
        listed_.assign(index(shape_.taps * shape_.a_pitch), 0);
        if (table_.group > 1) {
            list_groups(random);
        } else {
            list_any(random);
        }
        for (int pixel = 0; pixel < shape_.pixels; pixel++) rows_.push_back(pixel);
        if (random.flip()) std::reverse(rows_.begin(), rows_.end());
    }
    void list_any(Random &random) {
        for (int t = 0; t < shape_.taps; t++) {
            const int kind = random.below(6), first = random.below(kPool), width = random.between(3, 20);
            for (int pixel = 0; pixel < shape_.pixels; pixel++) {
                const int choices[] = {first + pixel,         first + 2 * pixel,
                                       random.below(kPool),   pixel % width ? first + pixel : -1,
                                       first + kPool - pixel, first};
                listed_[index(t * shape_.a_pitch + pixel)] = choices[kind] < 0 ? -1 : choices[kind] % kPool;
            }
        }
    }
    // Each group anywhere, at one distance for all, which may be none.
    void list_groups(Random &random) {
        distance_ = random.below(3);
        for (int t = 0; t < shape_.taps; t++) {
            int first = 0;
            for (int pixel = 0; pixel < shape_.a_pitch; pixel++) {
                const int at = pixel % table_.group;
                if (at == 0) first = random.below(kPool - distance_ * (table_.group - 1));
                listed_[index(t * shape_.a_pitch + pixel)] = first + at * distance_;
            }
        }
    }

    double input(int pixel, int t, int i) const {
        const int at = listed_[index(t * shape_.a_pitch + pixel)];
        return at < 0 ? 0 : a_.get(shape_.step * index(at) + index(i));
    }

    std::vector<Values> all_inputs() const {  // [pixel][taps * k]
        std::vector<Values> values(index(shape_.pixels));
        for (int pixel = 0; pixel < shape_.pixels; pixel++)
            for (int at = 0; at < shape_.taps * shape_.k; at++)
                values[index(pixel)].push_back(input(pixel, at / shape_.k, at % shape_.k));
        return values;
    }
    std::vector<Values> all_weights() const {  // [n][taps * k]
        std::vector<Values> values(index(shape_.blocks * kLane));
        for (int n = 0; n < shape_.blocks * kLane; n++)
            for (int at = 0; at < shape_.taps * shape_.k; at++)
                values[index(n)].push_back(w_.get(weight(n, at / shape_.k, at % shape_.k)));
        return values;
    }

    // The error of output n of a pixel, which stands in the given row, as a share of its bound.
    double error(const Values &input, const Values &weights, int n, int number) const {
        const std::size_t at = shape_.row() * index(number) + index(shape_.offset + n);
        double y = shape_.bias ? static_cast<double>(bias_[index(n)]) : 0, magnitude = std::abs(y);
        add_products(input, weights, y, magnitude);
        if (shape_.add) {
            const std::size_t other = shape_.add_row * index(number) + index(shape_.add_offset + n);
            const double term = shape_.in_place ? before_.get(at) : added_.get(other);
            y += term;
            magnitude += std::abs(term);
        }
        if (shape_.relu) y = std::max(y, 0.0);
        // Terms: the products, each rounded once, the bias and what is added.
        const bool parts = format_ == Format::bf16x2;
        const int terms = shape_.taps * shape_.k * (parts ? 3 : 1) + 3;
        const double summed = (gamma(terms) * (parts ? 1 + 0x1p-6 : 1) + (parts ? 0x1p-16 : 0)) * magnitude;
        const double bound = summed + roundoff(out_format_) * (std::abs(y) + summed);
        return std::abs(out_.get(at) - y) / std::max(bound, 0x1p-149);
    }

    const Kernels &table_;
    const Format format_;
    const Shape shape_;
    const Format out_format_;
    Elements a_, zeros_, w_;
    test::Array<std::byte> packed_;
    test::Array<float> bias_;
    Elements before_, out_, added_;  // elements of `out`: before the product, and after it
    std::vector<int> listed_;        // [taps][a_pitch] pixels, -1 for padding
    int distance_ = 1;               // pixels from each to the next one of a group
    std::vector<int> rows_;          // of `out`, per pixel
};

int ProductCase::sensitive_ = 0;

void test_products(const Kernels &table) {
    double largest = 0;
    ProductCase::sensitive_ = 0;
    for (int i = 0; i < kProducts; i++) {
        const std::uint64_t seed = kSeed + static_cast<std::uint64_t>(i);
        describe("a product of %s %s, seed %llu", table.isa, name(format_of(table)),
                 static_cast<unsigned long long>(seed));
        Random random(seed);
        ProductCase product(random, table);
        product.run();
        const double worst = product.worst();
        CHECK(worst <= 1);
        largest = std::max(largest, worst);
        product.check_independence(random);
        product.check_sensitivity(random);
    }
    CHECK(ProductCase::sensitive_ > 3);
    std::printf("%s %s: products, errors up to %.2f of their bound\n", table.isa, name(format_of(table)), largest);
}

// --- Winograd's convolution

using Matrix = std::vector<std::vector<double>>;

// The transforms of Lavin & Gray 2016, for the error bounds.
struct Form {
    Matrix input, weight, output;  // B^T, G, A^T
};
const Form kTwo = {{{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}},
                   {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}},
                   {{1, 1, 1, 0}, {0, 1, -1, -1}}};
const Form kFour = {{{4, 0, -5, 0, 1, 0},
                     {0, -4, -4, 1, 1, 0},
                     {0, 4, -4, -1, 1, 0},
                     {0, -2, -1, 2, 1, 0},
                     {0, 2, -1, -2, 1, 0},
                     {0, 4, 0, -5, 0, 1}},
                    {{1 / 4., 0, 0},
                     {-1 / 6., -1 / 6., -1 / 6.},
                     {-1 / 6., 1 / 6., -1 / 6.},
                     {1 / 24., 1 / 12., 1 / 6.},
                     {1 / 24., -1 / 12., 1 / 6.},
                     {0, 0, 1}},
                    {{1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}}};
// Roundings of the longest path through a transform, both of its passes, generously: the constants of G are rounded
// too.
constexpr int kInputRoundings = 8, kWeightRoundings = 12, kOutputRoundings = 12;

using Square = Values;  // row by row

// L X L^T; with magnitudes |L| |X| |L|^T. X: side x side.
Square sandwich(const Matrix &l, const Square &x, bool magnitudes) {
    const std::size_t side = l[0].size(), rows = l.size();
    const auto value = [magnitudes](double v) { return magnitudes ? std::abs(v) : v; };
    Square half(rows * side), out(rows * rows);
    for (std::size_t i = 0; i < rows; i++)
        for (std::size_t j = 0; j < side; j++)
            for (std::size_t k = 0; k < side; k++) half[i * side + j] += value(l[i][k]) * value(x[k * side + j]);
    for (std::size_t i = 0; i < rows; i++)
        for (std::size_t j = 0; j < rows; j++)
            for (std::size_t k = 0; k < side; k++) out[i * rows + j] += half[i * side + k] * value(l[j][k]);
    return out;
}

// What rounding may add to a transformed square: in float32, and where the result is stored as bfloat16 once more.
Square rounding(const Matrix &l, const Square &x, int roundings, Format format) {
    const Square exact = sandwich(l, x, false), magnitude = sandwich(l, x, true);
    Square error(exact.size());
    for (std::size_t i = 0; i < error.size(); i++) {
        const double summed = gamma(roundings) * magnitude[i];
        error[i] = summed + roundoff(format) * (std::abs(exact[i]) + summed);
    }
    return error;
}

// A 3x3 convolution of stride 1 with zero padding 1, made of the three transforms and a product for each position.
class ConvolutionCase {
  public:
    ConvolutionCase(Random &random, const Kernels &table, const rd::Winograd &winograd)
        : table_(table),
          winograd_(winograd),
          form_(winograd.m == 2 ? kTwo : kFour),
          m_(winograd.m),
          t_(m_ + 2),
          channels_(random.any({16, 32, 48, 64})),
          blocks_(random.between(1, 3)),
          height_(random.between(1, 9)),
          width_(random.between(1, 9)),
          exact_(m_ == 2 && random.flip()),
          add_(random.flip()),
          relu_(random.flip()),
          in_(format_of(table), index(height_ * width_ * channels_)),
          zeros_(format_of(table), index(channels_)),
          w_(format_of(table), index(blocks_ * 9 * channels_ * kLane)),
          planes_(format_of(table), index(t_ * t_ * blocks_ * channels_ * kLane)),
          bias_(index(blocks_ * kLane)),
          added_(format_of(table), index(height_ * width_ * blocks_ * kLane)),
          out_(format_of(table), added_.size()),
          spare_(format_of(table), index(blocks_ * kLane)) {
        fill(random, in_, 1);
        fill(random, w_, 4);  // F(2 x 2, 3 x 3) divides by 4
        fill(random, added_, 1);
        for (std::size_t i = 0; i < zeros_.size(); i++) zeros_.set(i, 0);
        for (std::size_t i = 0; i < bias_.size(); i++) bias_[i] = exact_ ? 1 : random.value();
        transform_weights();
    }

    int tiles() const { return down() * across(); }

    void run(int first, int tiles) {
        const int spots = t_ * t_;
        std::vector<const void *> in, add;
        std::vector<void *> out;
        for (int tile = first; tile < first + tiles; tile++)
            list_tile(tile / across() * m_, tile % across() * m_, in, add, out);
        Elements transformed(format_of(table_), index(spots * tiles * channels_));
        test::Array<float> products(index(spots * tiles * blocks_ * kLane));
        winograd_.input({in.data(), tiles, channels_, transformed.at(0)});
        for (int spot = 0; spot < spots; spot++) multiply(spot, tiles, transformed, products);
        winograd_.output({products.data(), tiles, blocks_ * kLane, blocks_, bias_.data(), add_ ? add.data() : nullptr,
                          out.data(), 0, relu_});
    }

    void run() { run(0, tiles()); }

    double worst() const {
        const std::vector<Transformed> weights = transformed_weights();
        double largest = 0;
        for (int tile = 0; tile < tiles(); tile++) {
            const int y = tile / across() * m_, x = tile % across() * m_;
            const Transformed data = transformed_data(y, x);
            for (int n = 0; n < blocks_ * kLane; n++) {
                const Square bound = bounds(weights[index(n)], data);
                for (int i = 0; i < m_ * m_; i++)
                    if (y + i / m_ < height_ && x + i % m_ < width_)
                        largest = std::max(largest, error(y + i / m_, x + i % m_, n, bound[index(i)]));
            }
        }
        return largest;
    }

    void check_independence(Random &random) {
        run();
        Elements together(format_of(table_), out_.size());
        together.copy(out_);
        for (int tile = 0; tile < tiles();) {
            const int count = random.between(1, tiles() - tile);
            run(tile, count);
            tile += count;
        }
        CHECK(std::memcmp(out_.at(0), together.at(0), out_.size() * out_.width()) == 0);
    }

    // Unless nothing is rounded, the bound is many times the usual error: a weight must be quite wrong to be seen for
    // sure.
    void check_sensitivity(Random &random) {
        if (relu_) return;
        const std::size_t at = weight(random.below(blocks_ * kLane), 4, random.below(channels_));
        const double kept = w_.get(at);
        const float off = exact_ ? 4 : table_.bf16 ? 64 : 0x1p-4f;
        set_weight(at, static_cast<float>(kept) + off);
        run();
        set_weight(at, static_cast<float>(kept));
        CHECK(worst() > 1);
    }

  private:
    // Small whole numbers, multiples of `unit` but never 0, where all sums but the output's rounding are to be exact.
    void fill(Random &random, const Elements &elements, int unit) const {
        if (!exact_) return elements.randomise(random);
        for (std::size_t i = 0; i < elements.size(); i++)
            elements.set(i, static_cast<float>(unit * random.any({-2, -1, 1, 2})));
    }

    int across() const { return (width_ + m_ - 1) / m_; }
    int down() const { return (height_ + m_ - 1) / m_; }
    std::size_t plane() const { return index(blocks_ * channels_ * kLane); }

    std::size_t weight(int n, int tap, int c) const {
        const int block = (n / kLane * 9 + tap) * channels_ * kLane;
        return index(block + (table_.bf16 ? (c / 2 * kLane + n % kLane) * 2 + c % 2 : c * kLane + n % kLane));
    }

    void set_weight(std::size_t at, float value) {
        w_.set(at, value);
        transform_weights();
    }

    void transform_weights() {
        const std::size_t block = index(channels_ * kLane);
        for (std::size_t b = 0; b < index(blocks_); b++)
            winograd_.weight({w_.at(b * 9 * block), channels_, planes_.at(b * block), plane() * planes_.width()});
    }

    void list_tile(int top, int left, std::vector<const void *> &in, std::vector<const void *> &add,
                   std::vector<void *> &out) const {
        for (int i = 0; i < t_ * t_; i++) {
            const int y = top - 1 + i / t_, x = left - 1 + i % t_;
            in.push_back(inside(y, x) ? in_.at(index((y * width_ + x) * channels_)) : zeros_.at(0));
        }
        for (int i = 0; i < m_ * m_; i++) {
            const int y = top + i / m_, x = left + i % m_;
            const std::size_t at = index((y * width_ + x) * blocks_ * kLane);
            out.push_back(inside(y, x) ? out_.at(at) : spare_.at(0));
            add.push_back(inside(y, x) ? added_.at(at) : spare_.at(0));
        }
    }

    void multiply(int spot, int tiles, const Elements &transformed, const test::Array<float> &products) const {
        std::vector<const void *> a;
        std::vector<void *> out;
        for (int tile = 0; tile < tiles; tile++) {
            a.push_back(transformed.at(index((spot * tiles + tile) * channels_)));
            out.push_back(products.data() + (spot * tiles + tile) * blocks_ * kLane);
        }
        Product p{};
        p.a = a.data();
        p.a_pitch = p.pixels = tiles;
        p.taps = 1;
        p.k = p.k_pitch = channels_;
        p.w = planes_.at(index(spot) * plane());
        p.w_block = index(channels_ * kLane) * planes_.width();
        p.blocks = blocks_;
        p.out = out.data();
        p.raw = true;
        table_.product(p);
    }

    bool inside(int y, int x) const { return y >= 0 && y < height_ && x >= 0 && x < width_; }
    double input(int y, int x, int c) const {
        return inside(y, x) ? in_.get(index((y * width_ + x) * channels_ + c)) : 0;
    }

    // Transformed squares of all channels, and what rounding may add to them.
    struct Transformed {
        std::vector<Square> exact, error;
    };

    Transformed transformed_data(int y, int x) const {
        Transformed data;
        for (int c = 0; c < channels_; c++) {
            Square d;
            for (int i = 0; i < t_ * t_; i++) d.push_back(input(y - 1 + i / t_, x - 1 + i % t_, c));
            data.error.push_back(rounding(form_.input, d, kInputRoundings, format_of(table_)));
            data.exact.push_back(sandwich(form_.input, d, false));
        }
        return data;
    }

    std::vector<Transformed> transformed_weights() const {  // [n]
        std::vector<Transformed> weights(index(blocks_ * kLane));
        for (int n = 0; n < blocks_ * kLane; n++)
            for (int c = 0; c < channels_; c++) {
                Square g;
                for (int tap = 0; tap < 9; tap++) g.push_back(w_.get(weight(n, tap, c)));
                weights[index(n)].error.push_back(rounding(form_.weight, g, kWeightRoundings, format_of(table_)));
                weights[index(n)].exact.push_back(sandwich(form_.weight, g, false));
            }
        return weights;
    }

    // What rounding may add to each output of a tile, but for bias, addition and the output's own rounding: the errors
    // of the sums over the channels, which pass through the output's transform, and that transform's own.
    Square bounds(const Transformed &weights, const Transformed &data) const {
        const std::size_t spots = index(t_ * t_);
        Square error(spots), magnitude(spots), sum(spots);
        for (std::size_t c = 0; c < index(channels_); c++) {
            const double *const u = weights.exact[c].data(), *const du = weights.error[c].data();
            const double *const v = data.exact[c].data(), *const dv = data.error[c].data();
            for (std::size_t i = 0; i < spots; i++) {
                sum[i] += u[i] * v[i];
                error[i] += std::abs(u[i]) * dv[i] + std::abs(v[i]) * du[i] + du[i] * dv[i];
                magnitude[i] += (std::abs(u[i]) + du[i]) * (std::abs(v[i]) + dv[i]);
            }
        }
        for (std::size_t i = 0; i < spots; i++) {
            error[i] += gamma(channels_ + 1) * magnitude[i];
            magnitude[i] = std::abs(sum[i]) + error[i];
        }
        Square bound = sandwich(form_.output, error, true);
        const Square passed = sandwich(form_.output, magnitude, true);
        for (std::size_t i = 0; i < bound.size(); i++) bound[i] += gamma(kOutputRoundings) * passed[i];
        return bound;
    }

    double error(int y, int x, int n, double bound) const {
        double sum = static_cast<double>(bias_[index(n)]), magnitude = std::abs(sum);
        for (int tap = 0; tap < 9; tap++)
            for (int c = 0; inside(y + tap / 3 - 1, x + tap % 3 - 1) && c < channels_; c++)
                sum += input(y + tap / 3 - 1, x + tap % 3 - 1, c) * w_.get(weight(n, tap, c));
        const std::size_t at = index((y * width_ + x) * blocks_ * kLane + n);
        if (add_) {
            sum += added_.get(at);
            magnitude += std::abs(added_.get(at));
        }
        bound = exact_ ? 0 : bound + gamma(2) * (magnitude + std::abs(sum) + bound);
        if (relu_) sum = std::max(sum, 0.0);
        return std::abs(out_.get(at) - sum) /
               std::max(bound + roundoff(format_of(table_)) * (std::abs(sum) + bound), 0x1p-149);
    }

    const Kernels &table_;
    const rd::Winograd &winograd_;
    const Form &form_;
    const int m_, t_, channels_, blocks_, height_, width_;
    const bool exact_, add_, relu_;
    Elements in_, zeros_, w_, planes_;
    test::Array<float> bias_;
    Elements added_, out_, spare_;
};

void test_convolutions(const Kernels &table) {
    for (const rd::Winograd &winograd : table.winograd) {
        if (winograd.m == 0) continue;
        double largest = 0;
        for (int i = 0; i < kConvolutions; i++) {
            const std::uint64_t seed = kSeed + static_cast<std::uint64_t>(i);
            describe("F(%d x %d, 3 x 3) of %s %s, seed %llu", winograd.m, winograd.m, table.isa, name(format_of(table)),
                     static_cast<unsigned long long>(seed));
            Random random(seed);
            ConvolutionCase convolution(random, table, winograd);
            convolution.run();
            const double worst = convolution.worst();
            CHECK(worst <= 1);
            largest = std::max(largest, worst);
            convolution.check_independence(random);
            if (i % 4 == 0) convolution.check_sensitivity(random);
        }
        std::printf("%s %s: F(%d x %d, 3 x 3), errors up to %.2f of their bound\n", table.isa, name(format_of(table)),
                    winograd.m, winograd.m, largest);
    }
}

// --- pooling and images

// Values are all negative at times: what is outside the map must not win. NaN of either sign does.
void test_max_pool(const Kernels &table, Random &random) {
    const int taps = random.between(1, 9), pixels = random.between(1, 33), channels = 16 * random.between(1, 4),
              map = 30;
    const std::size_t pitch = index(channels);
    Elements in(format_of(table), index(map) * pitch, pitch), out(format_of(table), index(pixels) * pitch, pitch);
    in.randomise(random);
    if (random.flip())
        for (std::size_t i = 0; i < in.size(); i++) in.set(i, -1 - static_cast<float>(std::abs(in.get(i))));
    if (random.flip())
        for (int i = 0; i < 40; i++)
            in.set(index(random.below(map * channels)), random.any({NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f}));
    std::vector<int> listed;
    std::vector<const void *> a;
    std::vector<void *> to;
    for (int i = 0; i < taps * pixels; i++) {
        listed.push_back(random.below(map));
        a.push_back(in.at(index(listed.back() * channels)));
    }
    for (int i = 0; i < pixels; i++) to.push_back(out.at(index((pixels - 1 - i) * channels)));
    table.max_pool({a.data(), taps, pixels, channels, to.data()});
    for (int i = 0; i < pixels; i++)
        for (int c = 0; c < channels; c++) {
            double largest = -INFINITY;
            for (int t = 0; t < taps; t++) {
                const double x = in.get(index(listed[index(t * pixels + i)] * channels + c));
                largest = std::isnan(x) || std::isnan(largest) ? NAN : std::max(largest, x);
            }
            const double found = out.get(index((pixels - 1 - i) * channels + c));
            CHECK(std::isnan(largest) ? std::isnan(found) : found == largest);
        }
}

void test_average(const Kernels &table, Random &random) {
    const int pixels = random.between(1, 80), channels = 16 * random.between(1, 4), offset = 16 * random.below(3),
              pitch = offset + channels + 16 * random.below(2);
    Elements in(format_of(table), index(pixels * channels), index(channels)),
        out(format_of(table), index(pitch), index(pitch));
    in.randomise(random);
    for (std::size_t i = 0; i < out.size(); i++) out.set(i, 7);
    std::vector<const void *> a;
    for (int i = 0; i < pixels; i++) a.push_back(in.at(index(i * channels)));
    table.average({a.data(), pixels, channels, out.at(0), offset, pitch});
    for (int c = 0; c < pitch; c++)  // what is not asked for stays
        CHECK((c >= offset && c < offset + channels) || out.get(index(c)) == 7);
    for (int c = 0; c < channels; c++) {
        double mean = 0, magnitude = 0;
        for (int i = 0; i < pixels; i++) {
            mean += in.get(index(i * channels + c)) / pixels;
            magnitude += std::abs(in.get(index(i * channels + c))) / pixels;
        }
        const double summed = gamma(pixels + 3) * magnitude;
        const double bound = summed + roundoff(format_of(table)) * (std::abs(mean) + summed);
        CHECK(std::abs(out.get(index(offset + c)) - mean) <= bound);
    }
}

// Ties between two bfloat16 are among the values.
void test_interleave(const Kernels &table, Random &random) {
    const int channels = random.flip() ? 3 : random.between(1, 5), width = random.between(1, 40);
    const std::size_t plane = index(width + random.below(9));
    test::Array<float> in(plane * index(channels));
    for (std::size_t i = 0; i < in.size(); i++) {
        in[i] = random.flip() ? random.value() : 1 + 0x1p-8f * static_cast<float>(random.below(16));
    }
    if (random.flip()) in[0] = random.any({NAN, INFINITY, -INFINITY, 3.4e38f, 1e-40f});
    const Format format = table.bf16 ? Format::bf16 : Format::fp32;  // where there is `place`, it comes after this
    Elements out(format, index(width * channels)), expected(format, out.size());
    table.interleave({in.data(), plane, channels, width, out.at(0)});
    for (int x = 0; x < width; x++)
        for (int c = 0; c < channels; c++) expected.set(index(x * channels + c), in[index(c) * plane + index(x)]);
    CHECK(std::memcmp(out.at(0), expected.at(0), out.size() * out.width()) == 0);
}

// Of every number the two parts, each rounded; NaN for what has none.
void test_place(const Kernels &table, Random &random) {
    const int count = 16 * random.between(1, 5);
    test::Array<float> from(index(count));
    Elements to(Format::bf16x2, index(count), index(count)), expected(Format::bf16x2, index(count), index(count));
    for (int i = 0; i < count; i++)
        from[index(i)] =
            random.below(8) ? random.value() : random.any({NAN, -NAN, INFINITY, -INFINITY, 3.4e38f, 1 + 0x1p-8f, 0.0f});
    table.place(from.data(), count, to.at(0));
    for (int i = 0; i < count; i++) {
        const std::size_t at = index(i);
        expected.set(at, from[at]);
        CHECK(std::isnan(expected.get(at)) ? std::isnan(to.get(at)) : to.is_same(expected, at));
        CHECK(!(std::abs(from[at]) <= 1) || std::abs(to.get(at) - static_cast<double>(from[at])) <=
                                                0x1p-17 * static_cast<double>(std::abs(from[at])));
    }
}

void test_pools(const Kernels &table) {
    for (int i = 0; i < kPools; i++) {
        const std::uint64_t seed = kSeed + static_cast<std::uint64_t>(i);
        describe("pools of %s %s, seed %llu", table.isa, name(format_of(table)), static_cast<unsigned long long>(seed));
        Random random(seed);
        test_max_pool(table, random);
        test_average(table, random);
        test_interleave(table, random);
        if (table.place) test_place(table, random);
    }
}

// --- the reference itself

void test_rounding() {
    const auto round = [](float value) { return test::from_bf16(test::to_bf16(value)); };
    CHECK(round(1 + 0x1p-8f) == 1 && round(1 + 3 * 0x1p-8f) == 1 + 0x1p-6f);  // ties to even
    CHECK(round(1 + 0x1p-8f + 0x1p-20f) == 1 + 0x1p-7f && round(-0.3f) == -0.30078125f);
}

void test_table(const Kernels &table) {
    if (table.begin) table.begin();
    test_products(table);
    test_convolutions(table);
    test_pools(table);
    if (table.end) table.end();
}

std::vector<const Kernels *> tables() {
    std::vector<const Kernels *> found;
    for (const bool bf16 : {false, true}) {
        std::string names = rd::available_isas() + std::string(",");
        for (std::size_t end; (end = names.find(',')) != std::string::npos; names.erase(0, end + 1)) {
            const std::string isa = names.substr(0, end);
            const bool offered = isa == "amx_bf16x2" ? !bf16 : bf16 || isa.find("bf16") == std::string::npos;
            if (offered) found.push_back(&rd::choose_kernels(isa.c_str(), bf16));
        }
    }
    found.push_back(rd::emulated_amx_bf16_kernels(true));
    found.push_back(rd::emulated_amx_bf16x2_kernels(false));
    return found;
}

}  // namespace

int main() {
    test_rounding();
    for (const Kernels *table : tables()) test_table(*table);
}
