// vec.h and philox.h against libm in double precision and against scalar loops. Prints each error bound found. The exit
// status is the number of failures, or 77 if the CPU lacks the instructions for which the test was compiled.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "common/philox.h"
#include "common/vec.h"

namespace {

using neox::bf16;
using neox::kVecWidth;
using neox::Vec;

int failures = 0;

void expect(bool ok, const char* what, double found, double limit) {
    std::printf("%s %-40s %.3g (limit %.3g)\n", ok ? "ok  " : "FAIL", what, found, limit);
    failures += !ok;
}

// Largest |f(x) - want(x)| / scale(want) over a sweep of [low, high].
template <class F, class Want, class Scale>
void sweep(const char* what, double low, double high, double limit, const F& f, const Want& want, const Scale& scale) {
    constexpr int kPoints = 400000;
    double worst = 0;
    for (int first = 0; first < kPoints; first += kVecWidth) {
        float x[kVecWidth], y[kVecWidth];
        for (int i = 0; i < kVecWidth; ++i) x[i] = static_cast<float>(low + (high - low) * (first + i) / kPoints);
        neox::store(y, f(neox::load(x)));
        for (int i = 0; i < kVecWidth; ++i) {
            const double exact = want(static_cast<double>(x[i]));
            const double error = std::abs(y[i] - exact) / scale(exact);
            worst = error <= worst ? worst : error;  // NaN becomes the worst
        }
    }
    expect(worst <= limit, what, worst, limit);
}

double ulp(double value) {  // spacing of floats near value
    const float magnitude = std::max(static_cast<float>(std::abs(value)), std::numeric_limits<float>::min());
    return std::nextafter(magnitude, std::numeric_limits<float>::infinity()) - magnitude;
}

double one(double) { return 1; }
double itself(double value) { return std::abs(value); }
double cdf(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }
double pdf(double x) { return std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI); }

void test_functions() {
    const auto exact_exp = [](double x) { return std::exp(x); };
    sweep("exp, ulp", -103.5, 88.7, 1.5, [](Vec v) { return neox::exp(v); }, exact_exp, ulp);
    sweep("exp_nonpositive, ulp", -87.3, 0, 1.5, [](Vec v) { return neox::exp_nonpositive(v); }, exact_exp, ulp);
    sweep(
        "sigmoid, ulp", -87, 20, 3, [](Vec v) { return neox::sigmoid(v); },
        [](double x) { return 1 / (1 + std::exp(-x)); }, ulp);
    const auto slope = [](double x) { return std::exp(-std::abs(x)) / std::pow(1 + std::exp(-std::abs(x)), 2); };
    sweep("logistic slope, ulp", -80, 80, 4, [](Vec v) { return neox::logistic(v).slope; }, slope, ulp);
    sweep("tanh, ulp", -10, 10, 3, [](Vec v) { return neox::tanh(v); }, [](double x) { return std::tanh(x); }, ulp);
    sweep(
        "reciprocal, ulp", 0.01, 1000, 1, [](Vec v) { return neox::reciprocal(v); }, [](double x) { return 1 / x; },
        ulp);
    sweep("normal cdf, relative", -9, 9, 3e-6, [](Vec v) { return neox::normal(v).cdf; }, cdf, itself);
    sweep("normal cdf, absolute", -20, 20, 2e-7, [](Vec v) { return neox::normal(v).cdf; }, cdf, one);
    sweep("normal pdf, absolute", -20, 20, 1e-7, [](Vec v) { return neox::normal(v).pdf; }, pdf, one);
}

void test_special_values() {
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const auto check = [](const char* what, Vec got, float want) {
        const float value = got[0];
        const bool same = std::isnan(want) ? std::isnan(value) : value == want;
        expect(same, what, value, want);
    };
    const auto v = [](float x) { return neox::splat(x); };
    check("exp(inf)", neox::exp(v(inf)), inf);
    check("exp(-inf)", neox::exp(v(-inf)), 0);
    check("exp(nan)", neox::exp(v(nan)), nan);
    check("exp_nonpositive(-inf)", neox::exp_nonpositive(v(-inf)), 0);
    check("exp_nonpositive(0)", neox::exp_nonpositive(v(0)), 1);
    check("exp_nonpositive(nan)", neox::exp_nonpositive(v(nan)), nan);
    check("sigmoid(inf)", neox::sigmoid(v(inf)), 1);
    check("sigmoid(-inf)", neox::sigmoid(v(-inf)), 0);
    check("sigmoid(nan)", neox::sigmoid(v(nan)), nan);
    check("tanh(inf)", neox::tanh(v(inf)), 1);
    check("tanh(-inf)", neox::tanh(v(-inf)), -1);
    check("tanh(nan)", neox::tanh(v(nan)), nan);
    check("normal(inf).cdf", neox::normal(v(inf)).cdf, 1);
    check("normal(-inf).cdf", neox::normal(v(-inf)).cdf, 0);
    check("normal(nan).cdf", neox::normal(v(nan)).cdf, nan);
    check("normal(inf).pdf", neox::normal(v(inf)).pdf, 0);
    check("normal(nan).pdf", neox::normal(v(nan)).pdf, nan);
}

// Every bf16 loads exactly. Every float is stored with the rounding of from_float.
void test_bf16() {
    int wrong = 0;
    for (uint32_t bits = 0; bits < 0x10000; bits += kVecWidth) {
        bf16 in[kVecWidth], out[kVecWidth];
        float values[kVecWidth];
        for (int i = 0; i < kVecWidth; ++i) in[i].bits = static_cast<uint16_t>(bits + i);
        neox::store(values, neox::load(in));
        neox::store(out, neox::load(in));
        for (int i = 0; i < kVecWidth; ++i) {
            const float want = neox::to_float(in[i]);
            const bool denormal = (in[i].bits & 0x7f80) == 0;  // AVX512_BF16 flushes them to zero
            wrong += !(values[i] == want || (std::isnan(values[i]) && std::isnan(want)));
            wrong +=
                !(out[i].bits == in[i].bits || denormal || (std::isnan(want) && std::isnan(neox::to_float(out[i]))));
        }
    }
    for (uint64_t word = 0; word < (1ull << 32); word += 65521 * kVecWidth) {
        float in[kVecWidth];
        bf16 out[kVecWidth];
        for (int i = 0; i < kVecWidth; ++i) {
            const uint32_t bits = static_cast<uint32_t>(word + i * 32761ull);
            std::memcpy(&in[i], &bits, sizeof(bits));
        }
        neox::store(out, neox::load(in));
        for (int i = 0; i < kVecWidth; ++i) {
            const bf16 want = neox::from_float<bf16>(in[i]);
            const bool denormal = std::abs(in[i]) < std::numeric_limits<float>::min();
            wrong +=
                !(out[i].bits == want.bits || denormal || (std::isnan(in[i]) && std::isnan(neox::to_float(out[i]))));
        }
    }
    expect(wrong == 0, "bf16 conversions that differ", wrong, 0);
}

// Rows of every length up to a few vectors: nothing past the row is accessed, and sums count each element once.
void test_rows() {
    int wrong = 0;
    for (int size = 0; size <= 9 * kVecWidth + 1; ++size) {
        // in has exactly the readable length, which the sanitizers check
        std::vector<float> in(size), out(size + kVecWidth, -1.0f);
        for (int i = 0; i < size; ++i) in[i] = static_cast<float>(i + 1);
        neox::for_each_vec(
            size, [&](int64_t i, auto load, auto store) { store(out.data() + i, load(in.data() + i) * 2.0f); });
        for (int i = 0; i < size + kVecWidth; ++i) wrong += out[i] != (i < size ? 2.0f * (i + 1) : -1.0f);
        const float sum =
            neox::sum(neox::accumulate<Vec>(size, [&](int64_t i, auto load, auto) { return load(in.data() + i); }));
        wrong += sum != static_cast<float>(size * (size + 1) / 2);
        const float ones = neox::sum(neox::accumulate<Vec>(
            size, [&](int64_t i, auto load, auto keep) { return keep(load(in.data() + i) * 0.0f + 1.0f); }));
        wrong += ones != static_cast<float>(size);
    }
    for (int top = 0; top < kVecWidth; ++top) {
        Vec v = neox::splat(-2.0f);
        v[top] = -1.0f;
        wrong += neox::max_lane(v) != -1.0f;
        wrong += neox::sum(v) != 1.0f - 2.0f * kVecWidth;
    }
    expect(wrong == 0, "rows and lanes that are wrong", wrong, 0);
}

void test_philox() {
    const neox::PhiloxWords zero = neox::philox(0, 0, 0);
    const bool known = zero.word[0] == 0x6627e8d5 && zero.word[1] == 0xe169c58d && zero.word[2] == 0xbc57ac4c &&
                       zero.word[3] == 0x9b00dbd8;
    expect(known, "philox: published words", zero.word[0], 0x6627e8d5);
    int wrong = 0;
    for (const uint64_t first : {uint64_t{0}, uint64_t{5}, uint64_t{0xffffffe0}, ~uint64_t{9}}) {
        uint32_t words[4 * 64];
        neox::philox_block<64>(0x123456789abcdef, first, 0xfedcba9876543210, words);
        for (uint64_t i = 0; i < 64; ++i) {
            const neox::PhiloxWords want = neox::philox(0x123456789abcdef, first + i, 0xfedcba9876543210);
            wrong += !std::equal(want.word, want.word + 4, words + 4 * i);
        }
    }
    expect(wrong == 0, "philox_block: counters that differ", wrong, 0);
}

bool cpu_has_the_instructions() {
#if defined(__AVX512BF16__)
    return __builtin_cpu_supports("avx512bf16");
#elif defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return true;
#endif
}

}  // namespace

int main() {
    if (!cpu_has_the_instructions()) {
        std::printf("skipped: this CPU lacks the instructions\n");
        return 77;
    }
    test_functions();
    test_special_values();
    test_bf16();
    test_rows();
    test_philox();
    std::printf("%d failed, %d lanes\n", failures, kVecWidth);
    return std::min(failures, 76);
}
