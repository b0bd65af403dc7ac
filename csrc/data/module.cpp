// neox._data: Python bindings of the dataset core. Arrays are numpy; long work runs without the interpreter lock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <functional>

#include "data/batch.h"
#include "data/bindings.h"
#include "data/blend.h"
#include "data/checksum.h"
#include "data/fault.h"
#include "data/file.h"
#include "data/indexed_dataset.h"
#include "data/indexed_writer.h"
#include "data/sample_index.h"
#include "data/xxh3.h"

namespace py = pybind11;

namespace neox::data {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
template <typename T>
using Exact = py::array_t<T, py::array::c_style>;  // no conversion, so that writes reach the caller's array
using NoGil = py::call_guard<py::gil_scoped_release>;

// Raises neox.errors.DataError or DiskError with the fields of the fault.
void raise_fault(const Fault& fault) {
    const auto errors = py::module_::import("neox.errors");
    const auto type = errors.attr(fault.kind == FaultKind::disk ? "DiskError" : "DataError");
    py::dict parts;
    const auto add = [&](const char* name, const std::string& value) {
        // Paths are bytes; undecodable ones are shown as Python shows them.
        if (!value.empty())
            parts[name] = py::reinterpret_steal<py::object>(
                PyUnicode_DecodeFSDefaultAndSize(value.data(), static_cast<Py_ssize_t>(value.size())));
    };
    add("where", fault.where);
    add("got", fault.got);
    add("want", fault.want);
    add("do", fault.action);
    const py::object error = type(fault.what(), **parts);
    PyErr_SetObject(type.ptr(), error.ptr());
}

uint64_t check_below(int64_t value, uint64_t bound, const char* what) {
    if (value < 0 || static_cast<uint64_t>(value) > bound)
        throw py::index_error(std::string(what) + " " + std::to_string(value) +
                              " is out of range: it must be from 0 to " + std::to_string(bound));
    return static_cast<uint64_t>(value);
}

// A read-only numpy view of mapped memory (unaligned for most dtypes) that keeps `owner` alive.
py::array view(const py::dtype& dtype, uint64_t count, const uint8_t* bytes, const py::object& owner) {
    py::array array(dtype, {static_cast<py::ssize_t>(count)}, {dtype.itemsize()}, bytes, owner);
    py::detail::array_proxy(array.ptr())->flags &=
        ~(py::detail::npy_api::NPY_ARRAY_WRITEABLE_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_);
    if (reinterpret_cast<uintptr_t>(bytes) % static_cast<uintptr_t>(dtype.itemsize()) == 0)
        py::detail::array_proxy(array.ptr())->flags |= py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    return array;
}

py::tuple with_segments(uint64_t count, bool want_segments, const std::function<void(int64_t*, int32_t*)>& fill) {
    py::array_t<int64_t> tokens(static_cast<py::ssize_t>(count));
    py::object segments = py::none();
    int32_t* segment_data = nullptr;
    if (want_segments) {
        py::array_t<int32_t> made(static_cast<py::ssize_t>(count));
        segment_data = made.mutable_data();
        segments = std::move(made);
    }
    int64_t* token_data = tokens.mutable_data();
    {
        py::gil_scoped_release released;
        fill(token_data, segment_data);
    }
    return py::make_tuple(tokens, segments);
}

py::tuple read(const IndexedDataset& self, int64_t first, int64_t count, bool segments) {
    const uint64_t from = check_below(first, self.index().num_tokens(), "token");
    const uint64_t tokens = check_below(count, self.index().num_tokens() - from, "token count");
    return with_segments(tokens, segments, [&](int64_t* out, int32_t* marks) { self.read(from, tokens, out, marks); });
}

template <typename T>
py::tuple read_ordered(const IndexedDataset& self, const py::array_t<T, py::array::c_style>& order, int64_t position,
                       int64_t offset, int64_t count, bool segments) {
    const auto length = static_cast<uint64_t>(order.size());
    check_below(position, length, "position");
    check_below(offset, INT32_MAX, "offset");
    check_below(count, INT64_MAX / 8, "token count");
    const T* data = order.data();
    return with_segments(static_cast<uint64_t>(count), segments, [&](int64_t* out, int32_t* marks) {
        self.read_ordered(data, length, static_cast<uint64_t>(position), static_cast<uint64_t>(offset),
                          static_cast<uint64_t>(count), out, marks);
    });
}

// The data of an array with the shape of `inputs`; null for None.
template <typename T>
T* data_like(const Exact<int64_t>& inputs, const py::object& given, const char* name) {
    if (given.is_none()) return nullptr;
    if (!py::isinstance<Exact<T>>(given))
        throw py::type_error(std::string(name) + " must be a contiguous array of its type");
    auto array = given.cast<Exact<T>>();
    if (array.ndim() != 2 || array.shape(0) != inputs.shape(0) || array.shape(1) != inputs.shape(1))
        throw py::value_error(std::string(name) + " must be [rows, seq_length]");
    return array.mutable_data();
}

// Checks the destination arrays: inputs, targets, segments or None, positions or None.
IndexedDataset::Rows rows_of(const Array<int64_t>& rows, Exact<int64_t>& inputs, const py::object& targets,
                             const py::object& segments, const py::object& positions) {
    if (inputs.ndim() != 2 || targets.is_none()) throw py::value_error("inputs and targets must be [rows, seq_length]");
    const IndexedDataset::Rows to{rows.data(),
                                  static_cast<uint64_t>(rows.size()),
                                  static_cast<uint64_t>(inputs.shape(1)),
                                  inputs.mutable_data(),
                                  data_like<int64_t>(inputs, targets, "targets"),
                                  data_like<int32_t>(inputs, segments, "segments"),
                                  data_like<int64_t>(inputs, positions, "positions")};
    if (to.positions != nullptr && to.segments == nullptr) throw py::value_error("positions need segments");
    for (uint64_t i = 0; i < to.count; ++i)
        if (to.rows[i] < 0 || to.rows[i] >= inputs.shape(0))
            throw py::index_error("row " + std::to_string(to.rows[i]) + " is out of range");
    return to;
}

void check_starts(const Array<int64_t>& starts, const IndexedDataset::Rows& to) {
    if (static_cast<uint64_t>(starts.size()) != to.count) throw py::value_error("one start per row");
    for (py::ssize_t i = 0; i < starts.size(); ++i) check_below(starts.data()[i], INT64_MAX / 2, "start");
}

// The largest id; 2^64 - 1 if some id is negative.
uint64_t largest_of(const IdRange& range) {
    return range.smallest < 0 ? UINT64_MAX : static_cast<uint64_t>(std::max<int64_t>(range.largest, 0));
}

uint64_t read_rows(const IndexedDataset& self, const Array<int64_t>& firsts, const Array<int64_t>& rows,
                   Exact<int64_t> inputs, const py::object& targets, const py::object& segments,
                   const py::object& position_ids) {
    const IndexedDataset::Rows to = rows_of(rows, inputs, targets, segments, position_ids);
    check_starts(firsts, to);
    const int64_t* from = firsts.data();
    py::gil_scoped_release released;
    return largest_of(self.read_rows(from, to));
}

template <typename T>
uint64_t read_ordered_rows(const IndexedDataset& self, const py::array_t<T, py::array::c_style>& order,
                           const Array<int64_t>& positions, const Array<int64_t>& offsets, const Array<int64_t>& rows,
                           Exact<int64_t> inputs, const py::object& targets, const py::object& segments,
                           const py::object& position_ids) {
    const IndexedDataset::Rows to = rows_of(rows, inputs, targets, segments, position_ids);
    check_starts(positions, to);
    check_starts(offsets, to);
    const T* data = order.data();
    const auto length = static_cast<uint64_t>(order.size());
    const int64_t *at = positions.data(), *skip = offsets.data();
    py::gil_scoped_release released;
    return largest_of(self.read_ordered_rows(data, length, at, skip, to));
}

template <typename Doc, typename Row>
py::array sample_index_as(const uint8_t* sizes, int64_t num_sizes, const Array<Doc>& order, int64_t seq_length,
                          int64_t rows, int threads) {
    py::array_t<Row> out({static_cast<py::ssize_t>(rows), py::ssize_t{2}});
    const Doc* data = order.data();
    Row* to = out.mutable_data();
    const int64_t length = order.size();
    {
        py::gil_scoped_release released;
        fill_sample_index(sizes, num_sizes, data, length, seq_length, to, rows, threads);
    }
    return out;
}

// `sizes` may be an unaligned view of a mapped index, which numpy would copy to align it. The core reads it in place.
py::array sample_index(const py::array& sizes, const py::array& order, int64_t seq_length, int64_t rows, bool wide,
                       int threads) {
    if (!sizes.dtype().equal(py::dtype::of<int32_t>()) || sizes.ndim() != 1 ||
        (sizes.size() > 1 && sizes.strides(0) != 4))
        throw py::type_error("sizes must be a contiguous int32 array");
    if (rows < 0) throw py::value_error("rows must not be negative");
    const auto* data = static_cast<const uint8_t*>(sizes.data());
    if (order.dtype().itemsize() == 4) {
        const Array<int32_t> docs(order);
        return wide ? sample_index_as<int32_t, int64_t>(data, sizes.size(), docs, seq_length, rows, threads)
                    : sample_index_as<int32_t, int32_t>(data, sizes.size(), docs, seq_length, rows, threads);
    }
    const Array<int64_t> docs(order);
    return wide ? sample_index_as<int64_t, int64_t>(data, sizes.size(), docs, seq_length, rows, threads)
                : sample_index_as<int64_t, int32_t>(data, sizes.size(), docs, seq_length, rows, threads);
}

py::tuple blend_block(const Array<double>& weights, int64_t first, int64_t count, const Array<int64_t>& taken) {
    if (taken.size() != weights.size()) throw py::value_error("weights and taken must have the same length");
    if (count < 0 || first < 0) throw py::value_error("first and count must not be negative");
    py::array_t<int64_t> after(taken.size());
    std::copy(taken.data(), taken.data() + taken.size(), after.mutable_data());
    py::array_t<int32_t> dataset(count);
    py::array_t<int64_t> sample(count);
    {
        const double* weight_data = weights.data();
        const int64_t num_datasets = weights.size();
        int64_t* after_data = after.mutable_data();
        int32_t* dataset_data = dataset.mutable_data();
        int64_t* sample_data = sample.mutable_data();
        py::gil_scoped_release released;
        blend(weight_data, num_datasets, first, count, after_data, dataset_data, sample_data);
    }
    return py::make_tuple(dataset, sample, after);
}

void add_documents(IndexedWriter& writer, const py::array& tokens, const Array<int32_t>& sizes) {
    const bool fits = tokens.dtype().equal(py::dtype(writer.type().name)) && (tokens.flags() & py::array::c_style) != 0;
    if (!fits) throw py::type_error(std::string("tokens must be a contiguous array of ") + writer.type().name);
    const void* data = tokens.data();
    const auto count = static_cast<uint64_t>(tokens.size());
    const int32_t* size_data = sizes.data();
    const auto documents = static_cast<uint64_t>(sizes.size());
    py::gil_scoped_release released;
    writer.add_documents(data, count, size_data, documents);
}

// Fills `out` with the bytes of a file from `offset` and returns their XXH3.
uint64_t read_xxh3_into(int descriptor, uint64_t offset, const py::buffer& out) {
    const py::buffer_info info = out.request(true);
    const auto count = static_cast<uint64_t>(info.size * info.itemsize);
    HashedRead found;
    {
        py::gil_scoped_release released;
        found = read_xxh3(descriptor, offset, info.ptr, count);
    }
    if (found.error != 0) {
        errno = found.error;
        PyErr_SetFromErrno(PyExc_OSError);
        throw py::error_already_set();
    }
    if (found.bytes < count) {
        PyErr_SetString(PyExc_EOFError, "the file is shorter");
        throw py::error_already_set();
    }
    return found.hash;
}

int64_t first_outside_in(const Array<int64_t>& tokens, int64_t vocab_size) {
    const int64_t* data = tokens.data();
    const int64_t count = tokens.size();
    py::gil_scoped_release released;
    return first_outside(data, count, vocab_size);
}

// Position ids of each row.
void positions_of_rows(const Exact<int32_t>& segments, Exact<int64_t>& out) {
    if (segments.ndim() != 2 || out.ndim() != 2 || segments.shape(0) != out.shape(0) ||
        segments.shape(1) != out.shape(1))
        throw py::value_error("segments and out must be [rows, seq_length]");
    const int32_t* from = segments.data();
    int64_t* to = out.mutable_data();
    const py::ssize_t rows = segments.shape(0), length = segments.shape(1);
    py::gil_scoped_release released;
    for (py::ssize_t row = 0; row < rows; ++row) positions_in_segments(from + row * length, length, to + row * length);
}

void bind_dataset(py::module_& module) {
    py::class_<IndexedDataset>(module, "Dataset", "PREFIX.bin and PREFIX.idx, checked and memory-mapped")
        .def(py::init<const std::string&>(), py::arg("prefix"), NoGil())
        .def_property_readonly("dtype",
                               [](const IndexedDataset& self) { return std::string(self.index().type().name); })
        .def_property_readonly("num_sequences", [](const IndexedDataset& self) { return self.index().num_sequences(); })
        .def_property_readonly("num_documents", [](const IndexedDataset& self) { return self.index().num_documents(); })
        .def_property_readonly("num_tokens", [](const IndexedDataset& self) { return self.index().num_tokens(); })
        .def_property_readonly("sizes",
                               [](const py::object& self) {
                                   const auto& index = self.cast<const IndexedDataset&>().index();
                                   return view(py::dtype::of<int32_t>(), index.num_sequences(), index.sizes(), self);
                               })
        .def_property_readonly("documents",
                               [](const py::object& self) {
                                   const auto& index = self.cast<const IndexedDataset&>().index();
                                   return view(py::dtype::of<int64_t>(), index.num_documents() + 1, index.documents(),
                                               self);
                               })
        .def("sequence",
             [](const py::object& object, int64_t i) {
                 const auto& self = object.cast<const IndexedDataset&>();
                 const auto& index = self.index();
                 if (i < 0 || static_cast<uint64_t>(i) >= index.num_sequences())
                     throw py::index_error("sequence " + std::to_string(i) + " is out of range: the dataset has " +
                                           std::to_string(index.num_sequences()));
                 self.check_unchanged();
                 const auto size = static_cast<uint64_t>(index.size(static_cast<uint64_t>(i)));
                 const py::dtype dtype(index.type().name);
                 if (size == 0) return py::array(dtype, {py::ssize_t{0}}, {});
                 return view(dtype, size,
                             self.mapped_tokens() + index.first_token(static_cast<uint64_t>(i)) * index.type().bytes,
                             object);
             })
        .def("first_token",
             [](const IndexedDataset& self, int64_t sequence) {
                 return self.index().first_token(check_below(sequence, self.index().num_sequences(), "sequence"));
             })
        .def("first_token_of_document",
             [](const IndexedDataset& self, int64_t document) {
                 return self.index().first_token_of_document(
                     check_below(document, self.index().num_documents(), "document"));
             })
        .def("first_sequence",
             [](const IndexedDataset& self, int64_t document) {
                 return self.index().first_sequence(check_below(document, self.index().num_documents(), "document"));
             })
        .def("document_of_token",
             [](const IndexedDataset& self, int64_t token) {
                 if (token < 0 || static_cast<uint64_t>(token) >= self.index().num_tokens())
                     throw py::index_error("token " + std::to_string(token) + " is out of range");
                 return self.index().document_of_token(static_cast<uint64_t>(token));
             })
        .def("idx_checksum", &IndexedDataset::idx_checksum, NoGil())
        .def("check_unchanged", &IndexedDataset::check_unchanged)
        .def("guard", &IndexedDataset::guard, py::arg("block_bytes"), py::arg("sums"))
        .def("damaged_blocks", &IndexedDataset::damaged_blocks, NoGil())
        .def("find_bad_token", &IndexedDataset::find_bad_token, py::arg("vocab_size"), NoGil())
        .def("read", &read, py::arg("first"), py::arg("count"), py::arg("segments") = false)
        .def("read_rows", &read_rows, py::arg("firsts"), py::arg("rows"), py::arg("inputs").noconvert(),
             py::arg("targets"), py::arg("segments"), py::arg("position_ids"))
        .def("read_ordered_rows", &read_ordered_rows<int32_t>, py::arg("order").noconvert(), py::arg("positions"),
             py::arg("offsets"), py::arg("rows"), py::arg("inputs").noconvert(), py::arg("targets"),
             py::arg("segments"), py::arg("position_ids"))
        .def("read_ordered_rows", &read_ordered_rows<int64_t>, py::arg("order").noconvert(), py::arg("positions"),
             py::arg("offsets"), py::arg("rows"), py::arg("inputs").noconvert(), py::arg("targets"),
             py::arg("segments"), py::arg("position_ids"))
        .def("read_ordered", &read_ordered<int32_t>, py::arg("order").noconvert(), py::arg("position"),
             py::arg("offset"), py::arg("count"), py::arg("segments") = false)
        .def("read_ordered", &read_ordered<int64_t>, py::arg("order").noconvert(), py::arg("position"),
             py::arg("offset"), py::arg("count"), py::arg("segments") = false);
}

void bind_writer(py::module_& module) {
    py::class_<IndexedWriter>(module, "Writer", "Writer of PREFIX.bin and PREFIX.idx")
        .def(py::init<std::string, const std::string&, uint64_t>(), py::arg("prefix"), py::arg("dtype"),
             py::arg("block_bytes"))
        .def(py::init([](std::string prefix, const std::string& dtype, uint64_t block_bytes,
                         const std::tuple<uint64_t, uint64_t, int64_t>& resume) {
                 const auto [documents, tokens, largest] = resume;
                 return std::make_unique<IndexedWriter>(std::move(prefix), dtype, block_bytes,
                                                        WriterProgress{documents, tokens, largest});
             }),
             py::arg("prefix"), py::arg("dtype"), py::arg("block_bytes"), py::arg("resume"))
        .def("add_sequence",
             [](IndexedWriter& self, const Array<int64_t>& tokens) {
                 self.add_sequence(tokens.data(), static_cast<uint64_t>(tokens.size()));
             })
        .def("end_document", &IndexedWriter::end_document)
        .def("add_documents", &add_documents, py::arg("tokens"), py::arg("sizes"))
        .def("add_dataset", &IndexedWriter::add_dataset, NoGil())
        .def("finish", &IndexedWriter::finish, NoGil())
        .def(
            "sync",
            [](IndexedWriter& self) {
                const WriterProgress progress = self.sync();
                return py::make_tuple(progress.num_documents, progress.num_tokens, progress.largest_id);
            },
            "Make the partial files durable; returns the argument for `resume`")
        .def("keep", &IndexedWriter::keep)
        .def("abandon", &IndexedWriter::abandon)
        .def_property_readonly("dtype", [](const IndexedWriter& self) { return std::string(self.type().name); })
        .def_property_readonly("num_sequences", &IndexedWriter::num_sequences)
        .def_property_readonly("num_documents", &IndexedWriter::num_documents)
        .def_property_readonly("num_tokens", &IndexedWriter::num_tokens)
        .def_property_readonly("largest_id", &IndexedWriter::largest_id)
        .def_property_readonly("block_sums", &IndexedWriter::block_sums);
}

}  // namespace
}  // namespace neox::data

PYBIND11_MODULE(_data, module) {
    using namespace neox::data;
    module.doc() = "Dataset core: indexed datasets, sample order, blending, checksums";
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const Fault& fault) {
            raise_fault(fault);
        }
    });
    bind_dataset(module);
    bind_writer(module);
    bind_text(module);
    bind_corpus(module);
    module.def("sample_index", &sample_index, py::arg("sizes"), py::arg("order"), py::arg("seq_length"),
               py::arg("rows"), py::arg("wide"), py::arg("threads") = 1);
    module.def("epochs_needed", &epochs_needed, py::arg("tokens_per_epoch"), py::arg("seq_length"),
               py::arg("num_samples"));
    module.def("blend", &blend_block, py::arg("weights"), py::arg("first"), py::arg("count"), py::arg("taken"));
    module.def("permute", &permute, py::arg("key"), py::arg("size"), py::arg("value"));
    module.def("mix", &mix, py::arg("key"), py::arg("value"));
    module.def("positions_in_segments", &positions_of_rows, py::arg("segments").noconvert(),
               py::arg("out").noconvert());
    module.def("first_outside", &first_outside_in, py::arg("tokens"), py::arg("vocab_size"));
    module.def("checksum", [](const py::buffer& buffer) {
        const py::buffer_info info = buffer.request();
        py::gil_scoped_release released;
        return checksum(info.ptr, static_cast<uint64_t>(info.size * info.itemsize));
    });
    module.def("xxh3", [](const py::buffer& buffer) {
        const py::buffer_info info = buffer.request();
        py::gil_scoped_release released;
        return xxh3(info.ptr, static_cast<uint64_t>(info.size * info.itemsize));
    });
    module.def("start_writeback", &start_writeback, py::arg("descriptor"), py::arg("offset"), py::arg("count"),
               NoGil());
    module.def("read_xxh3", &read_xxh3_into, py::arg("descriptor"), py::arg("offset"), py::arg("out"));
    module.def("file_checksum", &file_checksum, py::arg("path"), NoGil());
    module.def("file_block_checksums", &file_block_checksums, py::arg("path"), py::arg("block_bytes"), NoGil());
    py::class_<EpochOrder>(module, "EpochOrder",
                           "Sample order over unbounded epochs: a pure function of key and sample number")
        .def(py::init([](uint64_t key, uint64_t num_tokens, uint64_t seq_length) {
                 if (seq_length == 0 || num_tokens <= seq_length)
                     throw py::value_error("fewer tokens than one sample needs");
                 return EpochOrder{key, num_tokens, seq_length};
             }),
             py::arg("key"), py::arg("num_tokens"), py::arg("seq_length"))
        .def_property_readonly("samples_per_epoch", &EpochOrder::samples_per_epoch)
        .def("first_token", &EpochOrder::first_token, py::arg("sample"))
        .def(
            "first_tokens",
            [](const EpochOrder& self, const Array<int64_t>& samples) {
                py::array_t<int64_t> out(samples.size());
                for (py::ssize_t i = 0; i < samples.size(); ++i)
                    out.mutable_data()[i] =
                        static_cast<int64_t>(self.first_token(check_below(samples.data()[i], INT64_MAX, "sample")));
                return out;
            },
            py::arg("samples"));
}
