#include "common/vec.h"
#include "ops/gated/gated.h"

namespace neox {
namespace {

constexpr int64_t kGrain = 16384;  // minimum elements per thread

struct ValueAndSlope {
    Vec value, slope;
};

template <Activation kActivation>
NEOX_INLINE ValueAndSlope activate(Vec u) {
    if constexpr (kActivation == Activation::kSilu) {
        const Logistic s = logistic(u);
        return {u * s.value, s.value + (s.slope > 0.0f ? u * s.slope : Vec{})};  // if the slope is 0, u may be infinite
    } else if constexpr (kActivation == Activation::kGelu) {
        const Normal p = normal(u);
        return {u * p.cdf, p.cdf + (p.pdf > 0.0f ? u * p.pdf : Vec{})};
    } else {
        return {u > 0.0f || u != u ? u : Vec{}, u > 0.0f ? splat(1.0f) : Vec{}};
    }
}

// Calls body(row, element offset in a contiguous tensor) with rows split over threads.
template <class Body>
void for_rows(const Gated& in, const Parallel& parallel, const Body& body) {
    parallel(in.rows, kGrain / (in.cols + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) body(row, row * in.cols);
    });
}

template <class T, Activation kActivation>
void forward(const Gated& in, T* y, const Parallel& parallel) {
    for_rows(in, parallel, [&](int64_t row, int64_t offset) {
        const T* const x = static_cast<const T*>(in.x) + row * in.x_stride;
        const T* const gate = static_cast<const T*>(in.gate) + row * in.gate_stride;
        for_each_vec(in.cols, [&](int64_t i, auto load, auto store) {
            store(y + offset + i, activate<kActivation>(load(x + i)).value * load(gate + i));
        });
    });
}

template <class T, Activation kActivation>
void backward(const Gated& in, const T* dy, int64_t dy_stride, T* dx, T* dgate, const Parallel& parallel) {
    for_rows(in, parallel, [&](int64_t row, int64_t offset) {
        const T* const x = static_cast<const T*>(in.x) + row * in.x_stride;
        const T* const gate = static_cast<const T*>(in.gate) + row * in.gate_stride;
        const T* const dy_row = dy + row * dy_stride;
        for_each_vec(in.cols, [&](int64_t i, auto load, auto store) {
            const ValueAndSlope a = activate<kActivation>(load(x + i));
            const Vec d = load(dy_row + i);
            store(dx + offset + i, d * load(gate + i) * a.slope);
            store(dgate + offset + i, d * a.value);
        });
    });
}

// Calls body with the activation as a type: body(std::integral_constant<Activation, ...>).
template <class Body>
void with_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::kSilu:
            return body(std::integral_constant<Activation, Activation::kSilu>{});
        case Activation::kGelu:
            return body(std::integral_constant<Activation, Activation::kGelu>{});
        case Activation::kRelu:
            return body(std::integral_constant<Activation, Activation::kRelu>{});
    }
}

}  // namespace

void gated_forward_cpu(const Gated& in, void* y, const Parallel& parallel) {
    dispatch(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        with_activation(in.activation,
                        [&](auto activation) { forward<T, activation()>(in, static_cast<T*>(y), parallel); });
    });
}

void gated_backward_cpu(const Gated& in, const void* dy, int64_t dy_stride, void* dx, void* dgate,
                        const Parallel& parallel) {
    dispatch(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        with_activation(in.activation, [&](auto activation) {
            backward<T, activation()>(in, static_cast<const T*>(dy), dy_stride, static_cast<T*>(dx),
                                      static_cast<T*>(dgate), parallel);
        });
    });
}

}  // namespace neox
