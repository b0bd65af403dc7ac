// neox._data: packing, and passes over a complete corpus.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>

#include "data/bindings.h"
#include "data/document_statistics.h"
#include "data/indexed_dataset.h"
#include "data/packing.h"

namespace py = pybind11;

namespace neox::data {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

py::array_t<int64_t> array_of(const std::vector<int64_t>& values) {
    py::array_t<int64_t> out(static_cast<py::ssize_t>(values.size()));
    std::memcpy(out.mutable_data(), values.data(), values.size() * sizeof(int64_t));
    return out;
}

py::tuple best_fit_arrays(const Array<int32_t>& sizes, int64_t capacity) {
    Packing packing;
    {
        const int32_t* data = sizes.data();
        const int64_t count = sizes.size();
        py::gil_scoped_release released;
        packing = best_fit(data, count, capacity);
    }
    return py::make_tuple(array_of(packing.order), array_of(packing.starts));
}

// The tokens of several spans, concatenated.
py::array_t<int64_t> read_spans(const IndexedDataset& dataset, const Array<int64_t>& firsts,
                                const Array<int64_t>& counts) {
    if (firsts.size() != counts.size()) throw py::value_error("firsts and counts must have the same length");
    uint64_t total = 0;
    for (py::ssize_t i = 0; i < counts.size(); ++i) {
        if (firsts.data()[i] < 0 || counts.data()[i] < 0 ||
            static_cast<uint64_t>(counts.data()[i]) > dataset.index().num_tokens())
            throw py::index_error("span " + std::to_string(i) + " is out of range");
        total += static_cast<uint64_t>(counts.data()[i]);
    }
    py::array_t<int64_t> out(static_cast<py::ssize_t>(total));
    int64_t* to = out.mutable_data();
    const int64_t *from = firsts.data(), *count = counts.data();
    const py::ssize_t spans = firsts.size();
    py::gil_scoped_release released;
    for (py::ssize_t i = 0; i < spans; to += count[i++])
        dataset.read(static_cast<uint64_t>(from[i]), static_cast<uint64_t>(count[i]), to, nullptr);
    return out;
}

py::tuple statistics_of_documents(const IndexedDataset& dataset, int64_t first, int64_t last, int64_t eod) {
    if (first < 0 || last < first || static_cast<uint64_t>(last) > dataset.index().num_documents())
        throw py::index_error("documents are out of range");
    py::array_t<uint64_t> hashes(static_cast<py::ssize_t>(last - first));
    uint64_t* to = hashes.mutable_data();
    DocumentStatistics found;
    {
        py::gil_scoped_release released;
        found = document_statistics(dataset, static_cast<uint64_t>(first), static_cast<uint64_t>(last), eod, to);
    }
    const bool any = found.smallest <= found.largest;
    const auto id = [&](int64_t value) -> py::object {
        return any ? py::object(py::int_(value)) : py::object(py::none());
    };
    return py::make_tuple(id(found.smallest), id(found.largest), found.eod_tokens, found.ended, hashes);
}

}  // namespace

void bind_corpus(py::module_& module) {
    module.def("best_fit", &best_fit_arrays, py::arg("sizes"), py::arg("capacity"),
               "(order, starts) of the samples, see packing.h");
    module.def("read_spans", &read_spans, py::arg("dataset"), py::arg("firsts"), py::arg("counts"));
    module.def("document_statistics", &statistics_of_documents, py::arg("dataset"), py::arg("first"), py::arg("last"),
               py::arg("eod"),
               "(smallest id, largest id, eod tokens, documents that end in eod, hash of each document)");
}

}  // namespace neox::data
