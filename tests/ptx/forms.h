// The instructions that the machine knows: for each opcode with its modifiers, the forms of its operands and the
// handler of each form. An opcode that is not listed is an error when the PTX is loaded.
//
// A form is a string with a character per operand, and the punctuation of the PTX text:
//   p h w x   register or immediate: predicate, 16, 32 and 64 bits
//   H W       source of at least 16 or 32 bits; its low bits are read
//   s         special register, such as %tid.x
//   L         label
//   P S G     address in parameters, shared memory, global memory (also generic): two operands, register and immediate
//   T         generic address of a tensor map, in the brackets that also hold the vector of coordinates after it
//   _         no result
//   { } |     vectors and pairs
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"

namespace ptx {

using Predicate = uint8_t;

class Forms {
  public:
    static const Forms& all();

    void add(const std::string& opcode, const std::string& operands, Handler handler) {
        forms_[opcode].emplace_back(operands, handler);
    }
    // Null if the opcode is unknown.
    const std::vector<std::pair<std::string, Handler>>* find(const std::string& opcode) const {
        const auto found = forms_.find(opcode);
        return found == forms_.end() ? nullptr : &found->second;
    }
    size_t size() const { return forms_.size(); }

  private:
    std::map<std::string, std::vector<std::pair<std::string, Handler>>> forms_;
};

template <class T>
constexpr char kind() {
    return sizeof(T) == 1 ? 'p' : sizeof(T) == 2 ? 'h' : sizeof(T) == 4 ? 'w' : 'x';
}

template <class F, class D, class... S, size_t... I>
const Instruction* run_pure(Thread& t, const Instruction& i, std::index_sequence<I...>) {
    t.at<D>(i.operands[0]) = static_cast<D>(F{}(t.at<S>(i.operands[1 + I])...));
    return &i + 1;
}

// Adds an instruction that has no effect other than its result: d = function(sources...).
template <class D, class... S, class F>
void pure(Forms& forms, const std::string& opcode, F) {
    forms.add(opcode, {kind<D>(), kind<S>()...}, [](Thread& t, const Instruction& i) {
        return run_pure<F, D, S...>(t, i, std::index_sequence_for<S...>{});
    });
}

void add_integers(Forms& forms);
void add_floats(Forms& forms);
void add_moves(Forms& forms);
void add_memory(Forms& forms);
void add_collectives(Forms& forms);
void add_hopper(Forms& forms);

// Pseudo-instructions that the parser puts before an instruction with a guard.
extern const Handler kSkipUnless;  // @p: skips the instruction if p is false
extern const Handler kSkipIf;      // @!p: skips it if p is true

}  // namespace ptx
