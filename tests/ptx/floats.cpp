// Floating-point arithmetic, comparisons and conversions. Compiled without contraction: only fma is fused.
#include <cmath>

#include "forms.h"

namespace ptx {
namespace {

// min and max return the number if one operand is NaN, and the canonical NaN if both are; -0 < +0.
const float kNan = simt::float_of(0x7fffffff);

float smaller(float a, float b) {
    if (a != a) return b != b ? kNan : b;
    if (b != b || (a == b && std::signbit(a))) return a;
    return a < b ? a : b;
}

float larger(float a, float b) {
    if (a != a) return b != b ? kNan : b;
    if (b != b || (a == b && std::signbit(b))) return a;
    return a > b ? a : b;
}

// Comparisons without u are false if an operand is NaN, those with u true.
template <class T>
void add_comparisons(Forms& forms, const std::string& type) {
    pure<Predicate, T, T>(forms, "setp.eq." + type, [](T a, T b) { return a == b; });
    pure<Predicate, T, T>(forms, "setp.ne." + type, [](T a, T b) { return a < b || a > b; });
    pure<Predicate, T, T>(forms, "setp.lt." + type, [](T a, T b) { return a < b; });
    pure<Predicate, T, T>(forms, "setp.le." + type, [](T a, T b) { return a <= b; });
    pure<Predicate, T, T>(forms, "setp.gt." + type, [](T a, T b) { return a > b; });
    pure<Predicate, T, T>(forms, "setp.ge." + type, [](T a, T b) { return a >= b; });
    pure<Predicate, T, T>(forms, "setp.equ." + type, [](T a, T b) { return !(a < b || a > b); });
    pure<Predicate, T, T>(forms, "setp.neu." + type, [](T a, T b) { return a != b; });
    pure<Predicate, T, T>(forms, "setp.ltu." + type, [](T a, T b) { return !(a >= b); });
    pure<Predicate, T, T>(forms, "setp.leu." + type, [](T a, T b) { return !(a > b); });
    pure<Predicate, T, T>(forms, "setp.gtu." + type, [](T a, T b) { return !(a <= b); });
    pure<Predicate, T, T>(forms, "setp.geu." + type, [](T a, T b) { return !(a < b); });
    pure<Predicate, T, T>(forms, "setp.num." + type, [](T a, T b) { return a == a && b == b; });
    pure<Predicate, T, T>(forms, "setp.nan." + type, [](T a, T b) { return a != a || b != b; });
}

// ptxas may fuse a mul and an add without .rn on a GPU. nvcc -fmad=false writes .rn.
template <class T>
void add_arithmetic(Forms& forms, const std::string& type) {
    for (const char* rounding : {"", ".rn"}) {
        const std::string suffix = std::string(rounding) + "." + type;
        pure<T, T, T>(forms, "add" + suffix, [](T a, T b) { return a + b; });
        pure<T, T, T>(forms, "sub" + suffix, [](T a, T b) { return a - b; });
        pure<T, T, T>(forms, "mul" + suffix, [](T a, T b) { return a * b; });
    }
    pure<T, T, T>(forms, "div.rn." + type, [](T a, T b) { return a / b; });
    pure<T, T, T, T>(forms, "fma.rn." + type, [](T a, T b, T c) { return std::fma(a, b, c); });
    pure<T, T>(forms, "neg." + type, [](T a) { return -a; });
    pure<T, T>(forms, "abs." + type, [](T a) { return std::abs(a); });
    pure<T, T>(forms, "rcp.rn." + type, [](T a) { return T(1) / a; });
    pure<T, T>(forms, "sqrt.rn." + type, [](T a) { return std::sqrt(a); });
    add_comparisons<T>(forms, type);
}

float flush(float a) { return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0f, a) : a; }

// The hardware's approximations are within a few ulp of these; the handling of special values is exact.
void add_approximations(Forms& forms) {
    pure<float, float>(forms, "ex2.approx.ftz.f32", [](float a) { return flush(std::exp2(flush(a))); });
    pure<float, float>(forms, "ex2.approx.f32", [](float a) { return std::exp2(a); });
    pure<float, float>(forms, "rcp.approx.ftz.f32", [](float a) { return flush(1.0f / flush(a)); });
    // a times the reciprocal of b, which is 0 for a large b.
    pure<float, float, float>(forms, "div.approx.f32", [](float a, float b) {
        return std::abs(b) > 0x1p126f && !std::isinf(b) && a == a && b == b ? (std::isinf(a) ? kNan : 0.0f) : a / b;
    });
    // The upper 20 bits of the fraction, as the start of an iteration.
    pure<double, double>(forms, "rcp.approx.ftz.f64", [](double a) {
        const double reciprocal = 1.0 / a;
        uint64_t bits;
        std::memcpy(&bits, &reciprocal, sizeof(bits));
        bits &= ~uint64_t{0xffffffff};
        double result;
        std::memcpy(&result, &bits, sizeof(bits));
        return result;
    });
}

void add_conversions(Forms& forms) {
    using simt::decode_bfloat16, simt::decode_half, simt::encode_bfloat16, simt::encode_half;
    pure<float, uint16_t>(forms, "cvt.f32.bf16", [](uint16_t a) { return decode_bfloat16(a); });
    pure<float, uint16_t>(forms, "cvt.f32.f16", [](uint16_t a) { return decode_half(a); });
    pure<uint16_t, float>(forms, "cvt.rn.bf16.f32", [](float a) { return encode_bfloat16(a); });
    pure<uint16_t, float>(forms, "cvt.rn.f16.f32", [](float a) { return encode_half(a); });
    // The first source becomes the upper half.
    pure<uint32_t, float, float>(forms, "cvt.rn.bf16x2.f32", [](float high, float low) {
        return static_cast<uint32_t>(encode_bfloat16(high)) << 16 | encode_bfloat16(low);
    });
    pure<uint32_t, float, float>(forms, "cvt.rn.f16x2.f32", [](float high, float low) {
        return static_cast<uint32_t>(encode_half(high)) << 16 | encode_half(low);
    });
    pure<double, float>(forms, "cvt.f64.f32", [](float a) { return a; });
    pure<float, double>(forms, "cvt.rn.f32.f64", [](double a) { return a; });
    pure<float, int32_t>(forms, "cvt.rn.f32.s32", [](int32_t a) { return a; });
    pure<float, uint32_t>(forms, "cvt.rn.f32.u32", [](uint32_t a) { return a; });
    pure<float, int64_t>(forms, "cvt.rn.f32.s64", [](int64_t a) { return a; });
    pure<double, int64_t>(forms, "cvt.rn.f64.s64", [](int64_t a) { return a; });
}

}  // namespace

void add_floats(Forms& forms) {
    add_arithmetic<float>(forms, "f32");
    add_arithmetic<double>(forms, "f64");
    pure<float, float, float>(forms, "min.f32", [](float a, float b) { return smaller(a, b); });
    pure<float, float, float>(forms, "max.f32", [](float a, float b) { return larger(a, b); });
    add_approximations(forms);
    add_conversions(forms);
}

}  // namespace ptx
