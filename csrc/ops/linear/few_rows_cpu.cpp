// A few rows of x times a matrix. Every weight is read once, in memory order, and multiplied with all rows.
//
// A tile is R rows of x by O rows of W with R O = kResults. Each row of W is a memory stream, few enough for the
// hardware prefetcher, and each result has kChains partial sums, which hide the latency of the additions. The order of
// a result's additions is the same in every tile.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/vec.h"
#include "ops/linear/linear.h"

namespace neox {
namespace {

constexpr int64_t kGrain = 16384;  // minimum products per thread

constexpr int kResults = kVecWidth > 8 ? kVecWidth / 2 : 4;  // results of a tile
constexpr int kChains = 2;                                   // 16 partial sums in 32 registers, 8 in 16

// Dot-product step for weights of type T: adds the products of kStep consecutive elements, or of the first `count` of
// them.
template <class T>
struct Products {
    using Input = float;  // x is widened once
    static constexpr int64_t kStep = kVecWidth;

    static NEOX_INLINE Vec add(Vec sum, const Input* x, const T* weight) { return sum + load(x) * load(weight); }
    static NEOX_INLINE Vec add(Vec sum, const Input* x, const T* weight, int64_t count) {
        return sum + load(x, count) * load(weight, count);
    }
};

#if defined(__AVX512BF16__) && NEOX_VEC_WIDTH == 16
// One instruction computes dot products of pairs. It treats denormals as zeros.
template <>
struct Products<bf16> {
    using Input = bf16;
    static constexpr int64_t kStep = 2 * kVecWidth;

    static NEOX_INLINE Vec add(Vec sum, const bf16* x, const bf16* weight) {
        return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), pairs(x), pairs(weight)));
    }
    static NEOX_INLINE Vec add(Vec sum, const bf16* x, const bf16* weight, int64_t count) {
        bf16 lanes[2][kStep] = {};
        for (int64_t i = 0; i < count; ++i) lanes[0][i] = x[i], lanes[1][i] = weight[i];
        return add(sum, lanes[0], lanes[1]);
    }

  private:
    static NEOX_INLINE __m512bh pairs(const bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
};
#endif

template <int R, class T>
NEOX_INLINE void tile(const typename Products<T>::Input* x, const T* weight, int64_t stride, int64_t in,
                      float (&results)[kResults]) {
    constexpr int kOut = kResults / R;
    constexpr int64_t kStep = Products<T>::kStep;
    Vec sums[kResults][kChains] = {};
    const auto step = [&](int64_t i, int chain, auto... count) {
#pragma GCC unroll 8
        for (int k = 0; k < kResults; ++k) {
            sums[k][chain] =
                Products<T>::add(sums[k][chain], x + k / kOut * in + i, weight + k % kOut * stride + i, count...);
        }
    };
    int64_t i = 0;
    for (; i + kChains * kStep <= in; i += kChains * kStep) {
#pragma GCC unroll 8
        for (int chain = 0; chain < kChains; ++chain) step(i + chain * kStep, chain);
    }
    for (; i + kStep <= in; i += kStep) step(i, 0);
    if (const int64_t rest = in - i; rest > 0) step(i, kChains - 1, rest);
#pragma GCC unroll 8
    for (int k = 0; k < kResults; ++k) {
        for (int step = kChains / 2; step > 0; step /= 2) {
            for (int chain = 0; chain < step; ++chain) sums[k][chain] += sums[k][chain + step];
        }
        results[k] = sum(sums[k][0]);
    }
}

// Computes the first `used` of outputs [begin, begin + kResults / R) for rows [row, row + R) of x.
template <int R, class T>
NEOX_INLINE void finish(const FewRows& op, const float (&results)[kResults], int64_t row, int64_t begin, int64_t used,
                        T* y) {
    const T* const bias = static_cast<const T*>(op.bias);
    const T* const added = static_cast<const T*>(op.added);
    for (int r = 0; r < R; ++r) {
        const int64_t at = (row + r) * op.out + begin;
        for (int64_t o = 0; o < used; ++o) {
            float value = results[r * (kResults / R) + o];
            if (bias) value += to_float(bias[begin + o]);
            if (added) value += to_float(added[at + o]);
            y[at + o] = from_float<T>(value);
        }
    }
}

// Computes outputs [begin, end) for rows [row, row + R) of x.
template <int R, class T>
void multiply(const FewRows& op, const typename Products<T>::Input* x, int64_t row, int64_t begin, int64_t end, T* y) {
    constexpr int64_t kOut = kResults / R;
    const T* const weight = static_cast<const T*>(op.weight);
    const auto* const rows = x + row * op.in;
    float results[kResults];
    int64_t out = begin;
    for (; out + kOut <= end; out += kOut) {
        tile<R, T>(rows, weight + out * op.weight_stride, op.weight_stride, op.in, results);
        finish<R, T>(op, results, row, out, kOut, y);
    }
    for (; out < end; ++out) {  // fills the tile with the same row of W
        tile<R, T>(rows, weight + out * op.weight_stride, 0, op.in, results);
        finish<R, T>(op, results, row, out, 1, y);
    }
}

// x as contiguous rows of the products' input type. `room` owns the copy if one is needed.
template <class T>
const typename Products<T>::Input* input_rows(const FewRows& op, std::vector<typename Products<T>::Input>& room) {
    const T* const x = static_cast<const T*>(op.x);
    if constexpr (std::is_same_v<T, typename Products<T>::Input>) {
        if (op.x_stride == op.in || op.rows == 1) return x;
    }
    room.resize(static_cast<size_t>(op.rows * op.in));
    for (int64_t row = 0; row < op.rows; ++row) {
        auto* const to = room.data() + row * op.in;
        for_each_vec(op.in, [&](int64_t i, auto load, auto store) { store(to + i, load(x + row * op.x_stride + i)); });
    }
    return room.data();
}

}  // namespace

void few_rows_cpu(const FewRows& op, void* y, const Parallel& parallel) {
    dispatch(op.dtype, [&](auto zero) {
        using T = decltype(zero);
        std::vector<typename Products<T>::Input> room;
        const auto* const x = input_rows<T>(op, room);
        T* const to = static_cast<T*>(y);
        const int64_t blocks = (op.out + kResults - 1) / kResults;
        parallel(blocks, kGrain / (kResults * op.in * op.rows + 1), [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                const int64_t begin = block * kResults, end = std::min(begin + kResults, op.out);
                int64_t row = 0;
                for (; row + 4 <= op.rows; row += 4) multiply<4, T>(op, x, row, begin, end, to);
                if (row + 2 <= op.rows) multiply<2, T>(op, x, row, begin, end, to), row += 2;
                if (row < op.rows) multiply<1, T>(op, x, row, begin, end, to);
            }
        });
    });
}

}  // namespace neox
