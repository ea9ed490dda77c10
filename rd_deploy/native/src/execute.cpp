#include "execute.h"

#include <algorithm>
#include <cstring>

namespace rd {
namespace {

using Pointers = const void **;

// One item of one operation: where everything lies, and the steps that every kind of operation is made of.
class Item {
  public:
    Item(const Run &run, const Operation &operation, int item, int thread)
        : run_(run),
          plan_(*run.plan),
          o_(operation),
          kernels_(*plan_.kernels.main),
          element_(plan_.element),
          chunk_(item % operation.chunks),
          slice_(item / operation.chunks) {
        const Buffer &buffer = plan_.buffers[static_cast<std::size_t>(operation.scratch_buffer)];
        scratch_ = run.arena + buffer.offset + static_cast<std::size_t>(thread) * operation.scratch.bytes;
        taps_ = pointers(operation.scratch.taps);
        out_[0] = outputs(operation.scratch.out[0]);
        out_[1] = outputs(operation.scratch.out[1]);
        add_ = pointers(operation.scratch.add);
        pixels_ = reinterpret_cast<int *>(scratch_ + operation.scratch.pixels);
    }

    void execute() {
        switch (o_.kind) {
            case OperationKind::stem:
                return stem();
            case OperationKind::convolution:
                return o_.layers[0].winograd ? winograd() : convolution();
            case OperationKind::convolution_average:
                return convolution_average();
            case OperationKind::max_pool:
                return max_pool();
            case OperationKind::average:
                return average();
            case OperationKind::linear:
                return linear();
        }
    }

  private:
    Pointers pointers(std::size_t offset) const { return reinterpret_cast<Pointers>(scratch_ + offset); }
    void **outputs(std::size_t offset) const { return reinterpret_cast<void **>(scratch_ + offset); }
    std::size_t pixel_bytes(const Shape &shape) const { return static_cast<std::size_t>(shape.pitch()) * element_; }
    const std::byte *zeros() const { return plan_.zeros.get(); }

    std::byte *map(int number) const {
        const Map &map = plan_.maps[static_cast<std::size_t>(number)];
        return run_.arena + plan_.buffers[static_cast<std::size_t>(map.buffer)].offset;
    }

    void multiply(const Product &product) const {
        const bool main = !kernels_.supports || kernels_.supports(product);
        (main ? kernels_ : *plan_.kernels.other).product(product);
    }

    // A layer's product on a list of pixels, for all its outputs.
    Product product(const Layer &layer, const void *const *a, int pitch, int pixels, void *const *out) const {
        const Step &step = *layer.step;
        Product p{};
        p.a = a;
        p.a_pitch = pitch;
        p.taps = step.taps;
        p.k = step.k;
        p.k_pitch = step.k_pitch;
        p.pixels = pixels;
        p.w = layer.weight;
        p.w_block = step.block_bytes(plan_.network->precision);
        p.blocks = step.blocks();
        p.bias = step.bias;
        p.out = out;
        p.relu = step.relu;
        return p;
    }

    // --- lists of pixels

    // Pointers for the outputs of a layer on this chunk's pixels from `first` on: into its map, or a tile in scratch.
    void list_outputs(int map_number, const Shape &shape, std::size_t tile, int first, int count, void **out) const {
        const std::size_t bytes = pixel_bytes(shape);
        if (map_number == kScratch) {
            std::byte *at = scratch_ + tile;
            for (int i = 0; i < count; i++, at += bytes) out[i] = at;
            return;
        }
        std::byte *const base = map(map_number);
        for (int i = 0; i < count; i++) out[i] = base + static_cast<std::size_t>(pixels_[first + i]) * bytes;
    }

    const void *const *list_added(const Layer &layer, int first, int count) const {
        if (layer.add < 0) return nullptr;
        const std::byte *const base = map(layer.add);
        const std::size_t bytes = pixel_bytes(layer.out);
        for (int i = 0; i < count; i++) add_[i] = base + static_cast<std::size_t>(pixels_[first + i]) * bytes;
        return add_;
    }

    // A square of a map, whose corner may lie outside.
    struct Square {
        const std::byte *image;  // the map's first pixel
        int y, x, height, width;
    };

    // Pointers to a square's pixels, row by row, each `step` further in `to`. What lies outside the map is `outside`;
    // null: the nearest pixel inside.
    void list_square(const Shape &map, const Square &square, const void *outside, Pointers to, int step) const {
        const auto bytes = static_cast<std::ptrdiff_t>(pixel_bytes(map)), row = bytes * map.width;
        const std::byte *first = square.image + square.y * row + square.x * bytes;
        const bool within = square.y >= 0 && square.x >= 0 && square.y + square.height <= map.height && square.x + square.width <= map.width;
        if (within) {
            for (int y = 0; y < square.height; y++, first += row)
                for (int x = 0; x < square.width; x++, to += step) *to = first + x * bytes;
            return;
        }
        for (int y = square.y; y < square.y + square.height; y++)
            for (int x = square.x; x < square.x + square.width; x++, to += step) {
                const bool inside = y >= 0 && y < map.height && x >= 0 && x < map.width;
                const bool zero = !inside && outside;
                *to = zero ? outside : square.image + std::clamp(y, 0, map.height - 1) * row + std::clamp(x, 0, map.width - 1) * bytes;
            }
    }

    // The input pixels of a window whose outputs are this chunk's pixels, tap by tap: [kernel_h * kernel_w][count].
    void list_window(const Step &window, const Shape &in, const Shape &out, const std::byte *base, int count,
                     const void *outside) const {
        const std::size_t image_bytes = static_cast<std::size_t>(in.pixels()) * pixel_bytes(in);
        int image = pixels_[0] / out.pixels(), y = pixels_[0] % out.pixels() / out.width, x = pixels_[0] % out.width;
        for (int i = 0; i < count; i++) {
            const Square square{base + static_cast<std::size_t>(image) * image_bytes, y * window.stride - window.padding,
                                x * window.stride - window.padding, window.kernel_h, window.kernel_w};
            list_square(in, square, outside, taps_ + i, count);
            if (++x < out.width) continue;
            x = 0;
            if (++y < out.height) continue;
            y = 0;
            image++;
        }
    }

    // Flat indices of this chunk's pixels; returns how many.
    int number_pixels(int units) const {
        const int first = chunk_ * o_.chunk;
        const int count = std::min(o_.chunk, plan_.options.batch * units - first);
        for (int i = 0; i < count; i++) pixels_[i] = first + i;
        return count;
    }

    // --- convolutions

    void convolution() {
        const Layer &head = o_.layers[0];
        const int count = number_pixels(o_.units);
        list_window(*head.step, head.in, head.out, map(o_.source), count, zeros());
        list_outputs(head.map, head.out, o_.scratch.tile[0], 0, count, out_[0]);
        Product p = product(head, taps_, count, count, out_[0]);
        p.add = list_added(head, 0, count);
        take_slice(p, head);
        multiply(p);
        further_layers(count);
    }

    // This item's share of a single layer's outputs.
    void take_slice(Product &p, const Layer &layer) const {
        const int first = p.blocks * slice_ / o_.slices, last = p.blocks * (slice_ + 1) / o_.slices;
        p.w = layer.weight + static_cast<std::size_t>(first) * p.w_block;
        p.bias += first * kLane;
        p.offset = first * kLane;
        p.blocks = last - first;
    }

    // The second and further layers, piece by piece, so that a wide map exists for one piece only.
    void further_layers(int count) {
        for (int first = 0; first < count && o_.layers.size() > 1; first += o_.piece) {
            const int piece = std::min(o_.piece, count - first);
            const void *const *in = out_[0] + first;
            for (std::size_t i = 1; i < o_.layers.size(); i++) {
                const Layer &layer = o_.layers[i];
                void **const out = i == 1 ? out_[1] : last_outputs();
                list_outputs(layer.map, layer.out, o_.scratch.tile[1], first, piece, out);
                Product p = product(layer, in, piece, piece, out);
                p.add = list_added(layer, first, piece);
                multiply(p);
                in = out;
            }
        }
    }

    // The window's pointers are not needed any more when a third layer runs.
    void **last_outputs() const { return const_cast<void **>(taps_); }

    // --- Winograd's convolution

    void winograd() {
        const Layer &head = o_.layers[0];
        const int t = head.winograd->m + 2, first = chunk_ * o_.chunk;
        const int tiles = std::min(o_.chunk, plan_.options.batch * o_.units - first);
        list_tile_inputs(head, t, first, tiles);
        head.winograd->input({taps_, tiles, head.in.pitch(), scratch_ + o_.scratch.transformed});
        list_transformed(head, t, tiles);
        const int count = list_tile_outputs(head, first, tiles);
        multiply_tiles(head, t, tiles);
        further_layers(count);
    }

    // First output pixel of a tile.
    struct Corner {
        int image, y, x;
    };
    Corner corner(const Layer &head, int tile) const {
        const int m = head.winograd->m, across = (head.out.width + m - 1) / m, at = tile % o_.units;
        return {tile / o_.units, at / across * m, at % across * m};
    }

    // The input pixels of each tile, [tiles][t * t].
    void list_tile_inputs(const Layer &head, int t, int first, int tiles) const {
        const std::size_t bytes = pixel_bytes(head.in), image_bytes = static_cast<std::size_t>(head.in.pixels()) * bytes;
        Pointers to = taps_;
        for (int tile = first; tile < first + tiles; tile++, to += t * t) {
            const Corner c = corner(head, tile);
            const std::byte *const image = map(o_.source) + static_cast<std::size_t>(c.image) * image_bytes;
            list_square(head.in, {image, c.y - 1, c.x - 1, t, t}, zeros(), to, 1);
        }
    }

    // The output pixels of each tile, [tiles][m * m] in out_[1], and what is added to them; those beyond the map go to a
    // spare pixel. Numbers the pixels inside and lists their outputs in out_[0]; returns how many there are.
    int list_tile_outputs(const Layer &head, int first, int tiles) const {
        const int m = head.winograd->m;
        const std::size_t bytes = pixel_bytes(head.out);
        const bool tiled = head.map == kScratch;
        std::byte *const base = tiled ? scratch_ + o_.scratch.tile[0] : map(head.map);
        const std::byte *const added = head.add < 0 ? nullptr : map(head.add);
        int count = 0, listed = 0;
        for (int tile = first; tile < first + tiles; tile++) {
            const Corner c = corner(head, tile);
            for (int i = 0; i < m * m; i++, listed++) {
                const int y = c.y + i / m, x = c.x + i % m;
                const bool inside = y < head.out.height && x < head.out.width;
                const int pixel = (c.image * head.out.height + y) * head.out.width + x;
                void *const out = inside ? base + static_cast<std::size_t>(tiled ? count : pixel) * bytes : scratch_ + o_.scratch.spare;
                out_[1][listed] = out;
                if (added) add_[listed] = inside ? added + static_cast<std::size_t>(pixel) * bytes : zeros();
                if (!inside) continue;
                pixels_[count] = pixel;
                out_[0][count++] = out;
            }
        }
        return count;
    }

    // Products for a few blocks of outputs at all positions, then their transform, so that the products stay in cache.
    void multiply_tiles(const Layer &head, int t, int tiles) const {
        const Step &step = *head.step;
        const std::size_t block = static_cast<std::size_t>(step.k_pitch) * kLane * element_;
        const std::size_t plane = block * static_cast<std::size_t>(step.blocks());
        const float *const products = reinterpret_cast<const float *>(scratch_ + o_.scratch.products);
        Product p{};
        p.a_pitch = p.pixels = tiles;
        p.taps = 1;
        p.k = p.k_pitch = step.k_pitch;
        p.w_block = block;
        p.raw = true;
        const int last = step.blocks() * (slice_ + 1) / o_.slices;
        for (int first = step.blocks() * slice_ / o_.slices; first < last; first += kProductBlocks) {
            p.blocks = std::min(kProductBlocks, last - first);
            for (int position = 0; position < t * t; position++) {
                p.a = taps_ + position * tiles;
                p.out = outputs(o_.scratch.product_rows) + position * tiles;
                p.w = head.weight + static_cast<std::size_t>(position) * plane + static_cast<std::size_t>(first) * block;
                multiply(p);
            }
            head.winograd->output({products, tiles, kProductBlocks * kLane, p.blocks, step.bias + first * kLane,
                                       head.add < 0 ? nullptr : add_, out_[1], first * kLane, step.relu});
        }
    }

    // Pointers to the transformed tiles and to the products' rows, [t * t][tiles].
    void list_transformed(const Layer &head, int t, int tiles) const {
        const std::size_t bytes = pixel_bytes(head.in);
        const std::byte *from = scratch_ + o_.scratch.transformed;
        float *row = reinterpret_cast<float *>(scratch_ + o_.scratch.products);
        void **const rows = outputs(o_.scratch.product_rows);
        for (int i = 0; i < t * t * tiles; i++, from += bytes, row += kProductBlocks * kLane) {
            taps_[i] = from;
            rows[i] = row;
        }
    }

    // --- pooling and the classifier

    void max_pool() {
        const int count = number_pixels(o_.units);
        list_window(*o_.pool, o_.in, o_.pooled, map(o_.source), count, nullptr);
        list_outputs(o_.pool_map, o_.pooled, 0, 0, count, out_[0]);
        kernels_.max_pool({taps_, o_.pool->kernel_h * o_.pool->kernel_w, count, o_.in.pitch(), out_[0]});
    }

    // All pixels of this chunk's image.
    void list_image(int image) const {
        const std::byte *at = map(o_.source) + static_cast<std::size_t>(image) * static_cast<std::size_t>(o_.in.pixels()) * pixel_bytes(o_.in);
        for (int i = 0; i < o_.in.pixels(); i++, at += pixel_bytes(o_.in)) taps_[i] = at;
    }

    void average() {
        list_image(chunk_);
        std::byte *const out = map(o_.pool_map) + static_cast<std::size_t>(chunk_) * pixel_bytes(o_.pooled);
        kernels_.average({taps_, o_.in.pixels(), o_.in.pitch(), out});
    }

    // A 1x1 convolution for a slice of its outputs on all pixels of an image, averaged at once: its map never exists.
    void convolution_average() {
        const Layer &layer = o_.layers[0];
        const int count = o_.in.pixels();
        list_image(chunk_);
        for (int i = 0; i < count; i++) pixels_[i] = chunk_ * count + i;
        Product p = product(layer, taps_, count, count, out_[0]);
        p.add = list_added(layer, 0, count);
        take_slice(p, layer);
        const std::size_t bytes = static_cast<std::size_t>(p.blocks * kLane) * element_;
        std::byte *const tile = scratch_ + o_.scratch.tile[0];
        // The product writes output n at offset + n of a pixel, of which the tile holds the slice only.
        const std::size_t before = static_cast<std::size_t>(p.offset) * element_;
        for (int i = 0; i < count; i++) out_[0][i] = tile + static_cast<std::size_t>(i) * bytes - before;
        multiply(p);
        for (int i = 0; i < count; i++) out_[0][i] = tile + static_cast<std::size_t>(i) * bytes;
        std::byte *const out = map(o_.pool_map) + static_cast<std::size_t>(chunk_) * pixel_bytes(o_.pooled) + before;
        kernels_.average({out_[0], count, p.blocks * kLane, out});
    }

    // Logits are not padded to whole blocks as maps are, so they pass through a tile.
    void linear() {
        const Layer &layer = o_.layers[0];
        const int first = chunk_ * o_.chunk, count = std::min(o_.chunk, plan_.options.batch - first);
        const std::byte *at = map(o_.source) + static_cast<std::size_t>(first) * pixel_bytes(o_.in);
        for (int i = 0; i < count; i++, at += pixel_bytes(o_.in)) taps_[i] = at;
        Product p = product(layer, taps_, count, count, out_[0]);
        take_slice(p, layer);
        const int offset = p.offset, width = p.blocks * kLane;
        p.offset = 0;
        p.raw = true;
        float *const tile = reinterpret_cast<float *>(scratch_ + o_.scratch.tile[0]);
        for (int i = 0; i < count; i++) out_[0][i] = tile + i * width;
        multiply(p);
        const int classes = layer.step->out_channels, kept = std::min(width, classes - offset);
        for (int i = 0; i < count; i++)
            std::memcpy(run_.logits + static_cast<std::size_t>(first + i) * static_cast<std::size_t>(classes) + offset,
                        tile + i * width, static_cast<std::size_t>(kept) * sizeof(float));
    }

    // --- the stem: a band of rows of one image

    void stem() {
        const Layer &conv = o_.layers[0];
        const int bands = o_.chunks / plan_.options.batch, band = chunk_ % bands;
        image_ = chunk_ / bands;
        const int last = std::min((band + 1) * o_.chunk, o_.units);
        std::memset(scratch_ + o_.scratch.images, 0, image_row_bytes() * static_cast<std::size_t>(conv.step->kernel_h + 1));
        next_image_row_ = next_row_ = 0;
        for (int y = band * o_.chunk; y < last; y++) {
            const Shape &out = o_.pool ? o_.pooled : conv.out;
            for (int x = 0; x < out.width; x++) pixels_[x] = (image_ * out.height + y) * out.width + x;
            list_outputs(o_.pool ? o_.pool_map : conv.map, out, o_.scratch.tile[0], 0, out.width, out_[0]);
            if (o_.pool)
                pool_row(y);
            else
                image_convolution(y, out_[0]);
            further_layers(out.width);
        }
    }

    std::size_t image_row_bytes() const { return stem_row_elements(o_) * element_; }

    // A row of the padded image; those above and below it are the row of zeros behind the ring.
    std::byte *image_row(int y) const {
        const int rows = o_.layers[0].step->kernel_h;
        const int slot = y < 0 || y >= o_.in.height ? rows : y % rows;
        return scratch_ + o_.scratch.images + static_cast<std::size_t>(slot) * image_row_bytes();
    }

    // One row of the convolution of the images; rows of the image that it needs join the ring.
    void image_convolution(int y, void *const *out) {
        const Layer &layer = o_.layers[0];
        const Step &conv = *layer.step;
        const int top = y * conv.stride - conv.padding, width = layer.out.width;
        for (next_image_row_ = std::max(next_image_row_, std::max(top, 0)); next_image_row_ < std::min(top + conv.kernel_h, o_.in.height); next_image_row_++)
            interleave(next_image_row_);
        const std::size_t step = static_cast<std::size_t>(conv.stride * o_.in.channels) * element_;
        for (int ky = 0; ky < conv.kernel_h; ky++) {
            const std::byte *at = image_row(top + ky);
            for (int x = 0; x < width; x++, at += step) taps_[ky * width + x] = at;
        }
        multiply(product(layer, taps_, width, width, out));
    }

    void interleave(int y) const {
        const std::size_t plane = static_cast<std::size_t>(o_.in.pixels()), channels = static_cast<std::size_t>(o_.in.channels);
        const float *const row = run_.images + static_cast<std::size_t>(image_) * channels * plane + static_cast<std::size_t>(y) * static_cast<std::size_t>(o_.in.width);
        const std::size_t left = static_cast<std::size_t>(o_.layers[0].step->padding) * channels * element_;
        kernels_.interleave({row, plane, o_.in.channels, o_.in.width, image_row(y) + left});
    }

    // One row of the pooling; rows of the convolution that it needs join their ring.
    void pool_row(int y) {
        const Shape &rows = o_.layers[0].out;
        const Step &pool = *o_.pool;
        const int top = y * pool.stride - pool.padding;
        for (next_row_ = std::max(next_row_, std::max(top, 0)); next_row_ < std::min(top + pool.kernel_h, rows.height); next_row_++) {
            for (int x = 0; x < rows.width; x++) out_[1][x] = row_pixel(next_row_, x);
            image_convolution(next_row_, out_[1]);
        }
        const int width = o_.pooled.width;
        for (int ky = 0; ky < pool.kernel_h; ky++)
            for (int kx = 0; kx < pool.kernel_w; kx++)
                for (int x = 0; x < width; x++)
                    taps_[(ky * pool.kernel_w + kx) * width + x] =
                        row_pixel(std::clamp(top + ky, 0, rows.height - 1), std::clamp(x * pool.stride - pool.padding + kx, 0, rows.width - 1));
        kernels_.max_pool({taps_, pool.kernel_h * pool.kernel_w, width, rows.pitch(), out_[0]});
    }

    std::byte *row_pixel(int y, int x) const {
        const Shape &rows = o_.layers[0].out;
        const std::size_t slot = static_cast<std::size_t>(y % o_.pool->kernel_h);
        return scratch_ + o_.scratch.rows + (slot * static_cast<std::size_t>(rows.width) + static_cast<std::size_t>(x)) * pixel_bytes(rows);
    }

    const Run &run_;
    const Plan &plan_;
    const Operation &o_;
    const Kernels &kernels_;
    const std::size_t element_;
    const int chunk_, slice_;
    std::byte *scratch_;
    Pointers taps_, add_;
    void **out_[2];
    int *pixels_;
    int image_ = 0, next_image_row_ = 0, next_row_ = 0;  // the stem's
};

}  // namespace

void execute(const Run &run, const Operation &operation, int item, int thread) {
    Item(run, operation, item, thread).execute();
}

}  // namespace rd
