// The operands of a kernel's instructions: its registers, immediates, parameters and shared arrays.
#pragma once

#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "machine.h"
#include "scanner.h"

namespace ptx {

// A declaration of a parameter or of an array: {.space} {.align n} .type name{[n]}.
struct Declaration {
    std::string name;
    size_t bytes = 0, align = 0;
    bool open = false;  // name[]: the dynamic shared memory
};
Declaration parse_declaration(const std::string& text, const Scanner& scanner);
size_t align_up(size_t offset, size_t align);
size_t bytes_of_type(const std::string& type);

// An operand in PTX text, without its commas.
struct Token {
    char kind;  // punctuation; '[' address; 'T' address before coordinates; 'a' anything else
    std::string text;
};
std::vector<Token> tokenize(const std::string& operands);

// Appends operands to Kernel::operands. Until finish(), a register is its offset among the registers, and constant i is
// -1 - i.
class Operands {
  public:
    Operands(Kernel& kernel, const std::map<std::string, Declaration>& shared, const std::string& body);

    // .reg .type name; or name<count>;
    void declare(const std::string& type, const std::string& names);
    void open_scope() { hidden_.emplace_back(); }
    bool close_scope();  // false if none is open
    void place_shared(const Declaration& array);
    void define_label(const std::string& name) { labels_[name] = static_cast<int32_t>(kernel_.code.size()); }

    // Appends the operands of the last instruction if they have the form (forms.h), else nothing.
    bool match(const std::string& form, const std::vector<Token>& tokens);
    // Lays out constants and registers, and resolves labels. Returns a label that is missing, or nothing.
    std::string finish();

  private:
    struct Register {
        int32_t slot = -1;  // offset; -1 before the first use
        char kind = 0;      // 0: not declared
    };
    struct Branch {
        size_t operand, instruction;
        std::string label;
    };

    void declare_one(const std::string& name, char kind);
    bool fits(char kind, const Token& token);
    bool value(const std::string& text, char kind);
    bool address(const std::string& text, char space);
    bool number(const std::string& text, char kind);
    bool constant(uint64_t bits);
    bool variable(const std::string& name, char space, int64_t& address);
    bool append(int32_t operand, bool is_register);
    int32_t new_slot(char kind);

    Kernel& kernel_;
    const std::map<std::string, Declaration>& shared_;  // arrays of the file
    std::map<std::string, int64_t> placed_;             // addresses of the kernel's shared arrays
    std::unordered_map<std::string, Register> registers_;
    // Per open scope: the names that it declares, with the registers of the outer scopes that they hide.
    std::vector<std::vector<std::pair<std::string, Register>>> hidden_;
    std::map<std::string, int32_t> labels_;
    std::map<uint64_t, int32_t> constants_;
    std::vector<Branch> branches_;
    std::vector<size_t> unresolved_;  // indices of the operands that are registers or constants
    size_t register_bytes_ = 0;
};

}  // namespace ptx
