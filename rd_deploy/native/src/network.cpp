// From a .rdp file to a Network. The file is untrusted: whatever it holds ends in a Network that fits or in rd::Error.
#include "network.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <new>
#include <utility>

#include "error.h"
#include "fields.h"
#include "json.h"
#include "rdp.h"
#include "steps.h"

namespace rd {
namespace {

constexpr char kFormat[] = "residual-distillation-rdp/1";
constexpr int kMaxSide = 4096, kMaxResize = 8192;  // as in rd_deploy/preprocessing.py

void check_identity(const Fields &from) {
    if (from.text("format") != kFormat) from.fail("is not of format " + std::string(kFormat));
    const std::string digest = from.text("weights_sha256");
    if (digest.size() != 64 || digest.find_first_not_of("0123456789abcdef") != std::string::npos) {
        from.fail("has no proper weights_sha256");
    }
    from.get("arch", json::Kind::object);
    from.get("provenance", json::Kind::object);
}

Precision precision(const Fields &from) {
    const std::string name = from.text("precision");
    if (name != "fp32" && name != "bf16") from.fail("has an unknown precision " + quoted(name));
    return name == "fp32" ? Precision::fp32 : Precision::bf16;
}

void read_input(const Fields &from, Network &network) {
    const std::vector<int> sizes = from.wholes("input", 3, 1, kMaxSide);
    if (sizes[0] > RD_MAX_CHANNELS) from.fail("has more than 64 input channels");
    network.channels = sizes[0];
    network.height = sizes[1];
    network.width = sizes[2];
}

void read_floats(const Fields &from, std::string_view key, std::size_t count, float *out) {
    for (const json::Value item : from.list(key, count)) {
        const bool fits = item.kind() == json::Kind::number && std::abs(item.number()) <= FLT_MAX;
        if (!fits) from.fail("needs in " + quoted(key) + " numbers that fit float32");
        *out++ = static_cast<float>(item.number());
    }
}

rd_preprocessing preprocessing(const Fields &from, int channels) {
    rd_preprocessing found{};
    found.size = static_cast<std::uint32_t>(from.whole("size", 1, kMaxSide));
    found.resize = static_cast<std::uint32_t>(from.whole("resize", 1, kMaxResize));
    found.pad = static_cast<std::uint32_t>(from.whole("pad", 0, kMaxSide));
    found.channels = static_cast<std::uint32_t>(from.whole("channels", channels, channels));
    if (found.size > found.resize + 2 * found.pad) from.fail("needs size <= resize + 2 pad");
    read_floats(from, "mean", found.channels, found.mean);
    read_floats(from, "std", found.channels, found.std);
    if (*std::min_element(found.std, found.std + channels) <= 0) from.fail("needs a positive std");
    return found;
}

std::shared_ptr<const Network> parse(const void *data, std::size_t bytes, std::shared_ptr<const void> storage) {
    const rdp::Sections file = rdp::sections(static_cast<const std::byte *>(data), bytes);
    const json::Document document = json::parse(file.json);
    const Fields top(json::Value(document), "its description",
                     {"format", "name", "precision", "input", "steps", "preprocessing", "classes", "arch", "provenance",
                      "weights_sha256"});
    check_identity(top);
    auto network = std::make_shared<Network>();
    network->name = top.text("name");
    network->json = std::string(file.json);
    network->precision = precision(top);
    read_input(top, *network);
    StepReader reader(file, network->precision, {network->channels, network->height, network->width, false});
    network->steps = reader.run(top.get("steps", json::Kind::array).items());
    network->weight_bytes = file.weights_bytes;
    network->classes = top.texts("classes", static_cast<std::size_t>(network->steps.back().out_channels));
    network->preprocessing = preprocessing({top.get("preprocessing", json::Kind::object),
                                            "preprocessing",
                                            {"size", "resize", "channels", "mean", "std", "pad"}},
                                           network->channels);
    network->storage = std::move(storage);
    return network;
}

}  // namespace

std::shared_ptr<const Network> parse_network(const void *data, std::size_t bytes, std::shared_ptr<const void> storage) {
    try {
        return parse(data, bytes, std::move(storage));
    } catch (const std::bad_alloc &) {
        throw Error(RD_ERROR_MEMORY, "not enough memory to read the network");
    }
}

}  // namespace rd
