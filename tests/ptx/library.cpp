#include "library.h"

#include <fstream>
#include <iterator>

#include "parser.h"
#include "symbols.h"

namespace ptx {

std::string read_text(const std::string& path) {
    std::ifstream file(path);
    if (!file) simt::fail("the file cannot be read; where=" + path);
    return {std::istreambuf_iterator<char>(file), {}};
}

void Library::load(const std::string& path) { add(path, read_text(path)); }

void Library::add(const std::string& path, const std::string& text) {
    const std::string file = path.substr(path.rfind('/') + 1), source = file.substr(0, file.find('.')) + ".cu";
    for (auto& kernel : parse(path, text)) {
        const std::string name = demangle(kernel->name);
        by_source_.emplace(std::pair(source, name), kernel.get());
        by_name_.emplace(name, kernel.get());
        kernels_.push_back(std::move(kernel));
    }
}

const Kernel* Library::find(const void* function) {
    const auto known = found_.find(function);
    if (known != found_.end()) return known->second;
    const Symbol symbol = symbol_of(function);
    const bool in_csrc = symbol.file.empty() || symbol.file.find("_cuda.cu") != std::string::npos;
    const Kernel* kernel = nullptr;
    if (symbol.file.empty()) {  // a template of a header, the same in every file that has it
        const auto found = by_name_.find(symbol.name);
        if (found != by_name_.end()) kernel = found->second;
    } else {
        const auto found = by_source_.find({symbol.file, symbol.name});
        if (found != by_source_.end()) kernel = found->second;
    }
    if (!kernel && in_csrc && complete_) simt::fail("a kernel without PTX; got=" + symbol.name + " " + symbol.file);
    return found_[function] = kernel;
}

}  // namespace ptx
