// A fuzzer: whatever a .rdp file holds, the engine refuses it in one line or runs it, and does nothing worse.
//
//   python rd_deploy/native/build.py --compiler clang++ --sanitize fuzzer,address,undefined
//       --output build/fuzz --executable fuzz_rdp tests/native/fuzz_rdp.cpp
//   mkdir -p build/fuzz/found
//   build/fuzz/fuzz_rdp -max_len=65536 -max_total_time=600 build/fuzz/found tests/native/corpus
//
// The first byte of the input says what the others are (its two low bits), and how a network is run (the others):
//   0: a file as it is
//   1: JSON, a zero byte, weights; the file is made of them with the right sizes and checksum, which no mutation finds
//   2: choices from which a network is made that fits, so that planning and running are reached
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "rd.h"
#include "rdp.h"

namespace {

void require(bool holds, const char *what) {
    if (holds) return;
    std::fprintf(stderr, "violated: %s (%s)\n", what, rd_last_error());
    std::abort();
}

// --- memory: exactly as long as the content, so that a sanitizer sees the first byte beyond it

constexpr std::align_val_t kAligned{64};
struct Freed {
    void operator()(std::byte *memory) const { ::operator delete(memory, kAligned); }
};
using Memory = std::unique_ptr<std::byte, Freed>;

Memory allocate(std::size_t bytes) { return Memory(static_cast<std::byte *>(::operator new(bytes, kAligned))); }

struct File {
    Memory memory;
    std::size_t bytes;
};

File copied(const std::uint8_t *data, std::size_t bytes) {
    File file{allocate(bytes), bytes};
    if (bytes > 0) std::memcpy(file.memory.get(), data, bytes);
    return file;
}

File assembled(const std::string &json, const std::uint8_t *weights, std::size_t weights_bytes) {
    const auto up = [](std::size_t n) { return (n + 63) / 64 * 64; };
    const std::size_t at = up(sizeof(rd::rdp::Header) + json.size()), bytes = at + up(weights_bytes);
    rd::rdp::Header header{{}, rd::rdp::kVersion, 0, sizeof header, json.size(), at, bytes - at, bytes, 0};
    std::memcpy(header.magic, rd::rdp::kMagic, sizeof header.magic);
    File file{allocate(bytes), bytes};
    std::byte *to = file.memory.get();
    std::memset(to, 0, bytes);
    std::memcpy(to, &header, sizeof header);
    std::memcpy(to + sizeof header, json.data(), json.size());
    if (weights_bytes > 0) std::memcpy(to + at, weights, weights_bytes);
    header.checksum = rd::rdp::checksum(to, bytes);
    std::memcpy(to, &header, sizeof header);
    return file;
}

File fixed_up(const std::uint8_t *data, std::size_t bytes) {
    const void *zero = bytes > 0 ? std::memchr(data, 0, bytes) : nullptr;
    const std::size_t json = zero ? static_cast<std::size_t>(static_cast<const std::uint8_t *>(zero) - data) : bytes;
    const std::size_t weights = zero ? json + 1 : bytes;
    return assembled({reinterpret_cast<const char *>(data), json}, data + weights, bytes - weights);
}

// --- networks that fit

class Generator {
  public:
    Generator(const std::uint8_t *data, std::size_t bytes) : data_(data), bytes_(bytes) {}

    File run() {
        pairs_ = below(2) == 1;
        const int input = 1 + below(4), height = 1 + below(24), width = 1 + below(24);
        maps_.push_back({"images", input, height, width});
        convolution();
        for (int steps = below(12); steps > 0; --steps) {
            if (below(6) == 0) {
                pool();
            } else {
                convolution();
            }
        }
        steps_ += ",{\"op\":\"avgpool\",\"name\":\"mean\",\"source\":\"" + maps_.back().name + "\"},";
        const int classes = 1 + below(40);
        steps_ += "{\"op\":\"linear\",\"name\":\"head\",\"source\":\"mean\"";
        weights(1, maps_.back().channels, (maps_.back().channels + 15) / 16 * 16, classes, maps_.back().channels);
        return assembled(json(classes), weights_.data(), weights_.size());
    }

  private:
    struct Map {
        std::string name;
        int channels, height, width;
    };

    int below(int limit) { return at_ < bytes_ ? data_[at_++] % limit : 0; }

    void convolution() {
        const bool first = maps_.size() == 1;
        const Map in = !first && below(8) == 0 ? any() : maps_.back();
        const int sizes[] = {1, 3, 1, 3, 2, 5, 7, 1 + below(16)};
        const int kh = sizes[below(8)], kw = below(8) == 0 ? sizes[below(8)] : kh;
        const int stride = below(3) == 0 ? 1 + below(3) : 1;
        const int padding = below(4) == 0 ? below(16) : kh / 2;
        Map out{"map" + std::to_string(maps_.size()), below(2) ? in.channels : 1 + below(70), 0, 0};
        if (!slide(in, out, kh, kw, stride, padding)) return first ? last_resort() : void();
        begin(first ? "" : ",", "conv", out.name, in.name);
        const std::string *added = below(3) == 0 ? like(out) : nullptr;
        steps_ += ",\"add\":" + (added ? "\"" + *added + "\"" : std::string("null"));
        window("[" + std::to_string(kh) + "," + std::to_string(kw) + "]", stride, padding);
        steps_ += std::string(",\"relu\":") + (below(3) ? "true" : "false");
        const int row = kw * in.channels;
        if (in.name == "images") {
            weights(kh, row, (row + 31) / 32 * 32, out.channels, in.channels);
        } else {
            weights(kh * kw, in.channels, (in.channels + 15) / 16 * 16, out.channels, in.channels);
        }
        maps_.push_back(out);
    }

    void last_resort() {  // something must read the images
        begin("", "conv", "map1", "images");
        steps_ += ",\"add\":null";
        window("[1,1]", 1, 0);
        steps_ += ",\"relu\":true";
        weights(1, maps_[0].channels, 32, 5, maps_[0].channels);
        maps_.push_back({"map1", 5, maps_[0].height, maps_[0].width});
    }

    void pool() {
        const Map in = maps_.back();
        const int kernel = 1 + below(5), stride = 1 + below(3), padding = below(kernel / 2 + 1);
        Map out{"map" + std::to_string(maps_.size()), in.channels, 0, 0};
        if (!slide(in, out, kernel, kernel, stride, padding)) return;
        begin(",", "maxpool", out.name, in.name);
        window(std::to_string(kernel), stride, padding);
        steps_ += "}";
        maps_.push_back(out);
    }

    static bool slide(const Map &in, Map &out, int kh, int kw, int stride, int padding) {
        const int rows = in.height + 2 * padding - kh, columns = in.width + 2 * padding - kw;
        out.height = rows / stride + 1;
        out.width = columns / stride + 1;
        return rows >= 0 && columns >= 0;
    }

    const Map &any() { return maps_[1 + static_cast<std::size_t>(below(static_cast<int>(maps_.size()) - 1))]; }

    // Another map of this shape, if there is one.
    const std::string *like(const Map &out) {
        const auto count = static_cast<int>(maps_.size()) - 1, start = count > 0 ? below(count) : 0;
        for (int i = 0; i < count; ++i) {
            const Map &m = maps_[1 + static_cast<std::size_t>((start + i) % count)];
            if (m.channels == out.channels && m.height == out.height && m.width == out.width) return &m.name;
        }
        return nullptr;
    }

    void begin(const char *comma, const char *op, const std::string &name, const std::string &source) {
        steps_ += std::string(comma) + "{\"op\":\"" + op + "\",\"name\":\"" + name + "\",\"source\":\"" + source + "\"";
    }

    void window(const std::string &kernel, int stride, int padding) {
        steps_ += ",\"kernel\":" + kernel + ",\"stride\":" + std::to_string(stride);
        steps_ += ",\"padding\":" + std::to_string(padding);
    }

    // Packed as docs/rdp.md says, with small values, so that deep networks stay finite.
    void weights(int taps, int k, int pitch, int outputs, int inputs) {
        const std::size_t start = weights_.size(), element = pairs_ ? 2 : 4;
        const int blocks = (outputs + 15) / 16;
        weights_.resize(start + static_cast<std::size_t>(blocks) * taps * pitch * 16 * element);
        const float scale = 2 / std::sqrt(static_cast<float>(taps) * static_cast<float>(k)) / 8;
        for (int o = 0; o < outputs; ++o) {
            for (int i = 0; i < taps * k; ++i) {
                const std::size_t first = static_cast<std::size_t>(o / 16 * taps + i / k) * pitch, at = i % k;
                const std::size_t place =
                    pairs_ ? (first + at / 2 * 2) * 16 + o % 16 * 2 + at % 2 : (first + at) * 16 + o % 16;
                const float value = static_cast<float>((o * 7 + i * 13) % 19 - 8) * scale;
                std::uint32_t bits;
                std::memcpy(&bits, &value, sizeof bits);
                if (pairs_) bits >>= 16;
                std::memcpy(&weights_[start + place * element], &bits, element);
            }
        }
        const std::size_t bias = weights_.size();
        weights_.resize(bias + static_cast<std::size_t>(blocks) * 64);
        for (int o = 0; o < outputs; ++o) {
            const float value = static_cast<float>(o % 5 - 2) / 4;
            std::memcpy(&weights_[bias + static_cast<std::size_t>(o) * 4], &value, 4);
        }
        steps_ += ",\"in\":" + std::to_string(inputs) + ",\"out\":" + std::to_string(outputs);
        steps_ += ",\"weight\":" + std::to_string(start) + ",\"bias\":" + std::to_string(bias) + "}";
    }

    std::string json(int classes) const {
        const Map &images = maps_.front();
        std::string names = "\"0\"", constants = "0.5";
        for (int i = 1; i < classes; ++i) names += ",\"" + std::to_string(i) + "\"";
        for (int i = 1; i < images.channels; ++i) constants += ",0.5";
        return std::string("{\"format\":\"residual-distillation-rdp/1\",\"name\":\"generated\",\"precision\":\"") +
               (pairs_ ? "bf16" : "fp32") + "\",\"input\":[" + std::to_string(images.channels) + "," +
               std::to_string(images.height) + "," + std::to_string(images.width) + "],\"steps\":[" + steps_ +
               "],\"preprocessing\":{\"size\":8,\"resize\":8,\"pad\":0,\"channels\":" +
               std::to_string(images.channels) + ",\"mean\":[" + constants + "],\"std\":[" + constants +
               "]},\"classes\":[" + names + "],\"arch\":{},\"provenance\":{},\"weights_sha256\":\"" +
               std::string(64, '0') + "\"}";
    }

    const std::uint8_t *data_;
    std::size_t bytes_, at_ = 0;
    bool pairs_ = false;  // bf16
    std::vector<Map> maps_;
    std::string steps_;
    std::vector<std::uint8_t> weights_;
};

// --- running

void check_refusal(rd_status status) {
    const char *reason = rd_last_error();
    require(status >= RD_OK && status <= RD_ERROR_MEMORY, "a status of rd.h");
    require(*reason != '\0' && std::strchr(reason, '\n') == nullptr, "a reason of one line");
}

constexpr std::uint64_t kMaxMacs = 1'000'000, kMaxArena = std::uint64_t{64} << 20;

// Logits of a plan with these flags; none when it is refused or too large to be run here.
std::vector<float> logits(const rd_network *network, rd_options options) {
    rd_plan *plan = nullptr;
    if (const rd_status status = rd_plan_create(network, &options, &plan); status != RD_OK) {
        check_refusal(status);
        return {};
    }
    rd_plan_info info{};
    require(rd_plan_get_info(plan, &info) == RD_OK, "a plan describes itself");
    std::vector<float> out;
    rd_context *context = nullptr;
    if (info.macs <= kMaxMacs && info.arena_bytes <= kMaxArena) {
        if (const rd_status status = rd_context_create(plan, nullptr, 0, &context); status == RD_OK) {
            std::vector<float> images(std::size_t{info.batch} * info.channels * info.height * info.width);
            for (std::size_t i = 0; i < images.size(); ++i) images[i] = static_cast<float>(i * 31 % 17) / 8 - 1;
            out.resize(std::size_t{info.batch} * info.classes);
            require(rd_context_run(context, images.data(), out.data()) == RD_OK, "a planned network runs");
        } else {
            check_refusal(status);
        }
    }
    rd_context_free(context);
    rd_plan_free(plan);
    return out;
}

rd_options chosen(unsigned how, const rd_network_info &info) {
    rd_options options{};
    if (how & 0x80) {  // other images than the file's
        options.height = info.height + how % 7;
        options.width = info.width + how % 5;
    }
    options.batch = how & 0x08 ? 3 : 1;
    options.threads = how & 0x04 ? 2 : 1;
    options.flags = how >> 4 & (RD_FLAG_NO_WINOGRAD | RD_FLAG_UNFUSED | RD_FLAG_SMALL);
    options.isa = how & 0x10 ? "portable" : nullptr;
    return options;
}

// However a network is planned, it is the same function, up to rounding.
void check_agreement(const std::vector<float> &a, const std::vector<float> &b, float tolerance) {
    if (a.empty() || b.empty()) return;
    float largest = 0, difference = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (!std::isfinite(a[i]) || !std::isfinite(b[i])) return;
        largest = std::fmax(largest, std::fabs(a[i]));
        difference = std::fmax(difference, std::fabs(a[i] - b[i]));
    }
    const float allowed = tolerance * std::fmax(largest, 0.1f);  // logits near 0 are differences of larger values
    if (difference > allowed) std::fprintf(stderr, "%g of %g\n", double{difference}, double{largest});
    require(difference <= allowed, "all plans of a network give the same logits");
}

void check(const File &file, unsigned how, bool generated) {
    rd_network *network = nullptr;
    const rd_status status = rd_network_from_memory(file.memory.get(), file.bytes, &network);
    if (status != RD_OK) return check_refusal(status);
    rd_network_info info{};
    require(rd_network_get_info(network, &info) == RD_OK, "a network describes itself");
    if (std::uint64_t{info.channels} * info.height * info.width <= 1u << 20) {
        rd_options plain = chosen(how, info);
        const std::vector<float> found = logits(network, plain);
        plain.flags = RD_FLAG_UNFUSED | RD_FLAG_NO_WINOGRAD;
        plain.isa = "portable";
        plain.threads = 1;
        const bool exact = std::strcmp(info.precision, "fp32") == 0;
        if (generated) check_agreement(logits(network, plain), found, exact ? 1e-3f : 0.2f);
    }
    rd_network_free(network);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t bytes) {
    if (bytes == 0) return 0;
    const unsigned how = *data++, mode = how & 3;
    --bytes;
    if (mode == 0) check(copied(data, bytes), how, false);
    if (mode == 1) check(fixed_up(data, bytes), how, false);
    if (mode == 2) check(Generator(data, bytes).run(), how, true);
    return 0;
}
