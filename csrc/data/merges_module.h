// The merges of a `tokenizers` file as ids. In Python this takes longer than encoding a megabyte of text.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace neox::data {

// Merge r turns (left[r], right[r]) into merged[r]. byte_ids: id of each of the 256 bytes, BytePairs::kNone if the
// vocabulary lacks it.
struct Merges {
    std::vector<uint32_t> byte_ids, left, right, merged;
};

// Reads a byte-level vocabulary (text of a token -> id) and its merges, "left right" or [left, right]; `letters` stand
// for the 256 bytes. Throws value_error or type_error for what csrc/data does not support: a UTF-8 byte without a
// token, a merge of unknown tokens, an id that is too large.
Merges read_merges(const std::u32string& letters, const pybind11::dict& vocab, const pybind11::list& merges);

}  // namespace neox::data
