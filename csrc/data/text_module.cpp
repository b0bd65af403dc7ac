// neox._data.TextEncoder: encodes text and JSON lines, on any number of threads.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "data/bindings.h"
#include "data/clones.h"
#include "data/encode_threads.h"
#include "data/merges_module.h"

namespace py = pybind11;

namespace neox::data {
namespace {

const uint8_t* as_bytes(std::string_view bytes) { return reinterpret_cast<const uint8_t*>(bytes.data()); }

struct Encoder {
    TextEncoder encoder;
    bool wide;
};

// A numpy array over `data`, which is part of `*owner`.
template <typename Owner>
py::array array_of(const std::string& dtype, uint64_t count, const void* data, std::shared_ptr<Owner> owner) {
    const py::capsule keep(new std::shared_ptr<Owner>(std::move(owner)),
                           [](void* held) { delete static_cast<std::shared_ptr<Owner>*>(held); });
    return py::array(py::dtype(dtype), {static_cast<py::ssize_t>(count)}, data, keep);
}

// A chunk that is being encoded, and the bytes it reads.
class Started {
  public:
    Started(EncodeThreads& threads, py::bytes content, std::shared_ptr<EncodedChunk> chunk, bool wide)
        : threads_(threads), content_(std::move(content)), chunk_(std::move(chunk)), wide_(wide) {}
    ~Started() { threads_.drop(*chunk_); }  // waiting with the interpreter lock is safe: the threads never need it
    Started(const Started&) = delete;
    Started& operator=(const Started&) = delete;

    bool done() { return threads_.done(*chunk_); }

    py::object result() {
        {
            py::gil_scoped_release released;
            threads_.wait(*chunk_);
        }
        if (!chunk_->valid) return py::none();
        py::list unsure;
        for (const UnsureLine& line : chunk_->unsure)
            unsure.append(py::make_tuple(line.first, line.last, line.line, line.document));
        const py::array tokens = array_of(wide_ ? "int32" : "uint16", chunk_->count, chunk_->tokens.get(), chunk_);
        return py::make_tuple(tokens, array_of("int32", chunk_->sizes.size(), chunk_->sizes.data(), chunk_),
                              chunk_->blank, chunk_->empty, unsure);
    }

  private:
    EncodeThreads& threads_;
    py::bytes content_;
    std::shared_ptr<EncodedChunk> chunk_;
    bool wide_;
};

class Threads {
  public:
    Threads(const Encoder& encoder, int count) : threads_(encoder.encoder, encoder.wide, count), wide_(encoder.wide) {}

    std::unique_ptr<Started> start(const py::bytes& content, ChunkKind kind, LineOptions options) {
        const std::string_view bytes = content;
        std::shared_ptr<EncodedChunk> chunk;
        {
            py::gil_scoped_release released;  // without threads the work is done here
            chunk = threads_.start(as_bytes(bytes), bytes.size(), kind, std::move(options));
        }
        return std::make_unique<Started>(threads_, content, std::move(chunk), wide_);
    }

    void close() { threads_.close(); }

  private:
    EncodeThreads threads_;
    bool wide_;
};

SplitPattern pattern_of(const std::string& name) {
    if (name == "gpt2") return SplitPattern::gpt2;
    if (name == "llama") return SplitPattern::llama;
    if (name == "qwen") return SplitPattern::qwen;
    throw py::value_error("unknown split pattern " + name);
}

NEOX_CLONES int64_t count_byte(const char* bytes, size_t count, char wanted) {
    int64_t found = 0;
    for (size_t i = 0; i < count;) {
        uint8_t few = 0;  // counts up to 255 bytes, so that it fits a byte lane
        for (const size_t end = std::min(count, i + 255); i < end; ++i)
            few = static_cast<uint8_t>(few + (bytes[i] == wanted));
        found += few;
    }
    return found;
}

}  // namespace

void bind_text(py::module_& module) {
    using Added = std::tuple<std::string, uint32_t, bool, bool>;
    py::class_<Encoder>(module, "TextEncoder", "Byte-level BPE: the ids of `tokenizers`")
        .def(py::init([](const std::u32string& letters, const py::dict& vocab, const py::list& merges,
                         const std::string& pattern, bool normalise, const std::vector<Added>& added,
                         std::unordered_map<std::string, uint32_t> whole, bool wide) {
                 Merges found = read_merges(letters, vocab, merges);
                 BytePairs pairs(std::move(found.byte_ids), found.left, found.right, std::move(found.merged));
                 pairs.set_word_tokens(std::move(whole));
                 std::vector<AddedToken> tokens;
                 for (const auto& [text, id, normalized, ignored] : added)
                     tokens.push_back({text, id, normalized, ignored});
                 return std::make_unique<Encoder>(
                     Encoder{TextEncoder(std::move(pairs), pattern_of(pattern), normalise, tokens), wide});
             }),
             py::arg("letters"), py::arg("vocab"), py::arg("merges"), py::arg("pattern"), py::arg("normalise"),
             py::arg("added"), py::arg("whole"), py::arg("wide"));
    py::class_<Started>(module, "Started", "A chunk that is being encoded")
        .def_property_readonly("done", &Started::done, "Whether `result` returns without waiting")
        .def("result", &Started::result,
             "Wait for (tokens, sizes, blank lines, empty texts, lines that need the full parser as [(first byte, end "
             "byte, line, next document)]); "
             "None for a text that is not UTF-8");
    py::class_<Threads>(module, "EncodeThreads",
                        "Threads that encode chunks in the order of their start, without the interpreter lock")
        .def(py::init<const Encoder&, int>(), py::arg("encoder"), py::arg("threads"), py::keep_alive<1, 2>(),
             "With 0 threads, `lines` and `text` encode before they return")
        .def(
            "lines",
            [](Threads& threads, const py::bytes& content, const std::string& key, int64_t eod, int64_t bos) {
                return threads.start(content, ChunkKind::lines, {key, eod, bos});
            },
            py::arg("content"), py::arg("key"), py::arg("eod"), py::arg("bos") = -1, py::keep_alive<0, 1>(),
            "Start JSON lines. eod, bos: ids appended and prepended to each document; -1 for none")
        .def(
            "text",
            [](Threads& threads, const py::bytes& content, int64_t eod, int64_t bos) {
                return threads.start(content, ChunkKind::text, {{}, eod, bos});
            },
            py::arg("content"), py::arg("eod"), py::arg("bos") = -1, py::keep_alive<0, 1>(),
            "Start one text; see `lines`")
        .def("close", &Threads::close, py::call_guard<py::gil_scoped_release>(),
             "Cancel the chunks that have not begun, wait for the others, and end the threads");
    module.def(
        "count_lines",
        [](const py::bytes& content) {
            const std::string_view bytes = content;
            return count_byte(bytes.data(), bytes.size(), '\n');
        },
        py::arg("content"), "Number of line feeds");
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
        py::arg("text"), py::arg("pattern"), "Words of a text by a split pattern");
}

}  // namespace neox::data
