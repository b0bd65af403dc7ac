#include "ops/cross_entropy/cross_entropy.h"

#include <cmath>

#include "common/binding.h"

namespace neox {
namespace {

constexpr const char* kOp = "cross_entropy";

// The columns of the vocabulary that a tensor of logits holds.
struct Columns {
    int64_t first, count, vocab_size, ignore_index;
};

// Checks ids on the CPU only. On a GPU this would need a synchronisation; an invalid id gives a NaN loss there, which
// stops training.
void check_targets([[maybe_unused]] const Tensor& targets, [[maybe_unused]] const Columns& columns) {
#if !defined(NEOX_CUDA_KERNELS)
    const int64_t* const ids = static_cast<const int64_t*>(targets.const_data_ptr());
    for (int64_t row = 0; row < targets.size(0); ++row) {
        const bool ok = ids[row] == columns.ignore_index || (ids[row] >= 0 && ids[row] < columns.vocab_size);
        check(kOp, ok, "targets",
              concat("must be below vocab_size ", columns.vocab_size, " and not negative, or ignore_index ",
                     columns.ignore_index),
              concat(ids[row], " in row ", row));
    }
#endif
}

void check_cross_entropy(const Tensor& logits, const Tensor& targets, const Columns& columns) {
    check_float(kOp, logits, "logits");
    check_rank(kOp, logits, "logits", 2, 2);
    check_device(kOp, targets, "targets");
    check(kOp, targets.scalar_type() == ScalarType::Long, "targets", "must be int64",
          torch::headeronly::toString(targets.scalar_type()));
    check_rank(kOp, targets, "targets", 1, 1);
    check(kOp, targets.size(0) == logits.size(0), "targets",
          concat("must have an id for each of the ", logits.size(0), " rows of logits"), targets.size(0));
    const bool fits = columns.first >= 0 && columns.count >= 0 && columns.count <= logits.size(1) &&
                      (columns.count == 0 || columns.first + columns.count <= columns.vocab_size);
    check(kOp, fits, "num_columns",
          concat("must lie within the ", logits.size(1), " columns of logits and vocab_size ", columns.vocab_size),
          columns.count);
}

void check_statistics(const Tensor& statistics, const Tensor& targets) {
    check_device(kOp, statistics, "statistics");
    const bool ok = statistics.scalar_type() == ScalarType::Float && statistics.dim() == 2 && statistics.size(0) == 4 &&
                    statistics.size(1) == targets.size(0);
    check(kOp, ok && statistics.is_contiguous(), "statistics", "must be float32 [4, rows], contiguous",
          shape_text(statistics));
}

Logits describe(const Rows& logits, const Tensor& targets, const Columns& columns) {
    return Logits{dtype_of(logits.tensor),
                  logits.count,
                  logits.size,
                  columns.count,
                  columns.first,
                  logits.tensor.const_data_ptr(),
                  logits.stride,
                  static_cast<const int64_t*>(targets.const_data_ptr()),
                  columns.ignore_index};
}

RowStatistics rows_of(const Tensor& statistics) {
    float* const data = static_cast<float*>(statistics.mutable_data_ptr());
    const int64_t rows = statistics.size(1);
    return RowStatistics{data, data + rows, data + 2 * rows, data + 3 * rows};
}

Tensor cross_entropy_statistics(Tensor logits, Tensor targets, int64_t first_column, int64_t num_columns,
                                int64_t vocab_size, int64_t ignore_index, bool need_total) {
    const Columns columns{first_column, num_columns, vocab_size, ignore_index};
    check_cross_entropy(logits, targets, columns);
    targets = neox::contiguous(targets);
    check_targets(targets, columns);
    const Rows rows(logits);
    Tensor statistics = empty(logits, {4, rows.count}, ScalarType::Float);
    NEOX_RUN(cross_entropy_statistics, logits, describe(rows, targets, columns), rows_of(statistics), need_total);
    return statistics;
}

// Computes the loss from the statistics. The gradient is with respect to `logits`, and overwrites them if `inplace`.
// With made_for they hold it already, written by cross_entropy_fused_.
Tensor cross_entropy(Tensor logits, Tensor targets, Tensor statistics, int64_t first_column, int64_t num_columns,
                     int64_t vocab_size, int64_t ignore_index, double z_loss, double label_smoothing, bool,
                     std::optional<double>) {
    check_cross_entropy(logits, targets, Columns{first_column, num_columns, vocab_size, ignore_index});
    check_statistics(statistics, targets);
    targets = neox::contiguous(targets);
    Tensor loss = empty(statistics, {targets.size(0)});
    NEOX_RUN(cross_entropy_loss, logits, targets.size(0), static_cast<const int64_t*>(targets.const_data_ptr()),
             ignore_index, (LossTerms{vocab_size, z_loss, label_smoothing}), rows_of(statistics),
             static_cast<float*>(loss.mutable_data_ptr()));
    return loss;
}

void backward_into(void* dlogits, int64_t dstride, const Rows& logits, Tensor dloss, Tensor targets,
                   const Tensor& statistics, const Columns& columns, const LossTerms& terms) {
    check_cross_entropy(logits.tensor, targets, columns);
    check_statistics(statistics, targets);
    check_device(kOp, dloss, "dloss");
    check(kOp, dloss.scalar_type() == ScalarType::Float, "dloss", "must be float32",
          torch::headeronly::toString(dloss.scalar_type()));
    check_same_shape(kOp, dloss, "dloss", targets, "targets");
    dloss = neox::contiguous(dloss);
    targets = neox::contiguous(targets);
    check_targets(targets, columns);
    NEOX_RUN(cross_entropy_backward, logits.tensor, describe(logits, targets, columns), terms, rows_of(statistics),
             static_cast<const float*>(dloss.const_data_ptr()), dlogits, dstride);
}

Tensor cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, Tensor statistics, int64_t first_column,
                              int64_t num_columns, int64_t vocab_size, int64_t ignore_index, double z_loss,
                              double label_smoothing) {
    Tensor dlogits = empty(logits, shape_of(logits));
    const Columns columns{first_column, num_columns, vocab_size, ignore_index};
    backward_into(dlogits.mutable_data_ptr(), logits.size(logits.dim() - 1), Rows(logits), dloss, targets, statistics,
                  columns, LossTerms{vocab_size, z_loss, label_smoothing});
    return dlogits;
}

// A tensor as rows that will be overwritten.
Rows rows_in_place(const Tensor& tensor, const char* argument) {
    Rows rows(tensor);
    check(kOp, rows.tensor.mutable_data_ptr() == tensor.mutable_data_ptr(), argument,
          "must be contiguous in its last dimension to be overwritten", shape_text(tensor));
    return rows;
}

// Overwrites logits with their gradient.
void cross_entropy_backward_(Tensor logits, Tensor dloss, Tensor targets, Tensor statistics, int64_t first_column,
                             int64_t num_columns, int64_t vocab_size, int64_t ignore_index, double z_loss,
                             double label_smoothing) {
    const Rows rows = rows_in_place(logits, "logits");
    const Columns columns{first_column, num_columns, vocab_size, ignore_index};
    backward_into(logits.mutable_data_ptr(), rows.stride, rows, dloss, targets, statistics, columns,
                  LossTerms{vocab_size, z_loss, label_smoothing});
}

// Overwrites logits with their gradient for the same `dloss` in every row; returns the statistics of the logits.
Tensor cross_entropy_fused_(Tensor logits, Tensor targets, int64_t first_column, int64_t num_columns,
                            int64_t vocab_size, int64_t ignore_index, double z_loss, double label_smoothing,
                            double dloss) {
    const Columns columns{first_column, num_columns, vocab_size, ignore_index};
    check_cross_entropy(logits, targets, columns);
    check(kOp, first_column == 0 && num_columns == vocab_size, "num_columns",
          concat("must be the full vocab_size, ", vocab_size), num_columns);
    check(kOp, std::isnormal(static_cast<float>(dloss)), "dloss", "must be a finite number other than zero", dloss);
    targets = neox::contiguous(targets);
    check_targets(targets, columns);
    const Rows rows = rows_in_place(logits, "logits");
    Tensor statistics = empty(logits, {4, rows.count}, ScalarType::Float);
    NEOX_RUN(cross_entropy_fused, logits, describe(rows, targets, columns),
             (LossTerms{vocab_size, z_loss, label_smoothing}), rows_of(statistics), static_cast<float>(dloss),
             logits.mutable_data_ptr(), rows.stride);
    return statistics;
}

// Rescales the gradient that cross_entropy_fused_ computed for made_for to dloss [rows]. Rows whose dloss is made_for
// are not accessed.
void cross_entropy_rescale_(Tensor dlogits, Tensor dloss, double made_for) {
    check_float(kOp, dlogits, "dlogits");
    check_rank(kOp, dlogits, "dlogits", 2, 2);
    check_device(kOp, dloss, "dloss");
    const bool fits = dloss.scalar_type() == ScalarType::Float && dloss.dim() == 1 && dloss.size(0) == dlogits.size(0);
    check(kOp, fits, "dloss", concat("must be float32, one for each of the ", dlogits.size(0), " rows of dlogits"),
          shape_text(dloss));
    dloss = neox::contiguous(dloss);
    const Rows rows = rows_in_place(dlogits, "dlogits");
    NEOX_RUN(cross_entropy_rescale, dlogits,
             (FusedGradient{dtype_of(dlogits), rows.count, rows.size, dlogits.mutable_data_ptr(), rows.stride,
                            static_cast<float>(made_for)}),
             static_cast<const float*>(dloss.const_data_ptr()));
}

}  // namespace
}  // namespace neox

NEOX_SCHEMAS(m) {
    m.def(
        "cross_entropy_statistics(Tensor logits, Tensor targets, int first_column, int num_columns, int vocab_size, "
        "int ignore_index, bool need_total) -> "
        "Tensor");
    m.def(
        "cross_entropy(Tensor logits, Tensor targets, Tensor statistics, int first_column, int num_columns, int "
        "vocab_size, int ignore_index, float z_loss, "
        "float label_smoothing, bool inplace, float? made_for) -> Tensor");
    m.def(
        "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor targets, Tensor statistics, int first_column, int "
        "num_columns, int vocab_size, int "
        "ignore_index, float z_loss, float label_smoothing) -> Tensor");
    m.def(
        "cross_entropy_backward_(Tensor(a!) logits, Tensor dloss, Tensor targets, Tensor statistics, int first_column, "
        "int num_columns, int vocab_size, int "
        "ignore_index, float z_loss, float label_smoothing) -> ()");
    m.def(
        "cross_entropy_fused_(Tensor(a!) logits, Tensor targets, int first_column, int num_columns, int vocab_size, "
        "int ignore_index, float z_loss, float "
        "label_smoothing, float dloss) -> Tensor");
    m.def("cross_entropy_rescale_(Tensor(a!) dlogits, Tensor dloss, float made_for) -> ()");
}

NEOX_IMPLEMENTATIONS(m) {
    m.impl("cross_entropy_statistics", TORCH_BOX(&neox::cross_entropy_statistics));
    m.impl("cross_entropy", TORCH_BOX(&neox::cross_entropy));
    m.impl("cross_entropy_backward", TORCH_BOX(&neox::cross_entropy_backward));
    m.impl("cross_entropy_backward_", TORCH_BOX(&neox::cross_entropy_backward_));
    m.impl("cross_entropy_fused_", TORCH_BOX(&neox::cross_entropy_fused_));
    m.impl("cross_entropy_rescale_", TORCH_BOX(&neox::cross_entropy_rescale_));
}
