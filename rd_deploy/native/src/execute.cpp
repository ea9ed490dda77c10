#include "execute.h"

#include <algorithm>
#include <cstring>
#include <optional>

namespace rd {
namespace {

using Pointers = const void **;

// A map as it lies in memory: whole, or as a ring of rows of one image.
struct View {
    std::byte *base;
    std::size_t image, row, pixel;  // bytes from one to the next
    int rows;                       // of the ring; 0: whole

    std::byte *row_at(int number, int y) const {
        const int at = rows > 0 ? y % rows : y;
        return base + static_cast<std::size_t>(number) * image + static_cast<std::size_t>(at) * row;
    }
};

// One operation, or one part of a streamed one, on one thread: where everything lies, and how it is computed.
class Work {
  public:
    Work(const Run &run, const Operation &operation, std::byte *scratch)
        : run_(run),
          plan_(*run.plan),
          o_(operation),
          kernels_(*plan_.kernels),
          element_(plan_.element),
          scratch_(scratch),
          taps_(pointers(operation.scratch.taps)),
          add_(pointers(operation.scratch.add)),
          groups_(pointers(operation.scratch.groups)),
          out_{outputs(operation.scratch.out[0]), outputs(operation.scratch.out[1])},
          pixels_(reinterpret_cast<int *>(scratch + operation.scratch.pixels)) {}

    void execute(int item) {
        item_ = item;
        const int chunk = item % o_.chunks;
        slice_ = item / o_.chunks;
        switch (o_.kind) {
            case OperationKind::stem:
                return stem(chunk);
            case OperationKind::convolution:
                if (o_.tiled) return tiled_convolution(piece(chunk));
                return convolution(chunk * o_.chunk,
                                   std::min(o_.chunk, plan_.options.batch * o_.units - chunk * o_.chunk));
            case OperationKind::convolution_average:
                return convolution_average(chunk);
            case OperationKind::max_pool:
                return max_pool(chunk);
            case OperationKind::average:
                return average(chunk);
            case OperationKind::linear:
                return linear(chunk);
            case OperationKind::streamed:
                break;  // `stream` runs its parts
        }
    }

    // A part of a streamed operation: forget the rows of the last band, and begin at row `y` of an image.
    void begin_band(int image, int y) {
        row_ = y;
        if (o_.kind == OperationKind::stem) begin_stem(image);
        image_ = image;
    }
    // The next rows that it will make, and the rows of its input that they need.
    int next_row() const { return row_; }
    int input_rows() const {
        const Step &window = *o_.layers[0].step;
        const int last = std::min(row_ + o_.step_rows, o_.out().height) - 1;
        return std::min(last * window.stride - window.padding + window.kernel_h, o_.in.height);
    }
    int first_input_row(int y) const { return std::max(y * o_.layers[0].step->stride - o_.layers[0].step->padding, 0); }
    int step_rows() const { return o_.step_rows; }

    void make_rows() {
        if (o_.kind == OperationKind::stem) {
            stem_row(row_);
        } else if (o_.tiled) {
            tiled_convolution({image_, 1, row_, std::min(o_.step_rows, o_.layers[0].out.height - row_)});
        } else {
            const int across = (o_.layers[0].out.width + o_.step_rows - 1) / o_.step_rows;
            const int first = image_ * o_.units + row_ / o_.step_rows * across;
            for (int unit = 0; unit < across; unit += o_.chunk)
                convolution(first + unit, std::min(o_.chunk, across - unit));
        }
        row_ += o_.step_rows;
    }

  private:
    Pointers pointers(std::size_t offset) const { return reinterpret_cast<Pointers>(scratch_ + offset); }
    void **outputs(std::size_t offset) const { return reinterpret_cast<void **>(scratch_ + offset); }
    std::size_t pixel_bytes(const Shape &shape) const { return static_cast<std::size_t>(shape.pitch()) * element_; }
    const std::byte *zeros() const { return plan_.zeros.get(); }

    View view(int map, const Shape &shape, const Ring &ring) const {
        const std::size_t pixel = pixel_bytes(shape), row = static_cast<std::size_t>(shape.width) * pixel;
        if (map == kRing) return {scratch_ + ring.offset, 0, row, pixel, ring.rows};
        const int buffer = plan_.maps[static_cast<std::size_t>(map)].buffer;
        std::byte *const base = run_.arena + plan_.buffers[static_cast<std::size_t>(buffer)].offset;
        return {base, static_cast<std::size_t>(shape.height) * row, row, pixel, 0};
    }
    View source() const { return view(o_.source, o_.in, o_.in_ring); }
    View destination(int map, const Shape &shape) const { return view(map, shape, o_.out_ring); }

    void multiply(const Product &product) const { kernels_.product(product); }

    // The product of one tap on a list of neighbouring pixels. `spare`: what follows them, up to a whole group, may be
    // read; else the last pixels are copied.
    void multiply_neighbours(Product p, bool spare) const {
        if (!o_.tiled) return multiply(p);
        const int group = kernels_.group, groups = (p.pixels + group - 1) / group, rest = p.pixels % group;
        for (int i = 0; i < groups; i++) groups_[i] = p.a[i * group];
        const std::size_t bytes = static_cast<std::size_t>(p.k_pitch) * element_;
        if (rest > 0 && !spare) {
            std::byte *const copy = scratch_ + o_.scratch.group;
            std::memcpy(copy, groups_[groups - 1], static_cast<std::size_t>(rest) * bytes);
            groups_[groups - 1] = copy;
        }
        p.a = groups_;
        p.a_pitch = groups;
        p.step = static_cast<std::ptrdiff_t>(bytes);
        multiply(p);
    }

    // The first pixels of so many groups that follow each other.
    void list_groups(const std::byte *at, std::size_t pixel, int groups, Pointers to) const {
        const std::size_t step = static_cast<std::size_t>(kernels_.group) * pixel;
        for (int i = 0; i < groups; i++, at += step) to[i] = at;
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
        p.out_pitch = p.add_pitch = layer.out.pitch();
        p.relu = step.relu;
        return p;
    }

    // --- lists of pixels

    // Pointers for the outputs of a layer on this chunk's pixels from `first` on: into its map, or a tile in scratch.
    void list_outputs(int map, const Shape &shape, std::size_t tile, int first, int count, void **out) const {
        if (map != kScratch)
            return list_pixels(destination(map, shape), shape, first, count, const_cast<const void **>(out));
        std::byte *at = scratch_ + tile;
        for (int i = 0; i < count; i++, at += pixel_bytes(shape)) out[i] = at;
    }

    const void *const *list_added(const Layer &layer, int first, int count) const {
        if (layer.add < 0) return nullptr;
        list_pixels(destination(layer.add, layer.out), layer.out, first, count, add_);
        return add_;
    }

    // Numbered pixels of a map.
    void list_pixels(const View &map, const Shape &shape, int first, int count, Pointers to) const {
        if (map.rows == 0) {
            for (int i = 0; i < count; i++) to[i] = map.base + static_cast<std::size_t>(pixels_[first + i]) * map.pixel;
            return;
        }
        for (int i = 0; i < count; i++) {
            const int pixel = pixels_[first + i] % shape.pixels();
            to[i] = map.row_at(0, pixel / shape.width) + static_cast<std::size_t>(pixel % shape.width) * map.pixel;
        }
    }

    // A square of an image's map, whose corner may lie outside.
    struct Square {
        int image, y, x, height, width;
    };

    // Pointers to a square's pixels, row by row, each `step` further in `to`. What lies outside the map is `outside`;
    // null: the nearest pixel inside.
    static void list_square(const View &map, const Shape &shape, const Square &square, const void *outside, Pointers to,
                            int step) {
        const bool within = square.x >= 0 && square.x + square.width <= shape.width;
        for (int y = square.y; y < square.y + square.height; y++) {
            const bool row_inside = y >= 0 && y < shape.height;
            const std::byte *const row = map.row_at(square.image, std::clamp(y, 0, shape.height - 1));
            if (within && (row_inside || !outside)) {
                const std::byte *at = row + static_cast<std::size_t>(square.x) * map.pixel;
                for (int x = 0; x < square.width; x++, to += step, at += map.pixel) *to = at;
                continue;
            }
            for (int x = square.x; x < square.x + square.width; x++, to += step) {
                const bool inside = row_inside && x >= 0 && x < shape.width;
                const bool zero = !inside && outside;
                *to = zero ? outside : row + static_cast<std::size_t>(std::clamp(x, 0, shape.width - 1)) * map.pixel;
            }
        }
    }

    // The input pixels of a window whose outputs are this chunk's pixels, tap by tap: [kernel_h * kernel_w][count].
    void list_window(const Step &window, const Shape &out, int count, const void *outside) const {
        const View in = source();
        int image = pixels_[0] / out.pixels(), y = pixels_[0] % out.pixels() / out.width, x = pixels_[0] % out.width;
        for (int i = 0; i < count; i++) {
            const Square square{image, y * window.stride - window.padding, x * window.stride - window.padding,
                                window.kernel_h, window.kernel_w};
            list_square(in, o_.in, square, outside, taps_ + i, count);
            if (++x < out.width) continue;
            x = 0;
            if (++y < out.height) continue;
            y = 0;
            image++;
        }
    }

    void number_pixels(int first, int count) const {
        for (int i = 0; i < count; i++) pixels_[i] = first + i;
    }

    // --- convolutions

    // Some units of the batch: pixels of the first layer's output, or Winograd's tiles of it.
    void convolution(int first, int count) {
        const Layer &head = o_.layers[0];
        if (head.winograd) return winograd(first, count);
        number_pixels(first, count);
        list_window(*head.step, head.out, count, zeros());
        list_outputs(head.map, head.out, o_.scratch.tile[0], 0, count, out_[0]);
        Product p = product(head, taps_, count, count, out_[0]);
        p.add = list_added(head, 0, count);
        take_slice(p, head);
        p.next = weight_of(1);
        multiply(p);
        further_layers(count);
    }

    // A layer's weights; null where there is no such layer.
    const std::byte *weight_of(std::size_t layer) const {
        return layer < o_.layers.size() ? o_.layers[layer].weight : nullptr;
    }

    // The weights that this thread probably multiplies after this item's last ones; null where they are known to be in
    // the cache, or nothing follows. Several threads take items from the last one on, and one takes them from the first
    // one on.
    const std::byte *following_weight() const {
        const int threads = plan_.options.threads, next = threads == 1 ? item_ + 1 : item_ - threads;
        if (next >= 0 && next < o_.items()) {
            const int slice = next / o_.chunks;
            return slice == slice_ && o_.layers.size() == 1 ? nullptr : slice_weight(o_, slice);
        }
        if (o_.following < 0) return nullptr;
        const Operation &after = plan_.operations[static_cast<std::size_t>(o_.following)];
        const int first = threads == 1 ? 0 : std::max(0, after.items() - threads + item_ % threads);
        return slice_weight(after.parts.empty() ? after : after.parts[0], first / after.chunks);
    }
    const std::byte *slice_weight(const Operation &o, int slice) const {
        const Step &step = *o.layers[0].step;
        const std::size_t first = static_cast<std::size_t>(step.blocks() * slice / o.slices);
        return o.layers[0].weight + first * step.block_bytes(plan_.network->precision);
    }

    // This item's share of a single layer's outputs.
    void take_slice(Product &p, const Layer &layer) const {
        const int first = p.blocks * slice_ / o_.slices, last = p.blocks * (slice_ + 1) / o_.slices;
        p.w = layer.weight + static_cast<std::size_t>(first) * p.w_block;
        p.bias += first * kLane;
        p.offset = p.add_offset = first * kLane;
        p.blocks = last - first;
    }

    // A chunk's pixels in pieces: as the plan says; in tiles in nearly equal ones of whole groups, since a piece of a
    // few pixels would meet all weights for next to nothing.
    class Pieces {
      public:
        Pieces(const Operation &o, int count, int group)
            : count_(count),
              unit_(o.tiled ? group : o.piece),
              units_((count + unit_ - 1) / unit_),
              pieces_(o.tiled ? std::max(1, (count + o.piece / 2) / o.piece) : units_) {}

        // Of the first, second, ...
        int end(int number) const { return std::min(units_ * number / pieces_ * unit_, count_); }

      private:
        const int count_, unit_, units_, pieces_;
    };

    // The second and further layers, piece by piece, so that a wide map exists for one piece only.
    void further_layers(int count) {
        if (o_.layers.size() == 1) return;
        const Pieces pieces(o_, count, kernels_.group);
        for (int first = 0, number = 1; first < count; number++) {
            const int end = pieces.end(number), piece = end - first;
            const void *const *in = out_[0] + first;
            for (std::size_t i = 1; i < o_.layers.size(); i++) {
                const Layer &layer = o_.layers[i];
                void **const out = i == 1 ? out_[1] : last_outputs();
                list_outputs(layer.map, layer.out, o_.scratch.tile[1], first, piece, out);
                Product p = product(layer, in, piece, piece, out);
                p.add = list_added(layer, first, piece);
                p.next = next_of(i, end < count, first > 0);
                multiply_neighbours(p, is_spare(i - 1));
                in = out;
            }
            first = end;
        }
    }

    // The weights after those of a layer: the next layer's, or the second one's for the next piece. In tiles, null
    // where they are in the cache already, since an earlier piece met them.
    const std::byte *next_of(std::size_t layer, bool more, bool again) const {
        const std::byte *const next = weight_of(layer + 1);
        if (!o_.tiled) return next || !more ? next : weight_of(1);
        if (!next) return more ? nullptr : following_weight();
        return again ? nullptr : next;
    }

    // Whether more may be read behind a layer's outputs: in scratch there is room for whole groups.
    bool is_spare(std::size_t layer) const {
        return layer == 0 && o_.pool ? o_.pool_map == kScratch : o_.layers[layer].map == kScratch;
    }

    // The window's pointers are not needed any more when a third layer runs.
    void **last_outputs() const { return const_cast<void **>(taps_); }

    // --- in tiles

    // Rows of one image, or whole images.
    struct Piece {
        int image, images, y, rows;
    };
    Piece piece(int chunk) const {
        const int height = o_.layers[0].out.height;
        if (o_.images > 1) {
            const int image = chunk * o_.images;
            return {image, std::min(o_.images, plan_.options.batch - image), 0, height};
        }
        const int bands = (height + o_.rows - 1) / o_.rows, y = chunk % bands * o_.rows;
        return {chunk / bands, 1, y, std::min(o_.rows, height - y)};
    }

    void tiled_convolution(const Piece &piece) {
        const Layer &head = o_.layers[0];
        const Shape &out = head.out;
        const int first = (piece.image * out.height + piece.y) * out.width,
                  count = piece.images * piece.rows * out.width;
        number_pixels(first, count);
        list_outputs(head.map, out, o_.scratch.tile[0], 0, count, out_[0]);
        const bool added = list_added(head, 0, count) != nullptr;
        Product p = product(head, nullptr, 0, count, out_[0]);
        if (added) p.add = add_;
        take_slice(p, head);
        p.next = o_.layers.size() > 1 ? weight_of(1) : following_weight();
        if (o_.windowed) {
            list_windows(p, piece);
            multiply(p);
        } else {
            list_pixels(source(), o_.in, 0, count, taps_);
            p.a = taps_;
            multiply_neighbours(p, false);
        }
        further_layers(count);
    }

    // Copies the windows and lists their groups, tap by tap, and at each position what is written and added: of those
    // between two rows, a spare pixel and zeros.
    void list_windows(Product &p, const Piece &piece) const {
        const Window &window = o_.window;
        const int group = kernels_.group, positions = whole_groups(window.positions(piece.rows), group);
        p.pixels = piece.images * positions;
        p.a_pitch = p.pixels / group;
        p.step = static_cast<std::ptrdiff_t>(window.pixel);
        const View in = source();
        std::byte *planes = scratch_ + o_.scratch.window;
        for (int i = 0; i < piece.images; i++, planes += window.bytes(piece.rows)) {
            window.copy(piece.y, piece.rows, [&](int y) { return in.row_at(piece.image + i, y); }, planes);
            Pointers to = groups_ + i * (positions / group);
            for (int ky = 0; ky < window.kernel_h; ky++)
                for (int kx = 0; kx < window.kernel_w; kx++, to += p.a_pitch)
                    list_groups(planes + window.tap(piece.rows, ky, kx), window.pixel, positions / group, to);
        }
        p.a = groups_;
        spread(p, piece, positions);
    }

    // From lists of pixels to lists of positions: of outputs in out_[1], of what is added in taps_.
    void spread(Product &p, const Piece &piece, int positions) const {
        const int across = o_.window.out_width, width = o_.window.width;
        int pixel = 0;
        for (int i = 0; i < piece.images; i++)
            for (int at = 0, x = 0; at < positions; at++, x = x + 1 < width ? x + 1 : 0) {
                const bool inside = x < across && at < piece.rows * width;
                out_[1][i * positions + at] = inside ? out_[0][pixel] : scratch_ + o_.scratch.spare;
                if (p.add) taps_[i * positions + at] = inside ? add_[pixel] : zeros();
                pixel += inside;
            }
        p.out = out_[1];
        if (p.add) p.add = taps_;
    }

    // --- Winograd's convolution

    void winograd(int first, int tiles) {
        const Layer &head = o_.layers[0];
        const int t = head.winograd->m + 2;
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
        const View in = source();
        Pointers to = taps_;
        for (int tile = first; tile < first + tiles; tile++, to += t * t) {
            const Corner c = corner(head, tile);
            list_square(in, head.in, {c.image, c.y - 1, c.x - 1, t, t}, zeros(), to, 1);
        }
    }

    // The output pixels of each tile, [tiles][m * m] in out_[1], and what is added to them; those beyond the map go to
    // a spare pixel. Numbers the pixels inside and lists their outputs in out_[0]; returns how many there are.
    int list_tile_outputs(const Layer &head, int first, int tiles) const {
        const int m = head.winograd->m;
        const bool tiled = head.map == kScratch, adds = head.add >= 0;
        const View out = tiled ? View{scratch_ + o_.scratch.tile[0], 0, 0, pixel_bytes(head.out), 0}
                               : destination(head.map, head.out);
        const View added = adds ? destination(head.add, head.out) : out;
        int count = 0, listed = 0;
        for (int tile = first; tile < first + tiles; tile++) {
            const Corner c = corner(head, tile);
            for (int i = 0; i < m * m; i++, listed++) {
                const int y = c.y + i / m, x = c.x + i % m;
                const std::size_t across = static_cast<std::size_t>(x) * out.pixel;
                if (y >= head.out.height || x >= head.out.width) {
                    out_[1][listed] = scratch_ + o_.scratch.spare;
                    if (adds) add_[listed] = zeros();
                    continue;
                }
                if (adds) add_[listed] = added.row_at(c.image, y) + across;
                out_[1][listed] =
                    tiled ? out.base + static_cast<std::size_t>(count) * out.pixel : out.row_at(c.image, y) + across;
                pixels_[count] = (c.image * head.out.height + y) * head.out.width + x;
                out_[0][count++] = out_[1][listed];
            }
        }
        return count;
    }

    // Products for a few blocks of outputs at all positions, then their transform, so that the products stay in cache.
    void multiply_tiles(const Layer &head, int t, int tiles) const {
        const Step &step = *head.step;
        const std::size_t block = static_cast<std::size_t>(step.k_pitch) * kLane * element_;
        const float *const products = reinterpret_cast<const float *>(scratch_ + o_.scratch.products);
        Product p{};
        p.a_pitch = p.pixels = tiles;
        p.taps = 1;
        p.k = p.k_pitch = step.k_pitch;
        p.w_block = block * static_cast<std::size_t>(t * t);
        p.raw = true;
        const int last = step.blocks() * (slice_ + 1) / o_.slices;
        for (int first = step.blocks() * slice_ / o_.slices; first < last; first += kProductBlocks) {
            p.blocks = std::min(kProductBlocks, last - first);
            const int following = first + p.blocks;
            const std::byte *const after =
                following < last ? head.weight + static_cast<std::size_t>(following * t * t) * block : weight_of(1);
            for (int position = 0; position < t * t; position++) {
                p.a = taps_ + position * tiles;
                p.out = outputs(o_.scratch.product_rows) + position * tiles;
                const std::byte *const weights =
                    head.weight + static_cast<std::size_t>(first * t * t + position) * block;
                p.w = weights;
                p.next = position + 1 < t * t ? weights + block : after;
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

    void max_pool(int chunk) {
        const int first = chunk * o_.chunk, count = std::min(o_.chunk, plan_.options.batch * o_.units - first);
        number_pixels(first, count);
        list_window(*o_.pool, o_.pooled, count, nullptr);
        list_outputs(o_.pool_map, o_.pooled, 0, 0, count, out_[0]);
        kernels_.max_pool({taps_, o_.pool->kernel_h * o_.pool->kernel_w, count, o_.in.pitch(), out_[0]});
    }

    // All pixels of one image.
    void list_image(int image) const {
        number_pixels(image * o_.in.pixels(), o_.in.pixels());
        list_pixels(source(), o_.in, 0, o_.in.pixels(), taps_);
    }

    // So many channels of the listed pixels of an image to its means from `offset` on.
    void average_to(int image, const void *const *pixels, int channels, int offset) const {
        std::byte *const means = destination(o_.pool_map, o_.pooled).row_at(image, 0);
        kernels_.average({pixels, o_.in.pixels(), channels, means, offset, o_.pooled.pitch()});
    }

    void average(int image) {
        list_image(image);
        average_to(image, taps_, o_.in.pitch(), 0);
    }

    // A 1x1 convolution for a slice of its outputs on all pixels of an image, averaged at once: its map never exists.
    void convolution_average(int image) {
        const Layer &layer = o_.layers[0];
        const int count = o_.in.pixels();
        list_image(image);
        Product p = product(layer, taps_, count, count, out_[0]);
        take_slice(p, layer);
        if (o_.tiled) p.next = following_weight();
        if (list_added(layer, 0, count)) p.add = add_;
        const int offset = p.offset;
        p.offset = 0;
        p.out_pitch = p.blocks * kLane;
        const std::size_t bytes = static_cast<std::size_t>(p.out_pitch) * element_;
        for (int i = 0; i < count; i++)
            out_[0][i] = scratch_ + o_.scratch.tile[0] + static_cast<std::size_t>(i) * bytes;
        multiply_neighbours(p, false);
        average_to(image, out_[0], p.out_pitch, offset);
    }

    // Logits are not padded to whole blocks as maps are, so they pass through a tile.
    void linear(int chunk) {
        const Layer &layer = o_.layers[0];
        const int first = chunk * o_.chunk, count = std::min(o_.chunk, plan_.options.batch - first);
        number_pixels(first, count);
        list_pixels(source(), o_.in, 0, count, taps_);
        Product p = product(layer, taps_, count, count, out_[0]);
        take_slice(p, layer);
        if (o_.tiled) p.next = following_weight();
        const int offset = p.offset, width = p.blocks * kLane;
        p.offset = 0;
        p.raw = true;
        float *const tile = reinterpret_cast<float *>(scratch_ + o_.scratch.tile[0]);
        for (int i = 0; i < count; i++) out_[0][i] = tile + i * width;
        multiply_neighbours(p, false);
        const int classes = layer.step->out_channels, kept = std::min(width, classes - offset);
        for (int i = 0; i < count; i++)
            std::memcpy(run_.logits + static_cast<std::size_t>(first + i) * static_cast<std::size_t>(classes) + offset,
                        tile + i * width, static_cast<std::size_t>(kept) * sizeof(float));
    }

    // --- the stem: rows of one image, from top to bottom

    void stem(int chunk) {
        const int bands = o_.chunks / plan_.options.batch, band = chunk % bands;
        begin_stem(chunk / bands);
        for (int y = band * o_.chunk; y < std::min((band + 1) * o_.chunk, o_.units); y++) stem_row(y);
    }

    void begin_stem(int image) {
        const int rows = o_.layers[0].step->kernel_h;
        std::memset(scratch_ + o_.scratch.images, 0,
                    image_row_bytes() * (o_.tiled ? 1 : static_cast<std::size_t>(rows) + 1));
        if (o_.tiled) std::memset(columns_row(-1), 0, columns_row_bytes());
        image_ = image;
        next_image_row_ = next_conv_row_ = 0;
    }

    void stem_row(int y) {
        const Layer &conv = o_.layers[0];
        const Shape &out = o_.pool ? o_.pooled : conv.out;
        number_pixels((image_ * out.height + y) * out.width, out.width);
        list_outputs(o_.pool ? o_.pool_map : conv.map, out, o_.scratch.tile[0], 0, out.width, out_[0]);
        if (o_.pool)
            pool_row(y);
        else
            image_convolution(y, out_[0]);
        further_layers(out.width);
    }

    std::size_t image_row_bytes() const { return stem_row_elements(o_) * element_; }

    // Where a row of the image is in a ring; those above and below the image are the row of zeros behind it.
    std::size_t image_slot(int y) const {
        const int rows = o_.layers[0].step->kernel_h;
        return static_cast<std::size_t>(y < 0 || y >= o_.in.height ? rows : y % rows);
    }

    // A row of the padded image. In tiles there is one, and the ring is that of the columns.
    std::byte *image_row(int y) const {
        return scratch_ + o_.scratch.images + (o_.tiled ? 0 : image_slot(y) * image_row_bytes());
    }

    // One row of the convolution of the images; rows of the image that it needs join the ring.
    void image_convolution(int y, void *const *out) {
        const Layer &layer = o_.layers[0];
        const Step &conv = *layer.step;
        const int top = y * conv.stride - conv.padding, width = layer.out.width;
        for (next_image_row_ = std::max(next_image_row_, std::max(top, 0));
             next_image_row_ < std::min(top + conv.kernel_h, o_.in.height); next_image_row_++)
            interleave(next_image_row_);
        Product p = product(layer, taps_, width, width, out);
        if (o_.tiled)
            list_columns(p, top);
        else
            list_image_rows(top);
        if (layer.add >= 0) {
            const View added = destination(layer.add, layer.out);
            for (int x = 0; x < width; x++)
                add_[x] = added.row_at(image_, y) + static_cast<std::size_t>(x) * added.pixel;
            p.add = add_;
        }
        multiply(p);
    }

    // The pixels that each tap meets: a tap is a row of the kernel.
    void list_image_rows(int top) const {
        const Step &conv = *o_.layers[0].step;
        const int width = o_.layers[0].out.width;
        const std::size_t step = static_cast<std::size_t>(conv.stride * o_.in.channels) * element_;
        for (int ky = 0; ky < conv.kernel_h; ky++) {
            const std::byte *at = image_row(top + ky);
            for (int x = 0; x < width; x++, at += step) taps_[ky * width + x] = at;
        }
    }

    // Tiles take pixels that overlap, and so lie across lines of the cache, only slowly: each tap's elements are copied
    // to lines of their own, once for all outputs and all rows of the convolution that meet this row of the image.
    std::size_t columns_bytes() const { return static_cast<std::size_t>(o_.layers[0].step->k_pitch) * element_; }
    std::size_t columns_row_bytes() const {
        return static_cast<std::size_t>(whole_groups(o_.layers[0].out.width, kernels_.group)) * columns_bytes();
    }
    std::byte *columns_row(int y) const { return scratch_ + o_.scratch.columns + image_slot(y) * columns_row_bytes(); }
    void copy_columns(int y) const {
        const std::size_t step = static_cast<std::size_t>(o_.layers[0].step->stride * o_.in.channels) * element_;
        const std::byte *from = image_row(y);
        std::byte *to = columns_row(y);
        const std::size_t bytes = columns_bytes();
        for (int x = 0; x < o_.layers[0].out.width; x++, from += step, to += bytes)
            if (kernels_.place)
                kernels_.place(reinterpret_cast<const float *>(from), o_.layers[0].step->k_pitch, to);
            else if (bytes == 64)
                std::memcpy(to, from, 64);  // as nearly always: one instruction
            else
                std::memcpy(to, from, bytes);
    }
    void list_columns(Product &p, int top) const {
        const int group = kernels_.group;
        p.a = groups_;
        p.a_pitch = (p.pixels + group - 1) / group;
        p.step = static_cast<std::ptrdiff_t>(columns_bytes());
        for (int ky = 0; ky < p.taps; ky++)
            list_groups(columns_row(top + ky), columns_bytes(), p.a_pitch, groups_ + ky * p.a_pitch);
    }

    void interleave(int y) const {
        const std::size_t plane = static_cast<std::size_t>(o_.in.pixels()),
                          channels = static_cast<std::size_t>(o_.in.channels);
        const float *const row = run_.images + static_cast<std::size_t>(image_) * channels * plane +
                                 static_cast<std::size_t>(y) * static_cast<std::size_t>(o_.in.width);
        const std::size_t left = static_cast<std::size_t>(o_.layers[0].step->padding) * channels * element_;
        kernels_.interleave({row, plane, o_.in.channels, o_.in.width, image_row(y) + left});
        if (o_.tiled) copy_columns(y);
    }

    // One row of the pooling; rows of the convolution that it needs join their ring.
    void pool_row(int y) {
        const Shape &rows = o_.layers[0].out;
        const Step &pool = *o_.pool;
        const int top = y * pool.stride - pool.padding;
        for (next_conv_row_ = std::max(next_conv_row_, std::max(top, 0));
             next_conv_row_ < std::min(top + pool.kernel_h, rows.height); next_conv_row_++) {
            for (int x = 0; x < rows.width; x++) out_[1][x] = row_pixel(next_conv_row_, x);
            image_convolution(next_conv_row_, out_[1]);
        }
        const int width = o_.pooled.width;
        for (int ky = 0; ky < pool.kernel_h; ky++)
            for (int kx = 0; kx < pool.kernel_w; kx++)
                for (int x = 0; x < width; x++)
                    taps_[(ky * pool.kernel_w + kx) * width + x] =
                        row_pixel(std::clamp(top + ky, 0, rows.height - 1),
                                  std::clamp(x * pool.stride - pool.padding + kx, 0, rows.width - 1));
        kernels_.max_pool({taps_, pool.kernel_h * pool.kernel_w, width, rows.pitch(), out_[0]});
    }

    std::byte *row_pixel(int y, int x) const {
        const Shape &rows = o_.layers[0].out;
        const std::size_t slot = static_cast<std::size_t>(y % o_.pool->kernel_h);
        return scratch_ + o_.scratch.rows +
               (slot * static_cast<std::size_t>(rows.width) + static_cast<std::size_t>(x)) * pixel_bytes(rows);
    }

    const Run &run_;
    const Plan &plan_;
    const Operation &o_;
    const Kernels &kernels_;
    const std::size_t element_;
    std::byte *const scratch_;
    const Pointers taps_, add_, groups_;
    void **const out_[2];
    int *const pixels_;
    int item_ = 0, slice_ = 0;
    int image_ = 0, row_ = 0;                     // a part's: the image in work and the next rows to make
    int next_image_row_ = 0, next_conv_row_ = 0;  // the stem's: rows that are not yet in their rings
};

// A band of rows of a streamed operation's last part; each part makes rows when the next one needs them.
class Band {
  public:
    Band(const Run &run, const Operation &operation, std::byte *scratch)
        : parts_(static_cast<int>(operation.parts.size())) {
        for (int i = 0; i < parts_; i++) works_[i].emplace(run, operation.parts[static_cast<std::size_t>(i)], scratch);
    }

    void run(int image, int first, int last) {
        for (int part = parts_ - 1, y = first; part >= 0; part--) {
            Work &work = *works_[part];
            y = y / work.step_rows() * work.step_rows();
            work.begin_band(image, y);
            y = work.first_input_row(y);
        }
        make_until(parts_ - 1, last);
    }

  private:
    void make_until(int part, int row) {
        Work &work = *works_[part];
        while (work.next_row() < row) {
            if (part > 0) make_until(part - 1, work.input_rows());
            work.make_rows();
        }
    }

    const int parts_;
    std::optional<Work> works_[kMostParts];
};

void stream(const Run &run, const Operation &operation, int item, std::byte *scratch) {
    const int bands = operation.chunks / run.plan->options.batch, first = item % bands * operation.chunk;
    Band(run, operation, scratch).run(item / bands, first, std::min(first + operation.chunk, operation.units));
}

}  // namespace

void execute(const Run &run, const Operation &operation, int item, int thread) {
    const Buffer &buffer = run.plan->buffers[static_cast<std::size_t>(operation.scratch_buffer)];
    std::byte *const scratch = run.arena + buffer.offset + static_cast<std::size_t>(thread) * operation.scratch.bytes;
    if (operation.kind == OperationKind::streamed) return stream(run, operation, item, scratch);
    Work(run, operation, scratch).execute(item);
}

}  // namespace rd
