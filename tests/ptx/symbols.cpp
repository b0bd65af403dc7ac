#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <vector>

#include "simt.h"

namespace ptx {
namespace {

void replace(std::string& text, const std::string& from, const std::string& to) {
    for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
        text.replace(at, from.size(), to);
}

// The dynamic symbol table, which dladdr reads, lacks the functions of anonymous namespaces; the full one has them.
std::map<uint64_t, Symbol> read_symbols() {
    std::ifstream file("/proc/self/exe", std::ios::binary);
    const std::vector<char> image{std::istreambuf_iterator<char>(file), {}};
    const auto* const header = reinterpret_cast<const Elf64_Ehdr*>(image.data());
    const auto* const sections = reinterpret_cast<const Elf64_Shdr*>(image.data() + header->e_shoff);
    std::map<uint64_t, Symbol> symbols;
    for (int i = 0; i < header->e_shnum; ++i) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const char* const names = image.data() + sections[sections[i].sh_link].sh_offset;
        const auto* const table = reinterpret_cast<const Elf64_Sym*>(image.data() + sections[i].sh_offset);
        std::string source;  // its entry precedes those of its local symbols
        for (size_t at = 0; at < sections[i].sh_size / sizeof(Elf64_Sym); ++at) {
            const auto type = ELF64_ST_TYPE(table[at].st_info);
            if (type == STT_FILE) source = names + table[at].st_name;
            if (type != STT_FUNC) continue;
            const bool local = ELF64_ST_BIND(table[at].st_info) == STB_LOCAL;
            symbols[table[at].st_value] = {names + table[at].st_name, local ? source : ""};
        }
    }
    if (symbols.empty()) simt::fail("the executable has no symbols; want=an executable that is not stripped");
    return symbols;
}

}  // namespace

std::string demangle(const std::string& name) {
    int status = 0;
    char* const text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    std::string readable = text ? text : name;
    std::free(text);
    replace(readable, "simt::Float16<&simt::encode_bfloat16, &simt::decode_bfloat16>", "__nv_bfloat16");
    replace(readable, "simt::Float16<&simt::encode_half, &simt::decode_half>", "__half");
    replace(readable, " >", ">");
    return readable;
}

Symbol symbol_of(const void* address) {
    static const std::map<uint64_t, Symbol> symbols = read_symbols();
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&symbol_of), &info);
    const auto offset = static_cast<uint64_t>(static_cast<const char*>(address) - static_cast<char*>(info.dli_fbase));
    const auto found = symbols.find(offset);
    if (found == symbols.end()) simt::fail("a kernel without a symbol");
    return {demangle(found->second.name), found->second.file};
}

}  // namespace ptx
