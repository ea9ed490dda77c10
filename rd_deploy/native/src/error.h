// The one exception of the engine; it never leaves the C interface (api.cpp).
#pragma once

#include <stdexcept>
#include <string>

#include "rd.h"

namespace rd {

class Error : public std::runtime_error {
  public:
    Error(rd_status code, const std::string &message) : std::runtime_error(message), status(code) {}
    rd_status status;
};

}  // namespace rd
