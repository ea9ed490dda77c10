// The one exception of the engine; it never leaves the C interface (api.cpp). And what its one line may hold.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "rd.h"

namespace rd {

class Error : public std::runtime_error {
  public:
    Error(rd_status code, const std::string &message) : std::runtime_error(message), status(code) {}
    rd_status status;
};

// Text from outside, such as a path or a name, on one line and without what a terminal would take for a command.
inline std::string printable(std::string_view text) {
    std::string out(text);
    for (char &c : out)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
    return out;
}

}  // namespace rd
