// The steps of a .rdp file: JSON and packed weights to validated Steps.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "fields.h"
#include "json.h"
#include "network.h"
#include "rdp.h"

namespace rd {

// Of one image's tensor. A vector has only channels.
struct TensorShape {
    int channels = 0, height = 1, width = 1;
    bool is_vector = false;
};

// Reads step after step and keeps what is known of the tensors so far. Raises rd::Error for steps that do not fit.
class StepReader {
  public:
    StepReader(const rdp::Sections &file, Precision precision, TensorShape images)
        : file_(file), precision_(precision), images_(images) {}

    std::vector<Step> run(const std::vector<json::Value> &values);

  private:
    void add(json::Value value);

    Step parse(json::Value value) const;
    Step conv(const Fields &from) const;
    Step max_pool(const Fields &from) const;
    Step linear(const Fields &from) const;
    int tensor(const std::string &name, const Fields &from) const;

    const TensorShape &shape_of(int tensor) const;
    TensorShape output_shape(const Step &step) const;
    TensorShape window_shape(const Step &step, const TensorShape &in) const;

    void take_weights(Step &step);
    void check_offsets(const Step &step, const Fields &from) const;
    std::uint64_t matrix_bytes(const Step &step) const;
    bool padding_is_zero(const Step &step) const;
    bool is_zero(const Step &step, std::size_t row, std::size_t k, std::size_t out) const;

    const rdp::Sections &file_;
    const Precision precision_;
    const TensorShape images_;
    std::vector<Step> steps_;
    std::vector<TensorShape> shapes_;  // of the steps' outputs
    std::unordered_map<std::string, int> indices_;
    std::unordered_set<int> read_;  // steps whose output another one reads
    std::uint64_t offset_ = 0;      // of the next tensor in the weights section
};

}  // namespace rd
