// The kernels of a set of PTX files, found by the address of their C++ functions.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

class Library {
  public:
    // In an incomplete library find() returns null for the kernels that are missing.
    explicit Library(bool complete = true) : complete_(complete) {}
    // Reads a file whose name starts with that of the source: bias_gelu_cuda.compute_90.ptx.
    void load(const std::string& path);
    void add(const std::string& path, const std::string& text);
    // The PTX of a kernel, by the address of its C++ function. Null for a kernel that a test defines. In a complete
    // library a kernel of csrc without PTX is an error.
    const Kernel* find(const void* function);
    size_t size() const { return kernels_.size(); }
    const std::vector<std::unique_ptr<Kernel>>& kernels() const { return kernels_; }

  private:
    bool complete_;
    std::vector<std::unique_ptr<Kernel>> kernels_;
    std::map<std::pair<std::string, std::string>, const Kernel*> by_source_;  // by source file and readable name
    std::map<std::string, const Kernel*> by_name_;
    std::map<const void*, const Kernel*> found_;
};

std::string read_text(const std::string& path);

}  // namespace ptx
