#include "ops/rotary/rotary.h"

#include "common/binding.h"

namespace neox {
namespace {

// cos and sin: [s, r] or [b, s, r] fp32, 0 < r <= head_dim, r even.
void check_tables(const char* op, const Tensor& cos, const Tensor& sin, int64_t batch, int64_t seq, int64_t head_dim) {
    const struct {
        const Tensor& table;
        const char* name;
    } tables[] = {{cos, "cos"}, {sin, "sin"}};
    for (const auto& [table, name] : tables) {
        check_device(op, table, name);
        check(op, table.scalar_type() == ScalarType::Float, name, "must be float32",
              torch::headeronly::toString(table.scalar_type()));
        check_rank(op, table, name, 2, 3);
        const int64_t dims = table.dim();
        check(op, table.size(dims - 2) == seq, name, concat("must have a row for each of the ", seq, " positions"),
              shape_text(table));
        check(op, dims == 2 || table.size(0) == batch, name, concat("must have the batch size of the heads, ", batch),
              shape_text(table));
        const int64_t r = table.size(dims - 1);
        check(op, r > 0 && r % 2 == 0 && r <= head_dim, name,
              concat("must have an even number of columns, at most head_dim ", head_dim), shape_text(table));
    }
    check_same_shape(op, sin, "sin", cos, "cos");
}

RotaryTables describe_tables(const Tensor& cos, const Tensor& sin, bool transposed) {
    const int64_t dims = cos.dim();
    const int64_t batch_stride = dims == 3 ? cos.size(1) * cos.size(2) : 0;
    return RotaryTables{static_cast<const float*>(cos.const_data_ptr()),
                        static_cast<const float*>(sin.const_data_ptr()), batch_stride, cos.size(dims - 1), transposed};
}

Heads unpacked_heads(const Tensor& x) { return Heads{x.stride(0), x.stride(1), 0, x.stride(2), 1, x.size(2)}; }

// Rotates x [b, s, n, d], contiguous in d, into a new contiguous tensor.
Tensor rotated(const Tensor& x, const RotaryTables& tables) {
    const bool usable = x.size(3) == 1 || x.stride(3) == 1;
    const Tensor source = usable ? x : torch::stable::contiguous(x);
    Tensor y = empty(x, shape_of(x));
    const RotarySize size{x.size(0), x.size(1), x.size(3)};
    NEOX_RUN(rotary, x, dtype_of(x), size, tables, source.const_data_ptr(), unpacked_heads(source),
             y.mutable_data_ptr(), unpacked_heads(y));
    return y;
}

std::tuple<Tensor, Tensor> rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) {
    const char* const op = "rotary";
    check_float(op, q, "q");
    check_rank(op, q, "q", 4, 4);
    check_same_type(op, k, "k", q, "q");
    check_rank(op, k, "k", 4, 4);
    const bool fits = k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3);
    check(op, fits, "k", concat("must have batch, seq and head_dim of q, ", shape_text(q)), shape_text(k));
    check_tables(op, cos, sin, q.size(0), q.size(1), q.size(3));
    cos = neox::contiguous(cos);
    sin = neox::contiguous(sin);
    const RotaryTables tables = describe_tables(cos, sin, transposed);
    return {rotated(q, tables), rotated(k, tables)};
}

// Rotates queries and keys of the packed projection [b, s, g, m + 2, d] in place.
void rotary_qkv_(Tensor qkv, Tensor cos, Tensor sin, bool transposed) {
    const char* const op = "rotary_qkv";
    check_float(op, qkv, "qkv");
    check_rank(op, qkv, "qkv", 5, 5);
    check(op, qkv.size(3) >= 3, "qkv",
          "must hold at least one query, one key and one value per group, [b, s, g, m + 2, d]", shape_text(qkv));
    check(op, qkv.size(4) == 1 || qkv.stride(4) == 1, "qkv", "must be contiguous in its last dimension",
          concat("stride ", qkv.stride(4)));
    for (int64_t i = 0; i < 4; ++i)
        check(op, qkv.size(i) == 1 || qkv.stride(i) != 0 || qkv.numel() == 0, "qkv",
              "must not be expanded: it is written in place", concat("stride 0 in dimension ", i));
    check_tables(op, cos, sin, qkv.size(0), qkv.size(1), qkv.size(4));
    cos = neox::contiguous(cos);
    sin = neox::contiguous(sin);
    const Heads heads{qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(3), qkv.size(2), qkv.size(3) - 1};
    const RotarySize size{qkv.size(0), qkv.size(1), qkv.size(4)};
    void* const data = qkv.mutable_data_ptr();
    NEOX_RUN(rotary, qkv, dtype_of(qkv), size, describe_tables(cos, sin, transposed), data, heads, data, heads);
}

}  // namespace
}  // namespace neox

NEOX_SCHEMAS(m) {
    m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) -> (Tensor, Tensor)");
    m.def("rotary_qkv_(Tensor(a!) qkv, Tensor cos, Tensor sin, bool transposed) -> ()");
}

NEOX_IMPLEMENTATIONS(m) {
    m.impl("rotary", TORCH_BOX(&neox::rotary));
    m.impl("rotary_qkv_", TORCH_BOX(&neox::rotary_qkv_));
}
