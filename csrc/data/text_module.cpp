// neox._data.TextEncoder: text and JSON lines to ids, on any number of threads at a time.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string_view>
#include <unordered_map>

#include "data/bindings.h"
#include "data/clones.h"
#include "data/line_encoder.h"

namespace py = pybind11;

namespace neox::data {
namespace {

using Numbers = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

class Encoder {
  public:
    Encoder(TextEncoder encoder, bool wide) : encoder_(std::move(encoder)), wide_(wide) {}

    // (tokens, sizes, blank, empty, unsure): see `bind_text`.
    py::tuple lines(const py::bytes& content, const std::string& key, int64_t eod) {
        const std::string_view bytes = content;
        Borrowed state(states_);
        {
            py::gil_scoped_release released;
            encode_lines(encoder_, as_bytes(bytes), bytes.size(), {key, eod}, *state);
        }
        py::list unsure;
        for (const UnsureLine& line : state->unsure) unsure.append(py::make_tuple(line.first, line.last, line.line, line.document));
        return py::make_tuple(tokens(*state), sizes(*state), state->blank, state->empty, unsure);
    }

    // (tokens, sizes), or None where the text is not UTF-8.
    py::object text(const py::bytes& content, int64_t eod) {
        const std::string_view bytes = content;
        Borrowed state(states_);
        bool valid;
        {
            py::gil_scoped_release released;
            valid = encode_text(encoder_, as_bytes(bytes), bytes.size(), eod, *state);
        }
        if (!valid) return py::none();
        return py::make_tuple(tokens(*state), sizes(*state));
    }

  private:
    class Borrowed {
      public:
        explicit Borrowed(LineStates& states) : states_(states), state_(states.take()) { state_->clear(); }
        ~Borrowed() { states_.give_back(std::move(state_)); }
        LineState& operator*() { return *state_; }
        LineState* operator->() { return state_.get(); }

      private:
        LineStates& states_;
        std::unique_ptr<LineState> state_;
    };

    static const uint8_t* as_bytes(std::string_view bytes) { return reinterpret_cast<const uint8_t*>(bytes.data()); }

    template <typename T>
    static py::array narrowed(LineState& state) {
        py::array_t<T> out(static_cast<py::ssize_t>(state.ids.size()));
        T* to = out.mutable_data();
        const uint32_t* from = state.ids.begin();
        const uint64_t count = state.ids.size();
        {
            py::gil_scoped_release released;
            for (uint64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
        }
        return out;
    }

    py::array tokens(LineState& state) const { return wide_ ? narrowed<int32_t>(state) : narrowed<uint16_t>(state); }

    static py::array sizes(const LineState& state) {
        py::array_t<int32_t> out(static_cast<py::ssize_t>(state.sizes.size()));
        std::copy(state.sizes.begin(), state.sizes.end(), out.mutable_data());
        return out;
    }

    TextEncoder encoder_;
    bool wide_;
    LineStates states_;
};

SplitPattern pattern_of(const std::string& name) {
    if (name == "gpt2") return SplitPattern::gpt2;
    if (name == "llama") return SplitPattern::llama;
    if (name == "qwen") return SplitPattern::qwen;
    throw py::value_error("unknown split pattern " + name);
}

std::string_view utf8(const py::handle& text) {
    Py_ssize_t length = 0;
    const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &length);
    if (bytes == nullptr) throw py::error_already_set();
    return {bytes, static_cast<size_t>(length)};
}

// Ids of the two sides and of the result of every merge: "left right", or [left, right]. Python would take longer for this than for a megabyte of text.
py::tuple merge_ids(const py::dict& vocab, const py::list& merges) {
    std::unordered_map<std::string_view, uint32_t> ids;
    ids.reserve(2 * vocab.size());
    for (const auto& [token, id] : vocab) ids.emplace(utf8(token), id.cast<uint32_t>());
    py::array_t<uint32_t> out[3];
    for (auto& array : out) array = py::array_t<uint32_t>(static_cast<py::ssize_t>(merges.size()));
    uint32_t* to[3] = {out[0].mutable_data(), out[1].mutable_data(), out[2].mutable_data()};
    std::string result;
    for (size_t r = 0; r < merges.size(); ++r) {
        const py::handle merge = PyList_GET_ITEM(merges.ptr(), static_cast<Py_ssize_t>(r));
        std::string_view parts[3];
        if (PyUnicode_Check(merge.ptr())) {
            const std::string_view both = utf8(merge);
            const size_t space = both.find(' ');
            if (space == std::string_view::npos) throw py::value_error("merge " + std::string(both) + " has no space");
            parts[0] = both.substr(0, space), parts[1] = both.substr(space + 1);
        } else {
            const auto pair = py::cast<py::sequence>(merge);
            if (pair.size() != 2) throw py::value_error("merge " + std::to_string(r) + " is not a pair");
            parts[0] = utf8(pair[0]), parts[1] = utf8(pair[1]);
        }
        parts[2] = result.assign(parts[0]).append(parts[1]);
        for (int side = 0; side < 3; ++side) {
            const auto found = ids.find(parts[side]);
            if (found == ids.end()) throw py::value_error("merge " + std::to_string(r) + ": " + std::string(parts[side]) + " is not in the vocabulary");
            to[side][r] = found->second;
        }
    }
    return py::make_tuple(out[0], out[1], out[2]);
}

NEOX_CLONES int64_t count_byte(const char* bytes, size_t count, char wanted) {
    int64_t found = 0;
    for (size_t i = 0; i < count;) {
        uint8_t few = 0;  // of up to 255 bytes, so that lanes of bytes hold it
        for (const size_t end = std::min(count, i + 255); i < end; ++i) few = static_cast<uint8_t>(few + (bytes[i] == wanted));
        found += few;
    }
    return found;
}

std::vector<uint32_t> vector_of(const Numbers& numbers) { return {numbers.data(), numbers.data() + numbers.size()}; }

}  // namespace

void bind_text(py::module_& module) {
    using Added = std::tuple<std::string, uint32_t, bool, bool>;
    py::class_<Encoder>(module, "TextEncoder", "Byte-level BPE: the ids of `tokenizers`")
        .def(py::init([](const Numbers& byte_ids, const Numbers& left, const Numbers& right, const Numbers& merged, const std::string& pattern, bool normalise,
                         const std::vector<Added>& added, std::unordered_map<std::string, uint32_t> whole, bool wide) {
                 BytePairs pairs(vector_of(byte_ids), vector_of(left), vector_of(right), vector_of(merged));
                 pairs.take_whole(std::move(whole));
                 std::vector<AddedToken> tokens;
                 for (const auto& [text, id, normalized, ignored] : added) tokens.push_back({text, id, normalized, ignored});
                 return std::make_unique<Encoder>(TextEncoder(std::move(pairs), pattern_of(pattern), normalise, tokens), wide);
             }),
             py::arg("byte_ids"), py::arg("left"), py::arg("right"), py::arg("merged"), py::arg("pattern"), py::arg("normalise"), py::arg("added"),
             py::arg("whole"), py::arg("wide"))
        .def("lines", &Encoder::lines, py::arg("content"), py::arg("key"), py::arg("eod"),
             "Encode JSON lines: (tokens, sizes, blank lines, empty texts, [(first byte, last byte, line, document before which it stands)] of lines that "
             "need the full parser)")
        .def("text", &Encoder::text, py::arg("content"), py::arg("eod"), "Encode one text: (tokens, sizes), or None where it is not UTF-8");
    module.def(
        "count_lines",
        [](const py::bytes& content) {
            const std::string_view bytes = content;
            return count_byte(bytes.data(), bytes.size(), '\n');
        },
        py::arg("content"), "Line feeds in some bytes");
    module.def("merge_ids", &merge_ids, py::arg("vocab"), py::arg("merges"), "(left, right, merged): the ids that each merge of a BPE model is about");
    module.def(
        "nfc",
        [](const std::string& text) {
            std::string out;
            append_nfc(reinterpret_cast<const uint8_t*>(text.data()), text.size(), out);
            return out;
        },
        py::arg("text"), "Normalisation form C");
    module.def(
        "split_words",
        [](const std::string& text, const std::string& pattern) {
            std::string padded = text;
            padded.append(kPadding, '\0');
            const auto* at = reinterpret_cast<const uint8_t*>(padded.data());
            py::list words;
            WordSplitter(pattern_of(pattern)).split(at, at + text.size(), [&](const uint8_t* word, uint64_t length) {
                words.append(py::str(reinterpret_cast<const char*>(word), length));
            });
            return words;
        },
        py::arg("text"), py::arg("pattern"), "The words that a split pattern cuts a text into");
}

}  // namespace neox::data
