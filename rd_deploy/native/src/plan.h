// A network compiled for one batch, number of threads and instruction set: fused operations and a static memory plan.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "network.h"
#include "window.h"

namespace rd {

struct Options {
    int batch = 1, threads = 1, height = 0, width = 0;
    unsigned flags = 0;
    const char *isa = nullptr;
};

struct Shape {
    int channels = 0, height = 0, width = 0;
    int pixels() const { return height * width; }
    std::size_t row_elements() const { return static_cast<std::size_t>(width) * static_cast<std::size_t>(pitch()); }
    int pitch() const { return padded(channels); }  // elements per pixel in memory
};

constexpr int kProductBlocks = 2;  // blocks of outputs for which Winograd's products exist at a time

constexpr int kScratch = -4;  // a layer's output that no other operation reads: it exists tile by tile in scratch
constexpr int kRing = -3;     // the map between two parts of a streamed operation: a few rows of it exist at a time
constexpr std::size_t kMostParts = 8;

// A map in the arena: (batch, height, width, pitch).
struct Map {
    std::string name;
    Shape shape;
    int first = 0, last = 0;  // operations that make it and read it last
    int buffer = -1;          // index of its buffer; maps that are updated in place share one
};

struct Layer {
    const Step *step = nullptr;
    Shape in, out;
    int map = kScratch;                  // its output, kScratch or kRing
    int add = -1;                        // map to be added
    const Winograd *winograd = nullptr;  // null: direct
    const std::byte *weight = nullptr;   // as in the file, repacked, or Winograd's planes
};

enum class OperationKind : std::uint8_t { stem, convolution, convolution_average, max_pool, average, linear, streamed };

// Some rows of an image's map: row y lies at y % rows.
struct Ring {
    std::size_t offset = 0;  // in a thread's scratch
    int rows = 0;
};

// Scratch of one thread, as offsets from its beginning.
struct ScratchLayout {
    std::size_t taps = 0;                  // pointers to inputs
    std::size_t pixels = 0;                // flat indices of a chunk's output pixels
    std::size_t out[2] = {0, 0}, add = 0;  // pointers to outputs, of layers in turn, and to what is added
    std::size_t tile[2] = {0, 0};          // outputs that exist in scratch only, of layers in turn
    std::size_t transformed = 0, products = 0, product_rows = 0, spare = 0;  // Winograd's
    std::size_t images = 0, rows = 0;  // the stem's rows: of the image, and of the convolution
    // In tiles: pointers to groups of pixels, the input's window, the stem's taps, and the group that ends a map.
    std::size_t groups = 0, window = 0, columns = 0, group = 0;
    std::size_t bytes = 0;
};

struct Operation {
    OperationKind kind = OperationKind::convolution;
    std::string name, kernel;
    int source = kImages;        // map, the images or kRing
    Shape in;                    // of the source
    std::vector<Layer> layers;   // the first reads the source, each further one the layer before it
    const Step *pool = nullptr;  // the stem's max-pooling, or a pooling of its own
    Shape pooled;                // output of the pooling
    int pool_map = kScratch;     // where the pooling's output goes
    // The work: chunks of consecutive units (pixels, or Winograd's tiles) of all images of the batch, and for single
    // layers also slices of consecutive blocks of outputs. The stem's units are rows of its output.
    int units = 0;              // per image
    int chunk = 1, chunks = 1;  // units of a chunk, number of chunks
    int slices = 1;
    int piece = 1;  // pixels that go through the second and further layers at a time
    // In tiles (of kernels whose products read whole groups), a convolution's chunks are so many rows of an image, or
    // so many whole images.
    bool tiled = false;
    int rows = 1, images = 1;
    bool windowed = false;  // else its pixels are neighbours already
    Window window;
    // A streamed operation's parts: each makes rows for the next one, which keeps only as many as its window covers. A
    // chunk is a band of rows of the last part's output; what two bands need of the parts before is computed twice.
    std::vector<Operation> parts;
    int step_rows = 1;       // of a part: rows that it makes at a time
    Ring in_ring, out_ring;  // of a part
    int following = -1;      // the next operation that has weights
    ScratchLayout scratch;
    int scratch_buffer = -1;
    rd_step_info info{};

    int items() const { return chunks * slices; }
    const Shape &out() const {
        if (!parts.empty()) return parts.back().out();
        return layers.empty() || (pool && layers.size() == 1) ? pooled : layers.back().out;
    }
};

struct FreeDeleter {
    void operator()(void *memory) const;
};
using Memory = std::unique_ptr<std::byte, FreeDeleter>;
// 64-byte aligned, on huge pages where the system gives them. Raises rd::Error with RD_ERROR_MEMORY.
Memory allocate(std::size_t bytes);

struct Plan {
    std::shared_ptr<const Network> network;
    Options options;
    const Kernels *kernels = nullptr;
    std::size_t element = 4;  // bytes
    std::vector<Map> maps;
    std::vector<Operation> operations;
    std::vector<Buffer> buffers;
    std::vector<Memory> transformed;  // weights
    Memory zeros;                     // what padding points to: as many elements as the widest pixel has
    rd_plan_info info{};
};

// Elements of a padded row of an image with its channels together, with room to read one whole k_pitch from any pixel.
std::size_t stem_row_elements(const Operation &stem);

// Raises rd::Error.
std::shared_ptr<const Plan> make_plan(std::shared_ptr<const Network> network, const Options &options);

}  // namespace rd
