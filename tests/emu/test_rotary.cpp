// The CUDA kernel of rotary: every access width, in place on packed projections and out of place, both directions,
// tables per sequence; in place, only rotated channels are accessed; and the bytes moved.
#include "op_test.h"
#include "ops/rotary/rotary.h"

namespace {

using emu_test::Buffer;
using emu_test::Role;
using neox::Heads;
using neox::RotaryTables;

struct Shape {
    int64_t batch, seq, groups, heads, head_dim, rotary_dim;
    bool per_sequence, transposed;
    size_t offset;  // elements past a 16-byte boundary
    int64_t group_gap = 0, seq_gap = 0, batch_gap = 0;
    size_t cos_offset = 0, sin_offset = 0, y_offset = 0;
};

// The row of the tables, r entries, for a token.
int64_t table_row(const Shape& s, int64_t b, int64_t t) {
    return ((s.per_sequence ? b * s.seq : 0) + t) * s.rotary_dim;
}

// Calls body(batch, position, group, head).
template <class Body>
void for_each_head(const Shape& s, const Body& body) {
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t t = 0; t < s.seq; ++t)
            for (int64_t g = 0; g < s.groups; ++g)
                for (int64_t h = 0; h < s.heads; ++h) body(b, t, g, h);
}

// The head that starts at x, rotated.
template <class T>
std::vector<double> turned(const Shape& s, const T* x, const float* cos, const float* sin) {
    const int64_t half = s.rotary_dim / 2;
    std::vector<double> y(x, x + s.head_dim);
    for (int64_t i = 0; i < half; ++i) {
        const double low = static_cast<float>(x[i]), high = static_cast<float>(x[i + half]);
        y[static_cast<size_t>(i)] = s.transposed ? cos[i] * low + sin[i + half] * high : cos[i] * low - sin[i] * high;
        y[static_cast<size_t>(i + half)] =
            s.transposed ? cos[i + half] * high - sin[i] * low : cos[i + half] * high + sin[i + half] * low;
    }
    return y;
}

// A projection [b, s, g, heads + 2, d] whose first `heads` heads of each group are rotated in place, and into a
// contiguous y.
template <class T>
void check(const Shape& s) {
    const int64_t group = (s.heads + 2) * s.head_dim + s.group_gap, token = s.groups * group + s.seq_gap,
                  batch = s.seq * token + s.batch_gap;
    const auto count = static_cast<size_t>(s.batch * batch),
               turned_count = static_cast<size_t>(s.batch * s.seq * s.groups * s.heads * s.head_dim);
    const auto table_size = static_cast<size_t>((s.per_sequence ? s.batch : 1) * s.seq * s.rotary_dim);
    Buffer<T> qkv("qkv", count, Role::kStream, s.offset), y("y", turned_count, Role::kStream, s.offset + s.y_offset);
    Buffer<float> cos("cos", table_size, Role::kCached, s.cos_offset),
        sin("sin", table_size, Role::kCached, s.sin_offset);
    qkv.random(1), cos.random(2), sin.random(3);
    const Heads packed{batch, token, group, s.head_dim, s.groups, s.heads},
        plain{s.seq * s.groups * s.heads * s.head_dim,
              s.groups * s.heads * s.head_dim,
              s.heads * s.head_dim,
              s.head_dim,
              s.groups,
              s.heads};
    const RotaryTables tables{cos.data(), sin.data(), s.per_sequence ? s.seq * s.rotary_dim : 0, s.rotary_dim,
                              s.transposed};
    std::vector<double> expected(count), expected_y;
    for (size_t i = 0; i < count; ++i) expected[i] = static_cast<float>(qkv[i]);
    for_each_head(s, [&](int64_t b, int64_t t, int64_t g, int64_t h) {
        const int64_t at = b * packed.batch_stride + t * packed.seq_stride + g * packed.group_stride +
                           h * packed.head_stride,
                      row = table_row(s, b, t);
        const std::vector<double> head = turned(s, qkv.data() + at, cos.data() + row, sin.data() + row);
        std::copy(head.begin(), head.end(), expected.begin() + at);
        expected_y.insert(expected_y.end(), head.begin(), head.end());
    });
    const neox::RotarySize size{s.batch, s.seq, s.head_dim};
    EXPECT(!neox::rotary_cuda(emu_test::dtype_of<T>(), size, tables, qkv.data(), packed, y.data(), plain, nullptr));
    EXPECT_NEAR(y, expected_y, "out of place");
    EXPECT(!neox::rotary_cuda(emu_test::dtype_of<T>(), size, tables, qkv.data(), packed, qkv.data(), packed, nullptr));
    EXPECT_NEAR(qkv, expected, "in place");
}

void values() {
    emu_test::for_each_type([](auto zero) {
        using T = decltype(zero);
        check<T>({1, 1, 1, 1, 2, 2, false, false, 0});
        check<T>({2, 5, 3, 2, 17, 6, true, true, 1});
        check<T>({2, 7, 5, 1, 96, 24, false, false, 0});  // GPT-NeoX-20B: halves of 12 channels
        check<T>({1, 9, 3, 1, 80, 20, true, false, 0});   // Pythia-2.8B: halves of 10
        check<T>({2, 5, 3, 2, 64, 16, false, true, 0});   // Pythia-160M
        check<T>({2, 3, 2, 5, 128, 128, true, true, 0});
        check<T>({1, 3, 2, 2, 10, 8, false, false, 0});  // heads that are not aligned to packs of a half
        check<T>({1, 3, 1, 2, 64, 32, false, false, 2});
        check<T>({1, 1, 1, 1, 19, 16, false, false, 0});  // the channels to copy are not complete packs
        // one stride that is not a multiple of a pack, or one misaligned tensor
        check<T>({2, 4, 4, 2, 64, 32, true, false, 0, 2, 0, 0});
        check<T>({2, 4, 4, 2, 64, 32, true, false, 0, 0, 2, 0});
        check<T>({2, 4, 4, 2, 64, 32, true, false, 0, 0, 0, 2});
        check<T>({2, 3, 2, 2, 64, 32, true, false, 0, 0, 0, 0, 1, 0, 0});
        check<T>({2, 3, 2, 2, 64, 32, true, false, 0, 0, 0, 0, 0, 1, 0});
        check<T>({2, 3, 2, 2, 64, 32, true, false, 0, 0, 0, 0, 0, 0, 1});
        check<T>({0, 3, 1, 2, 64, 32, false, false, 0});
    });
}

// The projections of Pythia-1.4B and Pythia-160M with fewer tokens, in place, then all channels out of place.
void bytes() {
    using T = __nv_bfloat16;
    for (const Shape& s :
         {Shape{1, 64, 16, 2, 128, 32, false, false, 0}, Shape{1, 64, 12, 2, 64, 16, false, false, 0}}) {
        const int64_t all = s.heads + 1, token = s.groups * all * s.head_dim;
        Buffer<T> qkv("qkv", static_cast<size_t>(s.seq * token)),
            q("q", static_cast<size_t>(s.seq * s.groups * s.head_dim)), y("y", q.size());
        Buffer<float> cos("cos", static_cast<size_t>(s.seq * s.head_dim), Role::kCached),
            sin("sin", cos.size(), Role::kCached);
        qkv.random(1), q.random(2), cos.random(3), sin.random(4);
        const Heads packed{s.seq * token, token, all * s.head_dim, s.head_dim, s.groups, s.heads};
        const neox::RotarySize size{s.batch, s.seq, s.head_dim};
        const std::string setting =
            std::to_string(s.seq) + "x" + std::to_string(s.groups) + "x" + std::to_string(s.head_dim) + " bf16";
        const double tables = static_cast<double>(2 * s.seq * s.rotary_dim * 4),
                     touched = static_cast<double>(2 * s.seq * s.groups * s.heads * s.rotary_dim * 2);
        emu_test::expect_bytes("rotary_qkv, a quarter in place", setting, touched + tables, [&] {
            neox::rotary_cuda(emu_test::dtype_of<T>(), size, {cos.data(), sin.data(), 0, s.rotary_dim, false},
                              qkv.data(), packed, qkv.data(), packed, nullptr);
        });
        const Heads plain{static_cast<int64_t>(q.size()), s.groups * s.head_dim, 0, s.head_dim, 1, s.groups};
        emu_test::expect_bytes(
            "rotary, all out of place", setting,
            static_cast<double>(2 * q.size() * sizeof(T)) + static_cast<double>(2 * s.seq * s.head_dim * 4), [&] {
                neox::rotary_cuda(emu_test::dtype_of<T>(), size, {cos.data(), sin.data(), 0, s.head_dim, false},
                                  q.data(), plain, y.data(), plain, nullptr);
            });
    }
}

const emu_test::Operator registered{"rotary", values, bytes};

}  // namespace
