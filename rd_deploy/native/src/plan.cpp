#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <thread>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "error.h"
#include "fields.h"
#include "floating_point.h"

namespace rd {

void FreeDeleter::operator()(void *memory) const { std::free(memory); }

Memory allocate(std::size_t bytes) {
    constexpr std::size_t huge = std::size_t{2} << 20;
    const std::size_t alignment = bytes >= huge ? huge : kAlignment;
    const std::size_t whole = (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
    void *memory = std::aligned_alloc(alignment, whole);
    if (!memory) throw Error(RD_ERROR_MEMORY, "not enough memory for " + std::to_string(bytes) + " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment == huge) madvise(memory, whole, MADV_HUGEPAGE);  // advice: nothing is lost if it is not taken
#endif
    return Memory(static_cast<std::byte *>(memory));
}

namespace {

constexpr std::size_t kMostLayers = 3;  // a window, expand, reduce
// Pixels of a chunk: enough that weights are read from the cache rarely per pixel, few enough that the chunk's tiles
// stay in a core's second-level cache. Measured in docs/engine.md.
constexpr int kDirectPixels = 112;
constexpr int kWinogradTiles = 28;
constexpr std::size_t kTileBytes = 128 << 10;  // of a map that exists in scratch only
// A thread with fewer pixels than this would read all weights for too little work: share out the outputs instead.
constexpr int kLeastPixels = 14;
constexpr int kSlicesPerThread = 2;
// The same for tiles: positions of a chunk; pixels of a piece, and of a thread that is worth all weights.
constexpr int kTiledPositions = 240;
constexpr int kFewTiledPositions = 64;  // for RD_FLAG_SMALL
constexpr int kTiledPiece = 64;
constexpr int kTiledStep = 112;  // pixels of a streamed map's rows that are made at a time
constexpr int kLeastTiledPixels = 64;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

using Operations = std::vector<Operation>;

class Builder {
  public:
    Builder(std::shared_ptr<const Network> network, const Options &options) : plan_(std::make_shared<Plan>()) {
        plan_->network = std::move(network);
        plan_->options = options;
        plan_->kernels = &choose_kernels(options.isa, net().precision == Precision::bf16);
        plan_->options.isa = plan_->kernels->isa;
        plan_->element = element_bytes(net().precision);
    }

    std::shared_ptr<const Plan> build() {
        infer_shapes();
        count_readers();
        for (std::size_t at = 0; at < net().steps.size();) at = add_operation(at);
        lay_out();
        if (!flag(RD_FLAG_UNFUSED)) stream();
        transform_weights();
        find_following();
        make_zeros();
        describe();
        return plan_;
    }

  private:
    const Network &net() const { return *plan_->network; }
    const Options &options() const { return plan_->options; }
    const Step &step(std::size_t index) const { return net().steps[index]; }
    bool flag(unsigned flag) const { return (options().flags & flag) != 0; }

    // --- shapes

    void infer_shapes() {
        images_ = {net().channels, options().height, options().width};
        for (const Step &step : net().steps) {
            Shape out = source_shape(step);
            if (step.kind == StepKind::conv || step.kind == StepKind::max_pool) {
                out.height = slides(out.height, step.kernel_h, step);
                out.width = slides(out.width, step.kernel_w, step);
            } else {
                out.height = out.width = 1;
            }
            if (step.kind == StepKind::conv || step.kind == StepKind::linear) out.channels = step.out_channels;
            // Pixels are numbered in ints, over the whole batch.
            if (std::int64_t{options().batch} * out.height * out.width > (std::int64_t{1} << 30))
                throw Error(RD_ERROR_ARGUMENT,
                            "images and batch are too large for this engine at " + quoted(step.name));
            check_sum(step, out);
            shapes_.push_back(out);
        }
    }

    // Paths whose maps are of one size for images like the file's, which was checked, may differ for others.
    void check_sum(const Step &step, const Shape &out) const {
        if (step.add < 0) return;
        const Shape &added = shapes_[index(step.add)];
        if (added.channels == out.channels && added.height == out.height && added.width == out.width) return;
        throw Error(RD_ERROR_ARGUMENT,
                    "images of " + std::to_string(options().height) + "x" + std::to_string(options().width) +
                        " do not fit this network: " + quoted(step.name) + " would add maps of different sizes");
    }

    Shape source_shape(const Step &step) const {
        return step.source == kImages ? images_ : shapes_[index(step.source)];
    }

    int slides(int size, int kernel, const Step &step) const {
        const int room = size + 2 * step.padding - kernel;
        if (room < 0)
            throw Error(RD_ERROR_ARGUMENT, "images of " + std::to_string(options().height) + "x" +
                                               std::to_string(options().width) + " are too small for this network at " +
                                               quoted(step.name));
        return room / step.stride + 1;
    }

    static std::size_t index(int number) { return static_cast<std::size_t>(number); }

    void count_readers() {
        readers_.assign(net().steps.size(), 0);
        map_of_.assign(net().steps.size(), kScratch);
        for (const Step &step : net().steps) {
            if (step.source >= 0) readers_[index(step.source)]++;
            if (step.add >= 0) readers_[index(step.add)]++;
        }
    }

    // --- from steps to operations

    // Make the operation that begins with step `at`; returns the first step after it.
    std::size_t add_operation(std::size_t at) {
        Operation operation;
        operation.name = step(at).name;
        operation.in = source_shape(step(at));
        operation.source = step(at).source == kImages ? kImages : map_of_[index(step(at).source)];
        const std::size_t next =
            step(at).kind == StepKind::conv ? begin_with_convolution(operation, at) : stand_alone(operation, at);
        plan_->operations.push_back(std::move(operation));
        return next;
    }

    std::size_t stand_alone(Operation &operation, std::size_t at) {
        if (step(at).kind == StepKind::linear) {
            operation.kind = OperationKind::linear;
            add_layer(operation, at);
            return at + 1;
        }
        return add_pool(operation, at,
                        step(at).kind == StepKind::max_pool ? OperationKind::max_pool : OperationKind::average);
    }

    std::size_t begin_with_convolution(Operation &operation, std::size_t at) {
        add_layer(operation, at);
        if (step(at).source == kImages) {
            operation.kind = OperationKind::stem;
            if (joins_as_pool(at, StepKind::max_pool)) {
                operation.layers[0].map = kScratch;
                add_pool(operation, ++at, OperationKind::stem);
            }
            return absorb(operation, at);
        }
        if (ends_in_average(at)) {
            operation.layers[0].map = kScratch;
            return add_pool(operation, at + 1, OperationKind::convolution_average);
        }
        choose_winograd(operation.layers[0]);
        return absorb(operation, at);
    }

    void add_layer(Operation &operation, std::size_t at) {
        Layer layer;
        layer.step = &step(at);
        layer.in = source_shape(step(at));
        layer.out = shapes_[at];
        layer.weight = step(at).weight;
        if (step(at).add >= 0) layer.add = map_of_[index(step(at).add)];
        layer.map = make_map(at);
        if (!operation.layers.empty()) operation.name += "+" + step(at).name;
        operation.layers.push_back(layer);
    }

    std::size_t add_pool(Operation &operation, std::size_t at, OperationKind kind) {
        operation.kind = kind;
        operation.pool = &step(at);
        operation.pooled = shapes_[at];
        operation.pool_map = make_map(at);
        if (!operation.layers.empty()) operation.name += "+" + step(at).name;
        return at + 1;
    }

    // Let 1x1 convolutions that follow step `at` join the operation, each on the pixels that the one before it makes.
    std::size_t absorb(Operation &operation, std::size_t at) {
        for (; joins(operation, at); at++) {
            if (readers_[at] == 1) last_output(operation) = kScratch;
            add_layer(operation, at + 1);
        }
        return at + 1;
    }

    static int &last_output(Operation &operation) {
        return operation.pool && operation.layers.size() == 1 ? operation.pool_map : operation.layers.back().map;
    }

    bool joins(const Operation &operation, std::size_t at) const {
        if (flag(RD_FLAG_UNFUSED) || at + 1 >= net().steps.size() || operation.layers.size() == kMostLayers)
            return false;
        // Together they would make two maps at once, the one that somebody else reads as well and the one after it.
        if (flag(RD_FLAG_SMALL) && readers_[at] > 1) return false;
        return is_pointwise(step(at + 1)) && step(at + 1).source == static_cast<int>(at) && !is_small(shapes_[at]) &&
               !ends_in_average(at + 1);
    }

    static bool is_pointwise(const Step &step) {
        return step.kind == StepKind::conv && step.kernel_h == 1 && step.kernel_w == 1 && step.stride == 1 &&
               step.padding == 0;
    }

    // Too few pixels to be shared out among the threads.
    bool is_small(const Shape &out) const {
        return options().batch * out.pixels() < (tiled() ? kLeastTiledPixels : kLeastPixels) * options().threads;
    }

    // Whether products read groups of neighbouring pixels.
    bool tiled() const { return plan_->kernels->group > 1; }
    int whole(int pixels) const { return whole_groups(pixels, plan_->kernels->group); }

    bool joins_as_pool(std::size_t at, StepKind kind) const {
        return !flag(RD_FLAG_UNFUSED) && readers_[at] == 1 && at + 1 < net().steps.size() &&
               step(at + 1).kind == kind && step(at + 1).source == static_cast<int>(at);
    }

    bool ends_in_average(std::size_t at) const {
        return is_pointwise(step(at)) && joins_as_pool(at, StepKind::average_pool);
    }

    int make_map(std::size_t at) {
        plan_->maps.push_back({step(at).name, shapes_[at], 0, 0, -1});
        return map_of_[at] = static_cast<int>(plan_->maps.size()) - 1;
    }

    // The convolution that costs least, in multiply-accumulates for the whole batch. Nothing here depends on the
    // threads, so that no result does.
    void choose_winograd(Layer &layer) const {
        const Step &conv = *layer.step;
        const bool possible = conv.kernel_h == 3 && conv.kernel_w == 3 && conv.stride == 1 && conv.padding == 1;
        if (!possible || flag(RD_FLAG_NO_WINOGRAD) || flag(RD_FLAG_SMALL)) return;
        double least = cost(layer, 9.0 * layer.out.pixels(), 9, 0);
        for (const Winograd &form : plan_->kernels->winograd) {
            if (form.m == 0) continue;
            const double spots = (form.m + 2) * (form.m + 2), tiles = tiles_of(layer, form.m);
            const double candidate = cost(layer, tiles * spots, spots, tiles * spots);
            if (candidate < least) {
                least = candidate;
                layer.winograd = &form;
            }
        }
    }

    // `rows`: pixels times taps that meet all weights, per image; `planes`: of weights; `transformed`: pixels, per
    // image.
    double cost(const Layer &layer, double rows, double planes, double transformed) const {
        // A channel of a transformed pixel costs about as much as 10 multiply-accumulates, and a byte of weights, which
        // come from memory once per run, as much as the 7 (fp32) or 14 (bf16) that are done meanwhile: fitted to the
        // profiles in docs/engine.md.
        constexpr double transform = 10, weight = 28;
        const double in = layer.in.pitch(), out = layer.out.pitch();
        return options().batch * (rows * in * out + transform * transformed * (in + out)) + weight * planes * in * out;
    }

    static int tiles_of(const Layer &layer, int m) {
        return ceil_div(layer.out.height, m) * ceil_div(layer.out.width, m);
    }

    // --- streaming

    // While the arena's largest moments can be made smaller so, let an operation feed its successor row by row, so that
    // the map between them never exists.
    void stream() {
        constexpr std::size_t most = 512;  // operations: what follows takes time with the third power of their number
        if (plan_->operations.size() > most) return;
        while (std::optional<Operations> better = smaller_plan()) {
            plan_->operations = std::move(*better);
            lay_out();
        }
    }

    std::optional<Operations> smaller_plan() {
        const Operations now = plan_->operations;
        std::vector<std::size_t> least = live_sizes();
        const std::size_t peak = peak_operation();
        std::optional<Operations> best;
        for (const std::size_t first : {peak, peak - 1}) {  // peak - 1 may wrap around: no operation then
            if (first >= now.size() || first + 1 >= now.size() || !can_stream(now[first], now[first + 1])) continue;
            plan_->operations = joined(now, first);
            lay_out();
            std::vector<std::size_t> sizes = live_sizes();
            if (sizes >= least) continue;
            least = std::move(sizes);
            best = plan_->operations;
        }
        plan_->operations = now;
        lay_out();
        return best;
    }

    // Of all operations, largest first: of two plans with the same peak, the one with fewer operations there is better,
    // since the next step may end it.
    std::vector<std::size_t> live_sizes() const {
        std::vector<std::size_t> sizes;
        for (std::size_t at = 0; at < plan_->operations.size(); at++) sizes.push_back(live(at));
        std::sort(sizes.begin(), sizes.end(), std::greater<>());
        return sizes;
    }

    std::size_t live(std::size_t operation) const {
        const Live live = live_at(plan_->buffers, static_cast<int>(operation));
        return live.maps + live.scratch;
    }

    std::size_t peak_operation() const {
        std::size_t peak = 0;
        for (std::size_t at = 1; at < plan_->operations.size(); at++)
            if (live(at) > live(peak)) peak = at;
        return peak;
    }

    bool can_stream(const Operation &first, const Operation &second) const {
        const std::size_t parts =
            std::max<std::size_t>(1, first.parts.size()) + std::max<std::size_t>(1, second.parts.size());
        const Operation &head = second.parts.empty() ? second : second.parts[0],
                        &last = first.parts.empty() ? first : first.parts.back();
        if (!is_row_wise(first) || !is_row_wise(second) || head.source < 0 || head.source != last_map(last))
            return false;
        if (readers_of_map(head.source) != 1 || parts > kMostParts) return false;
        if (flag(RD_FLAG_SMALL)) return true;
        // A band begins by computing a few rows that the band before it computes as well: bands must be much taller.
        // The map before a stride is the largest one, and worth it.
        constexpr int tall = 8;
        return parts == 2 && head.layers[0].step->stride > 1 && second.out().height >= tall * bands(second.out());
    }

    // Whether an operation makes nothing but one map, each row from a few of its source's.
    static bool is_row_wise(const Operation &o) {
        if (o.kind == OperationKind::streamed) return true;
        if (o.kind != OperationKind::stem && o.kind != OperationKind::convolution) return false;
        int maps = o.pool_map != kScratch;
        for (const Layer &layer : o.layers) {
            if (layer.add >= 0) return false;
            maps += layer.map != kScratch;
        }
        return maps == 1 && o.slices == 1;
    }

    static int last_map(const Operation &o) {
        return o.pool && o.layers.size() == 1 ? o.pool_map : o.layers.back().map;
    }

    int readers_of_map(int map) const {
        for (std::size_t at = 0; at < map_of_.size(); at++)
            if (map_of_[at] == map) return readers_[at];
        return 0;
    }

    static Operations joined(const Operations &operations, std::size_t first) {
        Operations result(operations.begin(), operations.begin() + static_cast<std::ptrdiff_t>(first));
        Operation streamed;
        streamed.kind = OperationKind::streamed;
        for (std::size_t at : {first, first + 1}) {
            const Operation &o = operations[at];
            if (o.kind == OperationKind::streamed)
                streamed.parts.insert(streamed.parts.end(), o.parts.begin(), o.parts.end());
            else
                streamed.parts.push_back(o);
        }
        connect(streamed);
        result.push_back(std::move(streamed));
        result.insert(result.end(), operations.begin() + static_cast<std::ptrdiff_t>(first) + 2, operations.end());
        return result;
    }

    static void connect(Operation &streamed) {
        std::vector<Operation> &parts = streamed.parts;
        streamed.name.clear();
        for (std::size_t i = 0; i < parts.size(); i++) {
            streamed.name += (i == 0 ? "" : "+") + parts[i].name;
            if (i > 0) parts[i].source = kRing;
            if (i + 1 < parts.size()) last_output(parts[i]) = kRing;
        }
        streamed.source = parts[0].source;
        streamed.in = parts[0].in;
    }

    // Bands of rows into which each image is cut.
    int bands(const Shape &out) const { return std::min(out.height, ceil_div(options().threads, options().batch)); }

    // --- sharing the work out

    void lay_out() {
        for (Operation &o : plan_->operations) share_out(o);
        for (Operation &o : plan_->operations) lay_out_scratch(o, o.scratch, 0);
        find_lives();
        place_buffers();
    }

    void share_out(Operation &o) const {
        o.tiled = tiled();
        switch (o.kind) {
            case OperationKind::stem:
                share_out_rows(o, o.pool ? o.pooled : o.layers[0].out, kSlicesPerThread, 1);
                o.piece = piece(o);
                break;
            case OperationKind::convolution:
                share_out_convolution(o);
                break;
            case OperationKind::convolution_average: {
                const int blocks = o.layers[0].step->blocks();
                o.units = 1;
                o.chunks = options().batch;
                // Slices of 128 outputs: their weights stay in the cache while the batch passes by.
                o.slices = std::min(blocks, std::max(kSlicesPerThread * options().threads, ceil_div(blocks, 8)));
                break;
            }
            case OperationKind::max_pool:
                divide(o, o.pooled.pixels(), kDirectPixels);
                break;
            case OperationKind::average:
                o.units = 1;
                o.chunks = options().batch;
                break;
            case OperationKind::linear:
                o.units = 1;
                o.chunk = std::min(options().batch, kDirectPixels);
                o.chunks = ceil_div(options().batch, o.chunk);
                slice(o);
                break;
            case OperationKind::streamed:
                share_out_streamed(o);
                break;
        }
    }

    // Chunks of nearly equal size, at most `most` units, as many as a multiple of the threads.
    void divide(Operation &o, int units, int most) const {
        o.units = units;
        const int total = options().batch * units,
                  chunks = ceil_div(total, most * options().threads) * options().threads;
        o.chunk = ceil_div(total, std::min(total, chunks));
        o.chunks = ceil_div(total, o.chunk);
    }

    // Share out the outputs of a single layer as well, so that there are items for all threads.
    void slice(Operation &o) const {
        // In tiles one slice per thread: every slice copies the window again and begins with weights that nobody has
        // fetched.
        const int wanted = ceil_div(options().threads * (tiled() ? 1 : kSlicesPerThread), o.chunks);
        o.slices = std::clamp(wanted, 1, o.layers[0].step->blocks());
    }

    // Chunks are rows of one image, a multiple of `step`, and in all so many per thread.
    void share_out_rows(Operation &o, const Shape &out, int per_thread, int step) const {
        const int wanted = std::min(out.height, ceil_div(options().threads * per_thread, options().batch));
        o.units = out.height;
        o.chunk = ceil_div(ceil_div(out.height, wanted), step) * step;
        o.chunks = options().batch * ceil_div(out.height, o.chunk);
    }

    // Rows of a streamed map that are made at a time: as many as fill some groups, since each step meets all weights,
    // and so many that they share a band evenly.
    int tiled_rows(const Shape &out) const {
        if (flag(RD_FLAG_SMALL)) return 1;
        const int band = ceil_div(out.height, bands(out));
        int rows = std::min(ceil_div(kTiledStep, out.width), band);
        while (band % rows != 0) rows--;
        return rows;
    }

    void share_out_streamed(Operation &o) const {
        for (Operation &part : o.parts) {
            part.slices = 1;
            part.chunks = 1;
            part.step_rows = 1;
            part.tiled = tiled();
            part.piece = piece(part);
            if (part.kind == OperationKind::stem) {
                part.units = part.out().height;
                continue;
            }
            const Layer &head = part.layers[0];
            if (part.tiled) {
                part.images = 1;
                part.step_rows = part.rows = tiled_rows(part.out());
                set_window(part);
                continue;
            }
            part.step_rows = head.winograd ? head.winograd->m : 1;
            const int across = ceil_div(head.out.width, part.step_rows);
            part.units = across * ceil_div(head.out.height, part.step_rows);
            part.chunk = std::min(across, head.winograd ? tiles_at_once(head) : kDirectPixels);
        }
        share_out_rows(o, o.parts.back().out(), 1, o.parts.back().step_rows);
        for (std::size_t i = 1; i < o.parts.size(); i++) {
            Operation &from = o.parts[i - 1], &to = o.parts[i];
            const Step &window = *to.layers[0].step;
            // What one step of the window covers, in whole steps of the rows' maker, which may begin in between.
            const int covered = (to.step_rows - 1) * window.stride + window.kernel_h;
            from.out_ring.rows = (ceil_div(covered - 1, from.step_rows) + 1) * from.step_rows;
        }
    }

    static int tiles_at_once(const Layer &head) { return head.winograd->m == 2 ? kWinogradTiles : kWinogradTiles / 2; }

    // Pixels for which outputs that exist in scratch only stay in the cache.
    int piece(const Operation &o) const {
        std::size_t widest = 1;
        for (const Layer &layer : o.layers)
            if (layer.map == kScratch) widest = std::max(widest, index(layer.out.pitch()) * plan_->element);
        const std::size_t most = flag(RD_FLAG_SMALL) ? kTileBytes / 8 : kTileBytes;
        if (tiled()) return std::clamp(static_cast<int>(most / 2 / widest) / 32 * 32, 32, kTiledPiece);
        return std::clamp(static_cast<int>(most / widest), kLeastPixels, kDirectPixels);
    }

    void share_out_convolution(Operation &o) const {
        const Layer &head = o.layers[0];
        o.piece = piece(o);
        if (o.tiled) return share_out_tiled(o);
        if (head.winograd)
            divide(o, tiles_of(head, head.winograd->m), tiles_at_once(head));
        else
            divide(o, head.out.pixels(), flag(RD_FLAG_SMALL) ? kDirectPixels / 4 : kDirectPixels);
        if (!is_small(head.out) || o.layers.size() > 1) return;
        // Chunks as large as otherwise, so that no thread's scratch grows with the number of threads.
        const int most = head.winograd ? tiles_at_once(head) : kDirectPixels, total = options().batch * o.units;
        o.chunks = ceil_div(total, most);
        o.chunk = ceil_div(total, o.chunks);
        o.chunks = ceil_div(total, o.chunk);
        slice(o);
    }

    // --- in tiles

    void set_window(Operation &o) const {
        const Layer &head = o.layers[0];
        const Step &step = *head.step;
        o.windowed = !is_pointwise(step) || o.source == kRing;
        o.window = Window(step, o.in.height, o.in.width, head.out.width, index(o.in.pitch()) * plan_->element);
    }

    // Positions of the operation's line for so many rows of so many images, in whole groups.
    int positions(const Operation &o, int rows, int images) const {
        return o.windowed ? images * whole(o.window.positions(rows)) : whole(images * rows * o.layers[0].out.width);
    }

    // Of rows of an image, or whole images: those that keep the busiest thread busy for the shortest time, in groups of
    // positions, and one for what a chunk takes besides. Of equal ones the smallest.
    void share_out_tiled(Operation &o) const {
        set_window(o);
        const Shape &out = o.layers[0].out;
        const bool sliced = is_small(out) && o.layers.size() == 1;
        const int most = flag(RD_FLAG_SMALL) ? kFewTiledPositions : kTiledPositions;
        std::int64_t least = 0;
        for (int rows = 1, images = 1; images <= options().batch; rows < out.height ? rows++ : images++) {
            if ((rows > 1 || images > 1) && positions(o, rows, images) > most) break;
            const int chunks = ceil_div(options().batch, images) * ceil_div(out.height, rows);
            const int turns = sliced ? chunks : ceil_div(chunks, options().threads);
            const std::int64_t time = std::int64_t{turns} * (positions(o, rows, images) / plan_->kernels->group + 1);
            if (least > 0 && time >= least) continue;
            least = time;
            o.rows = rows;
            o.images = images;
            o.chunks = chunks;
        }
        o.units = out.height;
        o.slices = 1;
        if (sliced) slice(o);
    }

    // --- memory

    // Lays out from offset `start` on.
    void lay_out_scratch(Operation &o, ScratchLayout &s, std::size_t start) const {
        s.bytes = start;
        const auto take = [&s](std::size_t bytes) {
            const std::size_t offset = s.bytes;
            s.bytes += aligned(bytes);
            return offset;
        };
        if (o.kind == OperationKind::streamed) return lay_out_streamed(o, take);
        if (o.kind == OperationKind::stem) lay_out_stem_rows(o, take);
        lay_out_passing(o, take);
    }

    // Rows that stay while a band is computed come first, and then what each part needs only while it computes.
    template <class Take>
    void lay_out_streamed(Operation &o, Take take) const {
        for (std::size_t i = 0; i < o.parts.size(); i++) {
            Operation &part = o.parts[i];
            if (part.kind == OperationKind::stem) lay_out_stem_rows(part, take);
            if (i + 1 == o.parts.size()) break;
            const Shape &out = part.out();
            part.out_ring.offset = take(index(part.out_ring.rows) * out.row_elements() * plan_->element);
            o.parts[i + 1].in_ring = part.out_ring;
        }
        const std::size_t start = o.scratch.bytes;
        for (Operation &part : o.parts) {
            part.scratch.bytes = start;
            lay_out_passing(part, [&part](std::size_t bytes) {
                const std::size_t offset = part.scratch.bytes;
                part.scratch.bytes += aligned(bytes);
                return offset;
            });
            o.scratch.bytes = std::max(o.scratch.bytes, part.scratch.bytes);
        }
    }

    template <class Take>
    void lay_out_stem_rows(Operation &o, Take take) const {
        const Step &conv = *o.layers[0].step;
        const Shape &out = o.layers[0].out;
        o.scratch.images = take(index(o.tiled ? 1 : conv.kernel_h + 1) * stem_row_elements(o) * plan_->element);
        if (o.tiled)
            o.scratch.columns =
                take(index(conv.kernel_h + 1) * index(whole(out.width) * conv.k_pitch) * plan_->element);
        if (o.pool) o.scratch.rows = take(index(o.pool->kernel_h) * out.row_elements() * plan_->element);
    }

    template <class Take>
    void lay_out_passing(Operation &o, Take take) const {
        ScratchLayout &s = o.scratch;
        const std::size_t pointer = sizeof(void *), element = plan_->element, pixels = chunk_pixels(o);
        if (!o.layers.empty() && o.layers[0].winograd) {
            const std::size_t t = index(o.layers[0].winograd->m + 2), spots = t * t * index(o.chunk);
            s.taps = take(spots * pointer);
            s.transformed = take(spots * index(o.layers[0].in.pitch()) * element);
            s.products = take(spots * kProductBlocks * kLane * sizeof(float));
            s.product_rows = take(spots * pointer);
            s.spare = take(index(o.layers[0].out.pitch()) * element);
        } else {
            const bool grouped = o.tiled && o.kind == OperationKind::convolution;
            s.taps = take((grouped ? 1 : most_taps(o)) * pixels * pointer);
        }
        if (o.tiled && !o.layers.empty()) lay_out_groups(o, take);
        s.pixels = take(pixels * sizeof(int));
        for (std::size_t &out : s.out) out = take(pixels * pointer);
        s.add = take(pixels * pointer);
        lay_out_tiles(o, take);
    }

    template <class Take>
    void lay_out_groups(Operation &o, Take take) const {
        ScratchLayout &s = o.scratch;
        const std::size_t group = index(plan_->kernels->group);
        s.groups = take(std::max<std::size_t>(1, most_taps(o) * chunk_pixels(o) / group) * sizeof(void *));
        int widest = 0;  // of what may be read from maps
        for (const Layer &layer : o.layers) widest = std::max(widest, layer.in.pitch());
        s.group = take(group * index(widest) * plan_->element);
        if (o.kind != OperationKind::convolution || !o.windowed) return;
        // The last group may begin at the last position.
        s.window = take(index(o.images) * o.window.bytes(o.rows) + group * o.window.pixel);
        s.spare = take(index(o.layers[0].out.pitch()) * plan_->element);
    }

    template <class Take>
    void lay_out_tiles(Operation &o, Take take) const {
        const std::size_t element = plan_->element, pixels = chunk_pixels(o);
        if (o.kind == OperationKind::convolution_average || o.kind == OperationKind::linear) {
            const std::size_t slice = index(ceil_div(o.layers[0].step->blocks(), o.slices) * kLane);
            o.scratch.tile[0] = take(pixels * slice * (o.kind == OperationKind::linear ? sizeof(float) : element));
            return;
        }
        if (o.layers.size() < 2) return;
        // The first layer makes a whole chunk, the second only a piece of it at a time.
        const int first = o.pool ? o.pool_map : o.layers[0].map;
        if (first == kScratch) o.scratch.tile[0] = take(pixels * index(o.layers[1].in.pitch()) * element);
        const int piece = o.tiled ? o.piece / 2 * 3 : o.piece;  // in tiles what would be a small piece joins others
        if (o.layers[1].map == kScratch) o.scratch.tile[1] = take(index(piece * o.layers[1].out.pitch()) * element);
    }

    // Pixels of a chunk's output (of a stem: of a row; of an average: of what is averaged; of a linear layer: images).
    std::size_t chunk_pixels(const Operation &o) const {
        switch (o.kind) {
            case OperationKind::stem:
                return index(whole(std::max(o.layers[0].out.width, o.pooled.width)));
            case OperationKind::convolution_average:
            case OperationKind::average:
                return index(whole(o.in.pixels()));
            case OperationKind::convolution:
                if (o.tiled) return index(positions(o, o.rows, o.images));
                break;
            case OperationKind::linear:
                return index(whole(o.chunk));
            default:
                break;
        }
        const int m = !o.layers.empty() && o.layers[0].winograd ? o.layers[0].winograd->m : 1;
        return index(o.chunk * m * m);
    }

    static std::size_t most_taps(const Operation &o) {
        const int pool = o.pool && o.pool->kind == StepKind::max_pool ? o.pool->kernel_h * o.pool->kernel_w : 1;
        return index(std::max(pool, o.layers.empty() ? 1 : o.layers[0].step->taps));
    }

    // From the operation that makes a map to the last one that reads it.
    void find_lives() {
        for (int at = 0; at < static_cast<int>(plan_->operations.size()); at++) {
            Operation &o = plan_->operations[index(at)];
            const auto visit = [&](const Operation &part) {
                const auto reads = [&](int map) {
                    if (map >= 0) plan_->maps[index(map)].last = at;
                };
                const auto makes = [&](int map) {
                    if (map >= 0) plan_->maps[index(map)].first = plan_->maps[index(map)].last = at;
                };
                reads(part.source);
                makes(part.pool_map);
                for (const Layer &layer : part.layers) {
                    reads(layer.add);
                    makes(layer.map);
                }
            };
            visit(o);
            for (const Operation &part : o.parts) visit(part);
        }
    }

    void place_buffers() {
        plan_->buffers.clear();
        for (int at = 0; at < static_cast<int>(plan_->operations.size()); at++) {
            Operation &o = plan_->operations[index(at)];
            give_buffers(o, at);
            for (const Operation &part : o.parts) give_buffers(part, at);
            o.scratch_buffer = static_cast<int>(plan_->buffers.size());
            plan_->buffers.push_back({"scratch", o.scratch.bytes * index(options().threads), at, at, true, 0});
        }
        plan_->info.arena_bytes = place(plan_->buffers);
    }

    void give_buffers(const Operation &o, int at) {
        if (o.pool_map >= 0) give_buffer(o.pool_map, -1, o, at);
        for (const Layer &layer : o.layers)
            if (layer.map >= 0) give_buffer(layer.map, layer.add, o, at);
    }

    // Whether a sum may take the place of what is added, pixel by pixel: if nothing else reads that now or later, and
    // if it is neither this operation's source, whose neighbouring pixels are still read, nor made by this operation
    // itself.
    bool can_overwrite(int added, const Operation &o, int at) const {
        const Map &map = plan_->maps[index(added)];
        const auto adds = [added](const Layer &layer) { return layer.add == added; };
        return added != o.source && map.first < at && map.last == at &&
               std::count_if(o.layers.begin(), o.layers.end(), adds) == 1;
    }

    void give_buffer(int number, int add, const Operation &o, int at) {
        Map &map = plan_->maps[index(number)];
        if (number + 1 == static_cast<int>(plan_->maps.size())) return;  // the logits: the caller's memory
        if (add >= 0 && can_overwrite(add, o, at)) {
            map.buffer = plan_->maps[index(add)].buffer;
            plan_->buffers[index(map.buffer)].last = map.last;
            return;
        }
        map.buffer = static_cast<int>(plan_->buffers.size());
        const std::size_t elements = index(options().batch) * index(map.shape.pixels()) * index(map.shape.pitch());
        plan_->buffers.push_back({map.name, elements * plan_->element, map.first, map.last, false, 0});
    }

    // --- weights

    void transform_weights() {
        const auto visit = [&](Operation &o) {
            for (Layer &layer : o.layers)
                if (layer.winograd)
                    transform(layer);
                else if (plan_->kernels->pack)
                    pack(layer);
        };
        for (Operation &o : plan_->operations) {
            visit(o);
            for (Operation &part : o.parts) visit(part);
        }
    }

    // Call work(first, step) on so many threads, as far as the system gives them; the caller's own does what is left.
    template <class Work>
    static void in_parallel(int threads, Work work) {
        std::vector<std::thread> others;
        int thread = 1;
        try {
            others.reserve(index(threads));
            for (; thread < threads; thread++)
                others.emplace_back([work, thread, threads] {
                    const DefaultMode mode;
                    work(thread, threads);
                });
        } catch (const std::exception &) {  // no more threads, or no memory for them
        }
        for (; thread < threads; thread++) work(thread, threads);
        work(0, threads);
        for (std::thread &other : others) other.join();
    }

    // [blocks][t * t] packed blocks of one tap each: in the order in which the products read them.
    void transform(Layer &layer) {
        const Winograd &form = *layer.winograd;
        const Step &conv = *layer.step;
        const std::size_t planes = index((form.m + 2) * (form.m + 2));
        const std::size_t block = index(conv.k_pitch) * kLane * plan_->element,
                          bytes = planes * block * index(conv.blocks());
        Memory memory = allocate(bytes);
        const auto work = [&](int first, int step) {
            for (int n = first; n < conv.blocks(); n += step)
                form.weight({conv.weight + index(n) * conv.block_bytes(net().precision), conv.k_pitch,
                             memory.get() + index(n) * block * planes, block});
        };
        in_parallel(std::min(options().threads, conv.blocks()), work);
        keep(layer, std::move(memory), bytes);
    }

    // From the file's float32 to the kernels' own elements.
    void pack(Layer &layer) {
        const Step &conv = *layer.step;
        const std::size_t block = conv.block_bytes(net().precision), bytes = block * index(conv.blocks());
        Memory memory = allocate(bytes);
        const auto work = [&](int first, int step) {
            for (int n = first; n < conv.blocks(); n += step)
                plan_->kernels->pack(reinterpret_cast<const float *>(conv.weight + index(n) * block), conv.taps,
                                     conv.k_pitch, memory.get() + index(n) * block);
        };
        in_parallel(std::min(options().threads, conv.blocks()), work);
        keep(layer, std::move(memory), bytes);
    }

    void keep(Layer &layer, Memory weights, std::size_t bytes) {
        layer.weight = weights.get();
        plan_->info.packed_bytes += bytes;
        plan_->transformed.push_back(std::move(weights));
    }

    void find_following() const {
        int following = -1;
        for (int at = static_cast<int>(plan_->operations.size()) - 1; at >= 0; at--) {
            Operation &o = plan_->operations[index(at)];
            o.following = following;
            const Operation &first = o.parts.empty() ? o : o.parts[0];
            if (!first.layers.empty()) following = at;
        }
    }

    void make_zeros() {
        int widest = kLane;
        for (const Map &map : plan_->maps) widest = std::max(widest, map.shape.pitch());
        const std::size_t bytes = index(widest) * plan_->element + kAlignment;
        plan_->zeros = allocate(bytes);
        std::memset(plan_->zeros.get(), 0, bytes);
    }

    // --- what is said of a plan

    void describe() {
        std::size_t largest = 0;
        std::vector<std::string> names;
        rd_plan_info &info = plan_->info;
        for (int at = 0; at < static_cast<int>(plan_->operations.size()); at++) {
            Operation &o = plan_->operations[index(at)];
            describe(o);
            info.macs += o.info.macs / index(options().batch);
            const Live live = live_at(plan_->buffers, at);
            o.info.live_bytes = live.maps + live.scratch;
            names.push_back(o.name);
            if (o.info.live_bytes <= largest) continue;
            largest = o.info.live_bytes;
            info.feature_map_bytes = live.maps;
            info.scratch_bytes = live.scratch;
        }
        info.alignment_bytes = info.arena_bytes - largest;
        info.batch = static_cast<std::uint32_t>(options().batch);
        info.threads = static_cast<std::uint32_t>(options().threads);
        info.channels = static_cast<std::uint32_t>(images_.channels);
        info.height = static_cast<std::uint32_t>(images_.height);
        info.width = static_cast<std::uint32_t>(images_.width);
        info.classes = static_cast<std::uint32_t>(net().classes.size());
        info.steps = static_cast<std::uint32_t>(plan_->operations.size());
        info.weight_bytes = net().weight_bytes;
        info.isa = options().isa;
        if (flag(RD_FLAG_TRACE_MEMORY)) trace_maxima(plan_->buffers, names, info.arena_bytes);
    }

    void describe(Operation &o) const {
        rd_step_info &info = o.info;
        const std::size_t batch = index(options().batch);
        info.map_bytes = map_bytes(o.pool_map);
        if (o.parts.empty())
            info.map_bytes += o.source == kImages ? batch * index(images_.channels * images_.pixels()) * sizeof(float)
                                                  : map_bytes(o.source);
        for (const Layer &layer : o.layers) {
            const Step &step = *layer.step;
            const std::size_t macs = index(step.kernel_h * step.kernel_w * step.in_channels) * index(step.out_channels);
            info.macs += batch * macs * index(layer.out.pixels());
            info.flops += flops(o, layer);
            info.map_bytes += map_bytes(layer.map) + map_bytes(layer.add);
            const std::size_t t = layer.winograd ? index(layer.winograd->m + 2) : 0,
                              planes = t > 0 ? t * t : index(step.taps);
            info.weight_bytes += planes * index(step.blocks()) * index(step.k_pitch) * kLane * plan_->element;
        }
        o.kernel = kernel_name(o);
        for (Operation &part : o.parts) {
            describe(part);
            info.macs += part.info.macs;
            info.flops += part.info.flops;
            info.map_bytes += part.info.map_bytes;
            info.weight_bytes += part.info.weight_bytes;
            o.kernel += (&part == &o.parts[0] ? ": " : ", ") + part.kernel;
        }
        info.name = o.name.c_str();
        info.kernel = o.kernel.c_str();
    }

    std::uint64_t flops(const Operation &o, const Layer &layer) const {
        const Step &step = *layer.step;
        const std::size_t out = index(step.blocks() * kLane);
        if (layer.winograd) {
            const std::size_t t = index(layer.winograd->m + 2);
            return 2 * index(options().batch) * index(o.units) * t * t * index(step.k) * out;
        }
        return 2 * index(options().batch) * index(layer.out.pixels()) * index(step.taps * step.k) * out;
    }

    std::uint64_t map_bytes(int number) const {
        if (number < 0) return 0;
        const Shape &shape = plan_->maps[index(number)].shape;
        return index(options().batch) * index(shape.pixels()) * index(shape.pitch()) * plan_->element;
    }

    std::string kernel_name(const Operation &o) const {
        switch (o.kind) {
            case OperationKind::stem:
                return o.pool ? "rows, max-pooled" : "rows";
            case OperationKind::convolution:
                break;
            case OperationKind::convolution_average:
                return "direct, averaged";
            case OperationKind::max_pool:
                return "max-pool";
            case OperationKind::average:
                return "average";
            case OperationKind::linear:
                return "linear";
            case OperationKind::streamed:
                return "streamed";
        }
        const std::string m = o.layers[0].winograd ? std::to_string(o.layers[0].winograd->m) : "";
        const std::string head = m.empty() ? "direct" : "winograd " + m + "x" + m;
        return o.layers.size() > 1 ? "fused " + head : head;
    }

    std::shared_ptr<Plan> plan_;
    Shape images_;
    std::vector<Shape> shapes_;
    std::vector<int> readers_, map_of_;
};

void check(const Network &network, Options &options) {
    const auto require = [](bool condition, const std::string &message) {
        if (!condition) throw Error(RD_ERROR_ARGUMENT, message);
    };
    require(options.batch >= 1 && options.batch <= 4096, "the batch must be from 1 to 4096");
    require(options.threads >= 1 && options.threads <= 1024, "the number of threads must be from 1 to 1024");
    constexpr unsigned known = RD_FLAG_TRACE_MEMORY | RD_FLAG_NO_WINOGRAD | RD_FLAG_UNFUSED | RD_FLAG_SMALL;
    require((options.flags & ~known) == 0, "flags have unknown bits: use RD_FLAG_*");
    require((options.flags & RD_FLAG_UNFUSED) == 0 || (options.flags & RD_FLAG_SMALL) == 0,
            "RD_FLAG_UNFUSED and RD_FLAG_SMALL contradict each other");
    options.height = options.height ? options.height : network.height;
    options.width = options.width ? options.width : network.width;
    require(options.height >= 1 && options.height <= 4096 && options.width >= 1 && options.width <= 4096,
            "the image size must be from 1 to 4096 pixels");
}

}  // namespace

std::size_t stem_row_elements(const Operation &o) {
    const Step &conv = *o.layers[0].step;
    return aligned(static_cast<std::size_t>((o.in.width + 2 * conv.padding) * o.in.channels + conv.k_pitch));
}

std::shared_ptr<const Plan> make_plan(std::shared_ptr<const Network> network, const Options &options) {
    const DefaultMode mode;  // weights are transformed
    Options checked = options;
    check(*network, checked);
    return Builder(std::move(network), checked).build();
}

}  // namespace rd
