// Reads the PTX that nvcc writes. Anything that the machine does not know is an error that names file and line.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

// The kernels of a file, in its order. `path` is for messages.
std::vector<std::unique_ptr<Kernel>> parse(const std::string& path, const std::string& text);

}  // namespace ptx
