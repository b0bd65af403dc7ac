// Moves, selections, conversions between integers, special registers, branches.
#include "forms.h"

namespace ptx {
namespace {

template <class T>
void add_copies(Forms& forms, const std::string& type) {
    pure<T, T>(forms, "mov." + type, [](T a) { return a; });
    pure<T, T, T, Predicate>(forms, "selp." + type, [](T a, T b, bool first) { return first ? a : b; });
}

// mov.b32 and mov.b64 between a register and its two halves, the lower one first.
template <class Whole, class Half>
const Instruction* join(Thread& t, const Instruction& i) {
    const Half halves[2] = {t.at<Half>(i.operands[1]), t.at<Half>(i.operands[2])};
    std::memcpy(&t.at<Whole>(i.operands[0]), halves, sizeof(halves));
    return &i + 1;
}

template <class Whole, class Half>
const Instruction* split(Thread& t, const Instruction& i) {
    Half halves[2];
    std::memcpy(halves, &t.at<Whole>(i.operands[2]), sizeof(halves));
    t.at<Half>(i.operands[0]) = halves[0];
    t.at<Half>(i.operands[1]) = halves[1];
    return &i + 1;
}

// mov.u32 from a special register. The values are in the order of kSpecialRegisters (operands.cpp).
const Instruction* special(Thread& t, const Instruction& i) {
    const unsigned values[] = {threadIdx.x, threadIdx.y, threadIdx.z, blockDim.x, blockDim.y, blockDim.z,
                               blockIdx.x,  blockIdx.y,  blockIdx.z,  gridDim.x,  gridDim.y,  gridDim.z};
    t.at<uint32_t>(i.operands[0]) = values[i.operands[1]];
    return &i + 1;
}

// C++ converts as PTX does: extends by the sign of the source type, or drops the upper bits. A register may be wider
// than its type: the upper bits of a source are ignored, a result is extended.
template <class From, class To, class D>
const Instruction* convert(Thread& t, const Instruction& i) {
    t.at<D>(i.operands[0]) = static_cast<D>(static_cast<To>(t.at<From>(i.operands[1])));
    return &i + 1;
}

template <class From, class To, class D>
void add_conversion(Forms& forms, const std::string& opcode) {
    if constexpr (sizeof(D) >= sizeof(To)) {
        const char source = sizeof(From) == 2 ? 'H' : sizeof(From) == 4 ? 'W' : 'x';
        forms.add(opcode, {kind<D>(), source}, convert<From, To, D>);
    }
}

template <class From, class To>
void add_conversion(Forms& forms, const std::string& to, const std::string& from) {
    const std::string opcode = "cvt." + to + "." + from;
    using Signed = std::is_signed<To>;
    add_conversion<From, To, std::conditional_t<Signed::value, int16_t, uint16_t>>(forms, opcode);
    add_conversion<From, To, std::conditional_t<Signed::value, int32_t, uint32_t>>(forms, opcode);
    add_conversion<From, To, std::conditional_t<Signed::value, int64_t, uint64_t>>(forms, opcode);
}

template <class From>
void add_conversions(Forms& forms, const std::string& from) {
    add_conversion<From, uint16_t>(forms, "u16", from);
    add_conversion<From, int16_t>(forms, "s16", from);
    add_conversion<From, uint32_t>(forms, "u32", from);
    add_conversion<From, int32_t>(forms, "s32", from);
    add_conversion<From, uint64_t>(forms, "u64", from);
    add_conversion<From, int64_t>(forms, "s64", from);
}

const Instruction* branch(Thread&, const Instruction& i) { return &i + i.operands[0]; }

}  // namespace

const Handler kSkipUnless = [](Thread& t, const Instruction& i) {
    return &i + (t.at<Predicate>(i.operands[0]) ? 1 : 2);
};
const Handler kSkipIf = [](Thread& t, const Instruction& i) { return &i + (t.at<Predicate>(i.operands[0]) ? 2 : 1); };

void add_moves(Forms& forms) {
    for (const char* type : {"b16", "u16", "s16"}) add_copies<uint16_t>(forms, type);
    for (const char* type : {"b32", "u32", "s32", "f32"}) add_copies<uint32_t>(forms, type);
    for (const char* type : {"b64", "u64", "s64", "f64"}) add_copies<uint64_t>(forms, type);
    pure<Predicate, Predicate>(forms, "mov.pred", [](bool a) { return a; });
    forms.add("mov.b32", "w{hh}", join<uint32_t, uint16_t>);
    forms.add("mov.b32", "{hh}w", split<uint32_t, uint16_t>);
    forms.add("mov.b64", "x{ww}", join<uint64_t, uint32_t>);
    forms.add("mov.b64", "{ww}x", split<uint64_t, uint32_t>);
    forms.add("mov.u32", "ws", special);
    add_conversions<uint16_t>(forms, "u16");
    add_conversions<int16_t>(forms, "s16");
    add_conversions<uint32_t>(forms, "u32");
    add_conversions<int32_t>(forms, "s32");
    add_conversions<uint64_t>(forms, "u64");
    add_conversions<int64_t>(forms, "s64");
    // Generic addresses of global memory are its addresses, here those of the host.
    pure<uint64_t, uint64_t>(forms, "cvta.to.global.u64", [](uint64_t a) { return a; });
    forms.add("bra", "L", branch);
    forms.add("bra.uni", "L", branch);  // the parser rejects it with a guard
    forms.add("ret", "", [](Thread&, const Instruction&) -> const Instruction* { return nullptr; });
}

}  // namespace ptx
