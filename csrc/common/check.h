// Argument checks of the bindings. A failure throws std::invalid_argument (ValueError in Python) of the form
//     <op>: <argument> <rule>; got <value>
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/dtype.h"

namespace neox {

using torch::stable::Tensor;

// Parts of a message, formatted only when a check fails: an operator makes about twenty checks per call, and a string
// costs half a microsecond. They hold references and must not outlive the call of check() in which they are written.
template <class... Parts>
struct Concat {
    std::tuple<const Parts&...> parts;

    operator std::string() const {
        std::ostringstream text;
        text << *this;
        return text.str();
    }

    friend std::ostream& operator<<(std::ostream& out, const Concat& self) {
        std::apply([&](const Parts&... part) { (out << ... << part); }, self.parts);
        return out;
    }
};

template <class... Parts>
Concat<Parts...> concat(const Parts&... parts) {
    return {std::tie(parts...)};
}

struct ShapeText {
    const Tensor& tensor;

    friend std::ostream& operator<<(std::ostream& out, const ShapeText& self) {
        out << "[";
        for (int64_t i = 0; i < self.tensor.dim(); ++i) out << (i ? ", " : "") << self.tensor.size(i);
        return out << "]";
    }
};

inline ShapeText shape_text(const Tensor& tensor) { return {tensor}; }

// check("bias_gelu", ok, "bias", "must have the size of x's last dimension", shape_text(bias))
template <class Rule, class Got>
void check(const char* op, bool ok, const char* argument, const Rule& rule, const Got& got) {
    if (!ok) throw std::invalid_argument(concat(op, ": ", argument, " ", rule, "; got ", got));
}

// The device of the library: a GPU for the CUDA library, else the CPU. Emulated CUDA kernels read CPU tensors.
inline void check_device(const char* op, const Tensor& tensor, const char* argument) {
#if defined(NEOX_CUDA_KERNELS) && !defined(SIMT_EMU)
    check(op, tensor.is_cuda(), argument, "must be on the GPU",
          tensor.is_cpu() ? "a CPU tensor" : "a tensor of another device");
#else
    check(op, tensor.is_cpu(), argument, "must be on the CPU",
          tensor.is_cuda() ? "a CUDA tensor" : "a tensor of another device");
#endif
}

// float32 or bfloat16, with CUDA kernels also float16, on the device of the library.
inline void check_float(const char* op, const Tensor& tensor, const char* argument) {
    using torch::headeronly::ScalarType;
    check_device(op, tensor, argument);
    const auto type = tensor.scalar_type();
    const bool ok = type == ScalarType::Float || type == ScalarType::BFloat16;
#if defined(NEOX_CUDA_KERNELS)
    check(op, ok || type == ScalarType::Half, argument, "must be float32, bfloat16 or float16",
          torch::headeronly::toString(type));
#else
    check(op, ok, argument, "must be float32 or bfloat16", torch::headeronly::toString(type));
#endif
}

inline void check_rank(const char* op, const Tensor& tensor, const char* argument, int64_t least, int64_t most) {
    const bool ok = tensor.dim() >= least && tensor.dim() <= most;
    const char* const dimensions = most == 1 ? " dimension" : " dimensions";
    if (least == most) {
        check(op, ok, argument, concat("must have ", least, dimensions),
              concat(tensor.dim(), " in shape ", shape_text(tensor)));
    } else {
        check(op, ok, argument, concat("must have ", least, " to ", most, dimensions),
              concat(tensor.dim(), " in shape ", shape_text(tensor)));
    }
}

// Same device and dtype as `like`.
inline void check_same_type(const char* op, const Tensor& tensor, const char* argument, const Tensor& like,
                            const char* like_name) {
    check_device(op, tensor, argument);
    check(op, tensor.scalar_type() == like.scalar_type(), argument,
          concat("must have the dtype of ", like_name, ", ", torch::headeronly::toString(like.scalar_type())),
          torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_same_shape(const char* op, const Tensor& tensor, const char* argument, const Tensor& like,
                             const char* like_name) {
    bool ok = tensor.dim() == like.dim();
    for (int64_t i = 0; ok && i < like.dim(); ++i) ok = tensor.size(i) == like.size(i);
    check(op, ok, argument, concat("must have the shape of ", like_name, ", ", shape_text(like)), shape_text(tensor));
}

// A vector with the length of the last dimension of `like`.
inline void check_last_dim(const char* op, const Tensor& tensor, const char* argument, const Tensor& like,
                           const char* like_name) {
    check_rank(op, tensor, argument, 1, 1);
    const int64_t size = like.size(like.dim() - 1);
    check(op, tensor.size(0) == size, argument,
          concat("must have as many elements as the last dimension of ", like_name, ", ", size), tensor.size(0));
}

}  // namespace neox
