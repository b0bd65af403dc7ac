// Integer arithmetic, logic, shifts and comparisons. Arithmetic is unsigned, because signed overflow is undefined in
// C++ and wraps in PTX.
#include "forms.h"

namespace ptx {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T>
void add_comparisons(Forms& forms, const std::string& type) {
    pure<Predicate, T, T>(forms, "setp.eq." + type, [](T a, T b) { return a == b; });
    pure<Predicate, T, T>(forms, "setp.ne." + type, [](T a, T b) { return a != b; });
    pure<Predicate, T, T>(forms, "setp.lt." + type, [](T a, T b) { return a < b; });
    pure<Predicate, T, T>(forms, "setp.le." + type, [](T a, T b) { return a <= b; });
    pure<Predicate, T, T>(forms, "setp.gt." + type, [](T a, T b) { return a > b; });
    pure<Predicate, T, T>(forms, "setp.ge." + type, [](T a, T b) { return a >= b; });
}

// Division by zero has no defined result in PTX.
template <class T, bool kRemainder>
const Instruction* divide(Thread& t, const Instruction& i) {
    const T a = t.at<T>(i.operands[1]), b = t.at<T>(i.operands[2]);
    if (b == 0) t.fail(i, "division by zero");
    T quotient = a, rest = 0;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) {  // wraps where C++ overflows, for the least a
        quotient = static_cast<T>(Unsigned<T>{0} - static_cast<Unsigned<T>>(a));
    } else {
        quotient = a / b, rest = a % b;
    }
    t.at<T>(i.operands[0]) = kRemainder ? rest : quotient;
    return &i + 1;
}

template <class T>
void add_arithmetic(Forms& forms, const std::string& type) {
    using U = Unsigned<T>;
    const std::string form = {kind<T>(), kind<T>(), kind<T>()};
    pure<U, U, U>(forms, "add." + type, [](U a, U b) { return a + b; });
    pure<U, U, U>(forms, "sub." + type, [](U a, U b) { return a - b; });
    pure<U, U, U>(forms, "mul.lo." + type, [](U a, U b) { return a * b; });
    pure<U, U, U, U>(forms, "mad.lo." + type, [](U a, U b, U c) { return a * b + c; });
    pure<U, U>(forms, "neg." + type, [](U a) { return U{0} - a; });
    pure<T, T, T>(forms, "min." + type, [](T a, T b) { return b < a ? b : a; });
    pure<T, T, T>(forms, "max." + type, [](T a, T b) { return a < b ? b : a; });
    forms.add("div." + type, form, divide<T, false>);
    forms.add("rem." + type, form, divide<T, true>);
    add_comparisons<T>(forms, type);
}

// Products of full width. A product of n-bit factors fits 2n bits.
void add_products(Forms& forms) {
    pure<uint32_t, uint16_t, uint16_t>(forms, "mul.wide.u16", [](uint32_t a, uint32_t b) { return a * b; });
    pure<uint64_t, uint32_t, uint32_t>(forms, "mul.wide.u32", [](uint64_t a, uint64_t b) { return a * b; });
    pure<int64_t, int32_t, int32_t>(forms, "mul.wide.s32", [](int64_t a, int64_t b) { return a * b; });
    pure<uint32_t, uint32_t, uint32_t>(forms, "mul.hi.u32", [](uint64_t a, uint64_t b) { return a * b >> 32; });
    pure<int32_t, int32_t, int32_t>(forms, "mul.hi.s32", [](int64_t a, int64_t b) { return a * b >> 32; });
    __extension__ using Wide = unsigned __int128;
    pure<uint64_t, uint64_t, uint64_t>(forms, "mul.hi.u64", [](Wide a, Wide b) { return a * b >> 64; });
}

// Shift amounts are unsigned 32-bit numbers. An amount beyond the width counts as the width, unlike in C++ and on x86.
template <class U>
void add_bits(Forms& forms, const std::string& width) {
    using S = std::make_signed_t<U>;
    constexpr uint32_t kWidth = 8 * sizeof(U);
    pure<U, U, U>(forms, "and.b" + width, [](U a, U b) { return a & b; });
    pure<U, U, U>(forms, "or.b" + width, [](U a, U b) { return a | b; });
    pure<U, U, U>(forms, "xor.b" + width, [](U a, U b) { return a ^ b; });
    pure<U, U>(forms, "not.b" + width, [](U a) { return ~a; });
    pure<U, U, uint32_t>(forms, "shl.b" + width, [](U a, uint32_t n) { return n < kWidth ? a << n : U{0}; });
    pure<U, U, uint32_t>(forms, "shr.u" + width, [](U a, uint32_t n) { return n < kWidth ? a >> n : U{0}; });
    pure<S, S, uint32_t>(forms, "shr.s" + width, [](S a, uint32_t n) { return a >> (n < kWidth ? n : kWidth - 1); });
}

void add_fields(Forms& forms) {
    pure<uint32_t, uint32_t>(forms, "brev.b32", [](uint32_t a) {
        uint32_t reversed = 0;
        for (int bit = 0; bit < 32; ++bit) reversed |= (a >> bit & 1) << (31 - bit);
        return reversed;
    });
    // The distance of the highest 1 from the top; all ones if there is none.
    pure<uint32_t, uint32_t>(forms, "bfind.shiftamt.u32",
                             [](uint32_t a) { return a ? static_cast<uint32_t>(__builtin_clz(a)) : ~0u; });
    // Inserts the low bits of a into b. Position and length are taken modulo 256, and clamped to the word.
    pure<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(
        forms, "bfi.b32", [](uint32_t a, uint32_t b, uint32_t position, uint32_t length) {
            position &= 255, length &= 255;
            if (position >= 32 || !length) return b;
            const uint32_t mask = (length < 32 ? (1u << length) - 1 : ~0u) << position;
            return (b & ~mask) | (a << position & mask);
        });
}

}  // namespace

void add_integers(Forms& forms) {
    add_arithmetic<int32_t>(forms, "s32");
    add_arithmetic<uint32_t>(forms, "u32");
    add_arithmetic<int64_t>(forms, "s64");
    add_arithmetic<uint64_t>(forms, "u64");
    add_comparisons<int16_t>(forms, "s16");
    add_comparisons<uint16_t>(forms, "u16");
    add_comparisons<uint32_t>(forms, "b32");
    add_products(forms);
    add_bits<uint16_t>(forms, "16");
    add_bits<uint32_t>(forms, "32");
    add_bits<uint64_t>(forms, "64");
    add_fields(forms);
    pure<Predicate, Predicate, Predicate>(forms, "and.pred", [](bool a, bool b) { return a && b; });
    pure<Predicate, Predicate, Predicate>(forms, "or.pred", [](bool a, bool b) { return a || b; });
    pure<Predicate, Predicate>(forms, "not.pred", [](bool a) { return !a; });
}

}  // namespace ptx
