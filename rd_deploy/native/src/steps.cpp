#include "steps.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "error.h"

namespace rd {
namespace {

constexpr char kInput[] = "images";
constexpr int kMaxSide = 4096, kMaxChannels = 65536, kMaxClasses = 1000000;
constexpr int kMaxKernel = 16, kMaxStride = 16, kMaxPadding = 15;
constexpr std::size_t kMaxSteps = 4096;
constexpr std::uint64_t kMaxMapValues = (std::uint64_t{1} << 31) - 1;  // of one image, channels padded

bool has_weights(const Step &step) { return step.kind == StepKind::conv || step.kind == StepKind::linear; }

bool same(const TensorShape &a, const TensorShape &b) {
    return a.channels == b.channels && a.height == b.height && a.width == b.width && a.is_vector == b.is_vector;
}

std::string words(const TensorShape &shape) {
    const std::string channels = std::to_string(shape.channels);
    if (shape.is_vector) return channels + " features";
    return channels + "x" + std::to_string(shape.height) + "x" + std::to_string(shape.width);
}

[[noreturn]] void misfit(const Step &step, const TensorShape &in) {
    refuse("step " + quoted(step.name) + " cannot read a tensor of " + words(in));
}

// Positions of a window along one side.
int slides(const Step &step, const TensorShape &in, int side, int kernel) {
    const int room = side + 2 * step.padding - kernel;
    if (room < 0) misfit(step, in);
    return room / step.stride + 1;
}

void check_map(const Step &step, const TensorShape &shape) {
    const auto pixels = static_cast<std::uint64_t>(shape.height) * static_cast<std::uint64_t>(shape.width);
    const bool small = shape.height <= kMaxSide && shape.width <= kMaxSide;
    if (small && static_cast<std::uint64_t>(padded(shape.channels)) * pixels <= kMaxMapValues) return;
    throw Error(RD_ERROR_UNSUPPORTED, "step " + quoted(step.name) + " makes a map of " + words(shape) +
                                          ", more than 4096 pixels a side or 2^31 values");
}

void set_packing(Step &step) {  // see Step in network.h
    const bool rows = step.kind == StepKind::conv && step.source == kImages;
    step.taps = rows ? step.kernel_h : step.kernel_h * step.kernel_w;
    step.k_pitch = rows ? (step.kernel_w * step.in_channels + 31) / 32 * 32 : padded(step.in_channels);
    step.k = rows ? step.kernel_w * step.in_channels : step.k_pitch;
}

// Inputs of a tap that are not padding.
int inputs(const Step &step) {
    return step.kind == StepKind::conv && step.source == kImages ? step.k : step.in_channels;
}

std::string operation(json::Value value, const std::string &where) {
    if (value.kind() == json::Kind::object) {
        for (const auto &[key, member] : value.members()) {
            if (key == "op" && member.kind() == json::Kind::string) return std::string(member.text());
        }
    }
    refuse(where + " is not an object with an op");
}

}  // namespace

std::vector<Step> StepReader::run(const std::vector<json::Value> &values) {
    if (values.empty() || values.size() > kMaxSteps) refuse("a network has from 1 to 4096 steps");
    for (const json::Value value : values) add(value);
    if (steps_.back().kind != StepKind::linear) refuse("the last step must be linear");
    if (read_.size() + 1 != steps_.size()) refuse("no step reads the output of one that is not the last");
    if (offset_ != file_.weights_bytes) refuse("the weights section is larger than the steps' weights");
    return std::move(steps_);
}

void StepReader::add(json::Value value) {
    if (!steps_.empty() && steps_.back().kind == StepKind::linear) refuse("a linear step must be the last");
    Step step = parse(value);
    const TensorShape shape = output_shape(step);
    if (step.kind == StepKind::max_pool || step.kind == StepKind::average_pool) {
        step.in_channels = step.out_channels = shape.channels;
    }
    if (has_weights(step)) take_weights(step);
    const auto index = static_cast<int>(steps_.size());
    if (step.name == kInput || !indices_.emplace(step.name, index).second) {
        refuse("two tensors are named " + quoted(step.name));
    }
    read_.insert(step.source);
    read_.insert(step.add);
    read_.erase(kImages);
    read_.erase(kNothing);
    shapes_.push_back(shape);
    steps_.push_back(std::move(step));
}

// --- JSON

Step StepReader::parse(json::Value value) const {
    const std::string where = "step " + std::to_string(steps_.size() + 1);
    const std::string op = operation(value, where);
    if (op == "conv") {
        return conv(
            {value,
             where,
             {"op", "name", "source", "add", "in", "out", "kernel", "stride", "padding", "relu", "weight", "bias"}});
    }
    if (op == "maxpool") return max_pool({value, where, {"op", "name", "source", "kernel", "stride", "padding"}});
    if (op == "linear") return linear({value, where, {"op", "name", "source", "in", "out", "weight", "bias"}});
    if (op != "avgpool") refuse(where + " has an unknown op " + quoted(op));
    const Fields from(value, where, {"op", "name", "source"});
    Step step;
    step.kind = StepKind::average_pool;
    step.name = from.text("name");
    step.source = tensor(from.text("source"), from);
    return step;
}

Step StepReader::conv(const Fields &from) const {
    Step step;
    step.kind = StepKind::conv;
    step.name = from.text("name");
    step.source = tensor(from.text("source"), from);
    step.add = from.is_null("add") ? kNothing : tensor(from.text("add"), from);
    if (step.add == kImages) from.fail("adds the images");
    step.in_channels = from.whole("in", 1, kMaxChannels);
    step.out_channels = from.whole("out", 1, kMaxChannels);
    const std::vector<int> kernel = from.wholes("kernel", 2, 1, kMaxKernel);
    step.kernel_h = kernel[0];
    step.kernel_w = kernel[1];
    step.stride = from.whole("stride", 1, kMaxStride);
    step.padding = from.whole("padding", 0, kMaxPadding);
    step.relu = from.flag("relu");
    set_packing(step);
    check_offsets(step, from);
    return step;
}

Step StepReader::max_pool(const Fields &from) const {
    Step step;
    step.kind = StepKind::max_pool;
    step.name = from.text("name");
    step.source = tensor(from.text("source"), from);
    step.kernel_h = step.kernel_w = from.whole("kernel", 1, kMaxKernel);
    step.stride = from.whole("stride", 1, kMaxStride);
    step.padding = from.whole("padding", 0, step.kernel_h / 2);  // so that every window holds a pixel
    return step;
}

Step StepReader::linear(const Fields &from) const {
    Step step;
    step.kind = StepKind::linear;
    step.name = from.text("name");
    step.source = tensor(from.text("source"), from);
    step.in_channels = from.whole("in", 1, kMaxChannels);
    step.out_channels = from.whole("out", 1, kMaxClasses);
    set_packing(step);
    check_offsets(step, from);
    return step;
}

int StepReader::tensor(const std::string &name, const Fields &from) const {
    if (name == kInput) return kImages;
    const auto found = indices_.find(name);
    if (found == indices_.end()) from.fail("reads " + quoted(name) + ", which does not exist yet");
    return found->second;
}

// --- shapes

const TensorShape &StepReader::shape_of(int tensor) const {
    return tensor == kImages ? images_ : shapes_[static_cast<std::size_t>(tensor)];
}

TensorShape StepReader::output_shape(const Step &step) const {
    const TensorShape &in = shape_of(step.source);
    if (in.is_vector != (step.kind == StepKind::linear)) misfit(step, in);
    if (has_weights(step) && step.in_channels != in.channels) misfit(step, in);
    if (step.source == kImages && step.kind != StepKind::conv) {
        const std::string name = "step " + quoted(step.name);
        throw Error(RD_ERROR_UNSUPPORTED, name + " pools the images; only convolutions read them");
    }
    if (step.kind == StepKind::linear) return {step.out_channels, 1, 1, true};
    if (step.kind == StepKind::average_pool) return {in.channels, 1, 1, true};
    return window_shape(step, in);
}

TensorShape StepReader::window_shape(const Step &step, const TensorShape &in) const {
    TensorShape out;
    out.channels = step.kind == StepKind::conv ? step.out_channels : in.channels;
    out.height = slides(step, in, in.height, step.kernel_h);
    out.width = slides(step, in, in.width, step.kernel_w);
    check_map(step, out);
    if (step.add != kNothing && !same(shape_of(step.add), out)) {
        refuse("step " + quoted(step.name) + " gives " + words(out) + " and adds " + words(shape_of(step.add)));
    }
    return out;
}

// --- weights

// Tensors lie one after the other, so that none overlap and nothing hides between them: offsets follow from the shapes.
void StepReader::check_offsets(const Step &step, const Fields &from) const {
    const auto check = [&from](std::string_view key, std::uint64_t wanted) {
        const std::optional<std::int64_t> found = from.get(key, json::Kind::number).whole();
        if (found && *found >= 0 && static_cast<std::uint64_t>(*found) == wanted) return;
        from.fail("needs " + std::to_string(wanted) + " for " + quoted(key) + ", where the tensor before ends");
    };
    check("weight", offset_);
    check("bias", offset_ + matrix_bytes(step));
}

// At most 2^16 inputs, 2^8 taps, 2^20 outputs and 4 bytes each: far from overflow.
std::uint64_t StepReader::matrix_bytes(const Step &step) const {
    return static_cast<std::uint64_t>(step.blocks()) * step.block_bytes(precision_);
}

void StepReader::take_weights(Step &step) {
    const std::uint64_t matrix = matrix_bytes(step);
    const std::uint64_t bias = static_cast<std::uint64_t>(padded(step.out_channels)) * sizeof(float);
    const std::string name = "step " + quoted(step.name);
    if (matrix + bias > file_.weights_bytes - offset_) refuse("the weights of " + name + " end beyond the file");
    step.weight = file_.weights + offset_;
    step.bias = reinterpret_cast<const float *>(step.weight + matrix);
    if (!rdp::all_finite(step.weight, matrix, precision_) ||
        !rdp::all_finite(step.weight + matrix, bias, Precision::fp32)) {
        refuse(name + " has weights that are NaN or infinite");
    }
    if (!padding_is_zero(step)) refuse(name + " has values in the padding of its weights");
    offset_ += matrix + bias;
}

// Kernels compute padded channels like the others; they must come out as zero, since later steps read them.
bool StepReader::padding_is_zero(const Step &step) const {
    for (int block = 0; block < step.blocks(); ++block) {
        const int outputs = std::min(kLane, step.out_channels - block * kLane);
        if (outputs == kLane && inputs(step) == step.k_pitch) continue;
        for (int at = 0; at < step.taps * step.k_pitch; ++at) {
            const int k = at % step.k_pitch;
            const auto row = static_cast<std::size_t>(block) * step.taps + at / step.k_pitch;
            for (int out = k < inputs(step) ? outputs : 0; out < kLane; ++out) {
                if (!is_zero(step, row, k, out)) return false;
            }
        }
    }
    const float *end = step.bias + padded(step.out_channels);
    return std::all_of(step.bias + step.out_channels, end, [](float value) { return value == 0; });
}

// The weight of input `k` and output `out` in a row, which is a tap of a block.
bool StepReader::is_zero(const Step &step, std::size_t row, std::size_t k, std::size_t out) const {
    const bool pairs = precision_ == Precision::bf16;
    const std::size_t within = pairs ? k / 2 * 2 * kLane + out * 2 + k % 2 : k * kLane + out;
    const std::byte *value = step.weight + (row * step.k_pitch * kLane + within) * element_bytes(precision_);
    return std::all_of(value, value + element_bytes(precision_), [](std::byte b) { return b == std::byte{0}; });
}

}  // namespace rd
