#include "operands.h"

#include <algorithm>

namespace ptx {
namespace {

// In the order of special() in moves.cpp.
const char* const kSpecialRegisters[] = {"%tid.x",   "%tid.y",   "%tid.z",   "%ntid.x",   "%ntid.y",   "%ntid.z",
                                         "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"};

}  // namespace

size_t align_up(size_t offset, size_t align) { return (offset + align - 1) / align * align; }

size_t bytes_of_type(const std::string& type) {
    const size_t digit = type.find_first_of("0123456789");
    return digit == std::string::npos ? 0 : std::strtoul(type.c_str() + digit, nullptr, 10) / 8;
}

Declaration parse_declaration(const std::string& text, const Scanner& scanner) {
    Declaration found;
    const std::vector<std::string> words = split(text, ' ');
    for (size_t i = 0; i + 1 < words.size(); ++i) {
        if (words[i] == ".align") {
            found.align = std::strtoul(words[i + 1].c_str(), nullptr, 10);
        } else if (words[i] != ".param" && words[i] != ".shared" && words[i] != ".extern" && words[i][0] == '.') {
            found.bytes = bytes_of_type(words[i]);
        }
    }
    if (!found.bytes) scanner.fail("a declaration without a type; got=" + text);
    if (!found.align) found.align = found.bytes;
    found.name = words.back();
    const size_t bracket = found.name.find('[');
    if (bracket == std::string::npos) return found;
    found.open = found.name[bracket + 1] == ']';
    found.bytes *= std::strtoul(found.name.c_str() + bracket + 1, nullptr, 10);
    found.name.resize(bracket);
    return found;
}

std::vector<Token> tokenize(const std::string& operands) {
    std::vector<Token> tokens;
    for (size_t i = 0; i < operands.size();) {
        if (operands[i] == ' ' || operands[i] == ',') {
            ++i;
        } else if (std::strchr("{}|", operands[i])) {
            tokens.push_back({operands[i++], ""});
        } else if (operands[i] == '[') {
            const size_t end = std::min(operands.find(']', i), operands.size() - 1);
            const std::string inside = operands.substr(i + 1, end - i - 1);
            const size_t comma = inside.find(',');  // [tensor map, {coordinates}]
            tokens.push_back({comma == std::string::npos ? '[' : 'T', inside.substr(0, comma)});
            if (comma != std::string::npos) {
                for (const Token& token : tokenize(inside.substr(comma))) tokens.push_back(token);
            }
            i = end + 1;
        } else {
            const size_t end = std::min(operands.find_first_of(" ,{}|", i), operands.size());
            tokens.push_back({'a', operands.substr(i, end - i)});
            i = end;
        }
    }
    return tokens;
}

Operands::Operands(Kernel& kernel, const std::map<std::string, Declaration>& shared, const std::string& body)
    : kernel_(kernel), shared_(shared) {
    for (const auto& [name, array] : shared) {
        if (!array.open && body.find(name) != std::string::npos) place_shared(array);
    }
}

void Operands::declare(const std::string& type, const std::string& names) {
    const size_t bytes = bytes_of_type(type);
    const char kind = type == ".pred" ? 'p' : bytes == 2 ? 'h' : bytes == 4 ? 'w' : 'x';
    const size_t bracket = names.find('<');
    if (bracket == std::string::npos) return declare_one(names, kind);
    const int count = std::atoi(names.c_str() + bracket + 1);
    for (int i = 0; i < count; ++i) declare_one(names.substr(0, bracket) + std::to_string(i), kind);
}

void Operands::declare_one(const std::string& name, char kind) {
    Register& entry = registers_[name];
    if (!hidden_.empty()) hidden_.back().emplace_back(name, entry);
    entry = {-1, kind};
}

bool Operands::close_scope() {
    if (hidden_.empty()) return false;
    for (const auto& [name, outer] : hidden_.back()) registers_[name] = outer;
    hidden_.pop_back();
    return true;
}

void Operands::place_shared(const Declaration& array) {
    kernel_.shared_bytes = align_up(kernel_.shared_bytes, array.align);
    placed_[array.name] = static_cast<int64_t>(kSharedBase + kernel_.shared_bytes);
    kernel_.shared_bytes += array.bytes;
}

bool Operands::match(const std::string& form, const std::vector<Token>& tokens) {
    if (form.size() != tokens.size()) return false;
    const size_t operands = kernel_.operands.size(), unresolved = unresolved_.size(), branches = branches_.size();
    for (size_t i = 0; i < form.size(); ++i) {
        if (fits(form[i], tokens[i])) continue;
        kernel_.operands.resize(operands), unresolved_.resize(unresolved), branches_.resize(branches);
        return false;
    }
    return true;
}

bool Operands::fits(char kind, const Token& token) {
    if (std::strchr("{}|", kind)) return token.kind == kind;
    if (kind == 'T') return token.kind == 'T' && address(token.text, 'G');
    if (std::strchr("PSG", kind)) return token.kind == '[' && address(token.text, kind);
    if (token.kind != 'a') return false;
    if (kind == '_') return token.text == "_";
    if (kind == 'L') {
        branches_.push_back({kernel_.operands.size(), kernel_.code.size() - 1, token.text});
        return append(0, false);
    }
    if (kind == 's') {
        const auto* const found = std::find(std::begin(kSpecialRegisters), std::end(kSpecialRegisters), token.text);
        return found != std::end(kSpecialRegisters) &&
               append(static_cast<int32_t>(found - std::begin(kSpecialRegisters)), false);
    }
    return value(token.text, kind);
}

bool Operands::append(int32_t operand, bool is_register) {
    if (is_register) unresolved_.push_back(kernel_.operands.size());
    kernel_.operands.push_back(operand);
    return true;
}

// A register, an immediate, or the address of a variable.
bool Operands::value(const std::string& text, char kind) {
    const auto found = registers_.find(text);
    if (found != registers_.end() && found->second.kind) {
        // A source may be a wider register, whose low bits, in its first bytes, are read.
        const bool wider = (kind == 'H' && std::strchr("hwx", found->second.kind)) ||
                           (kind == 'W' && std::strchr("wx", found->second.kind));
        if (found->second.kind != kind && !wider) return false;
        if (found->second.slot < 0) found->second.slot = new_slot(found->second.kind);
        return append(found->second.slot, true);
    }
    if (text[0] == '%') return false;
    if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') return number(text, kind);
    int64_t address;
    return variable(text, kind == 'x' ? 'P' : 'S', address) && constant(static_cast<uint64_t>(address));
}

int32_t Operands::new_slot(char kind) {
    const size_t bytes = kind == 'x' ? 8 : 4;
    register_bytes_ = align_up(register_bytes_, bytes) + bytes;
    return static_cast<int32_t>(register_bytes_ - bytes);
}

bool Operands::number(const std::string& text, char kind) {
    char* end;
    const bool is_float = text[0] == '0' && (text[1] == 'f' || text[1] == 'F'),
               is_double = text[0] == '0' && (text[1] == 'd' || text[1] == 'D');
    if ((is_float && kind != 'w' && kind != 'W') || (is_double && kind != 'x')) return false;
    const uint64_t bits = is_float || is_double ? std::strtoull(text.c_str() + 2, &end, 16)
                          : text[0] == '-'      ? static_cast<uint64_t>(std::strtoll(text.c_str(), &end, 0))
                                                : std::strtoull(text.c_str(), &end, 0);
    return !*end && constant(bits);
}

bool Operands::constant(uint64_t bits) {
    const auto found = constants_.try_emplace(bits, static_cast<int32_t>(constants_.size())).first;
    return append(-1 - found->second, true);
}

bool Operands::variable(const std::string& name, char space, int64_t& address) {
    if (space == 'P') {
        for (const Parameter& parameter : kernel_.parameters) {
            if (parameter.name != name) continue;
            address = static_cast<int64_t>(parameter.offset);
            return true;
        }
        return false;
    }
    const auto array = shared_.find(name);
    if (array != shared_.end() && array->second.open && !placed_.count(name)) place_shared(array->second);
    const auto found = placed_.find(name);
    if (found == placed_.end()) return false;
    address = found->second;
    return true;
}

// base, base+offset or base+-offset
bool Operands::address(const std::string& text, char space) {
    const size_t plus = text.find('+');
    const std::string base = text.substr(0, plus);
    const int64_t offset = plus == std::string::npos ? 0 : std::strtoll(text.c_str() + plus + 1, nullptr, 0);
    if (base[0] == '%') return value(base, space == 'S' ? 'w' : 'x') && append(static_cast<int32_t>(offset), false);
    int64_t start;
    return space != 'G' && variable(base, space, start) && constant(static_cast<uint64_t>(start + offset)) &&
           append(0, false);
}

std::string Operands::finish() {
    for (const Branch& branch : branches_) {
        const auto label = labels_.find(branch.label);
        if (label == labels_.end()) return branch.label;
        kernel_.operands[branch.operand] = label->second - static_cast<int32_t>(branch.instruction);
    }
    kernel_.constants.resize(8 * constants_.size());
    for (const auto& [bits, index] : constants_)
        std::memcpy(kernel_.constants.data() + 8 * static_cast<size_t>(index), &bits, sizeof(bits));
    const auto registers = static_cast<int32_t>(kernel_.constants.size());
    for (const size_t at : unresolved_) {
        int32_t& operand = kernel_.operands[at];
        operand = operand < 0 ? 8 * (-1 - operand) : operand + registers;
    }
    kernel_.register_bytes = align_up(kernel_.constants.size() + register_bytes_, 8);
    return "";
}

}  // namespace ptx
