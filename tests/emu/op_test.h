// Helpers for tests of an operator's CUDA kernels: device buffers initialised to NaN, comparison with fp64, and bytes
// moved against their floor.
//
// tests/emu/test_<op>.cpp tests the launchers of csrc/ops/<op>/<op>_cuda.cu and registers itself:
//
//     void values() { ... EXPECT_NEAR(y, expected, "y"); }
//     void bytes() { emu_test::expect_bytes("layer_norm forward", "64x2048 bf16", floor, [&] { launch; }); }
//     const emu_test::Operator registered{"norm", values, bytes};
//
// All of them are linked into one executable per variant: test_ops_<plain|asan|check> [OP] [--all|--bytes].
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "expect.h"

namespace emu_test {

using neox::DType;

template <class T>
constexpr DType dtype_of() {
    return std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16
           : std::is_same_v<T, __half>      ? DType::kFloat16
                                            : DType::kFloat32;
}

template <class T>
constexpr const char* name_of() {
    return std::is_same_v<T, __nv_bfloat16> ? "bf16" : std::is_same_v<T, __half> ? "fp16" : "fp32";
}

// Largest allowed error, relative to the largest expected magnitude, as in tests/reference.py.
template <class T>
constexpr double tolerance() {
    return std::is_same_v<T, __nv_bfloat16> ? 1.6e-2 : std::is_same_v<T, __half> ? 2e-3 : 2e-6;
}

// Calls body(T{}) for float, __nv_bfloat16 and __half.
template <class Body>
void for_each_type(const Body& body) {
    body(float{});
    body(__nv_bfloat16{});
#if !defined(__SANITIZE_ADDRESS__)  // AddressSanitizer checks addresses, which are those of bf16
    body(__half{});
#endif
}

// How accesses to a buffer count as memory traffic: all of them, or only the first of each byte (parameters and tables
// that every row reads).
enum class Role { kStream, kCached };

// Device memory of `size` elements, `offset` elements past a 16-byte boundary, filled with 0xff, which is NaN. Tracked
// by the checker under `name`.
template <class T>
class Buffer {
  public:
    Buffer(const char* name, size_t size, Role role = Role::kStream, size_t offset = 0)
        : memory_(static_cast<char*>(std::malloc((size + offset) * sizeof(T) + 2 * kGuard + (size + offset == 0)))),
          data_(reinterpret_cast<T*>(memory_.get() + kGuard) + offset),
          size_(size) {
        std::memset(memory_.get() + kGuard, 0xff, (size + offset) * sizeof(T));
        if (!size) return;
        simt::check::track(data_, size * sizeof(T), name, role == Role::kCached, true);
        simt::add_memory(data_, size * sizeof(T), name);
    }
    ~Buffer() {
        simt::check::untrack(data_);
        simt::remove_memory(data_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    // Normal values: scale * N(0, 1) + shift.
    Buffer& random(unsigned seed, float scale = 1.0f, float shift = 0.0f) {
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal;
        for (size_t i = 0; i < size_; ++i) data_[i] = T(scale * normal(generator) + shift);
        return *this;
    }

    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return size_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }

  private:
    static constexpr size_t kGuard = simt::check::kGuard;
    struct Free {
        void operator()(char* pointer) const { std::free(pointer); }
    };
    std::unique_ptr<char, Free> memory_;
    T* data_;
    size_t size_;
};

// An input whose rows are cols + gap elements apart. The inputs of an operator should have different gaps, so that a
// swapped stride is detected.
template <class T>
struct Rows : Buffer<T> {
    int64_t stride;

    Rows(const char* name, int64_t rows, int64_t cols, int64_t gap, size_t offset = 0)
        : Buffer<T>(name, static_cast<size_t>(rows ? (rows - 1) * (cols + gap) + cols : 0), Role::kStream, offset),
          stride(cols + gap) {}
    double at(int64_t row, int64_t col) const {
        return static_cast<float>((*this)[static_cast<size_t>(row * stride + col)]);
    }
};

// Fails unless max |got - expected| <= limit * max |expected|. NaN and infinity fail.
template <class T>
void expect_near(const Buffer<T>& got, const std::vector<double>& expected, const std::string& what, const char* file,
                 int line, double limit = tolerance<T>()) {
    double scale = 0.0, error = 0.0;
    size_t worst = 0;
    bool finite = got.size() == expected.size();
    for (size_t i = 0; finite && i < expected.size(); ++i) {
        const double difference = std::abs(static_cast<double>(static_cast<float>(got[i])) - expected[i]);
        scale = std::max(scale, std::abs(expected[i]));
        if (!(difference <= error)) {
            error = difference;
            worst = i;
        }
        finite = std::isfinite(difference);
    }
    const bool holds = finite && error <= limit * scale;
    tally.check(holds, what.c_str(), file, line,
                holds ? ""
                      : "error " + std::to_string(error) + " at element " + std::to_string(worst) + ", scale " +
                            std::to_string(scale));
}
#define EXPECT_NEAR(got, ...) emu_test::expect_near(got, __VA_ARGS__, __FILE__, __LINE__)

// Runs launches and compares the bytes that they move in tracked buffers with the floor, within 5 %. Prints a row. Race
// checker only.
template <class Run>
void expect_bytes(const std::string& what, const std::string& setting, double floor, const Run& run,
                  double slack = 0.05) {
    if constexpr (simt::check::kEnabled) {
        simt::check::reset_traffic();
        run();
        const auto moved = static_cast<double>(simt::check::moved());
        std::printf("%-36s %-28s %12.0f %12.0f %7.3f\n", what.c_str(), setting.c_str(), moved, floor, moved / floor);
        tally.check(std::abs(moved / floor - 1.0) <= slack, (what + " moves the floor's bytes").c_str(),
                    setting.c_str(), 0);
    }
}

// The tests of an operator. All but `values` may be null.
struct Operator {
    const char* name;
    void (*values)();     // runs once per schedule
    void (*bytes)();      // runs once, with the race checker only
    void (*instances)();  // with --all: the kernels that values() does not launch
    void (*sample)();     // in tests/ptx, which is much slower, replaces values() without --all

    Operator(const char* name_, void (*values_)(), void (*bytes_)(), void (*instances_)() = nullptr,
             void (*sample_)() = nullptr)
        : name(name_), values(values_), bytes(bytes_), instances(instances_), sample(sample_) {
        all().push_back(this);
    }
    static std::vector<const Operator*>& all() {
        static std::vector<const Operator*> operators;
        return operators;
    }
};

}  // namespace emu_test
