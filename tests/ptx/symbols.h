// Names of the kernels in this executable, as nvcc's PTX names them.
#pragma once

#include <string>

namespace ptx {

struct Symbol {
    std::string name;  // readable, with CUDA's names for the emulator's types
    std::string file;  // of the source, if the function is local to it
};

// The function at an address of this executable.
Symbol symbol_of(const void* address);

// Readable form of a mangled name.
std::string demangle(const std::string& name);

}  // namespace ptx
