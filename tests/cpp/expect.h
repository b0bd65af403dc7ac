// Checks of the dataset core's tests, and a temporary folder for each test.
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <type_traits>
#include <vector>

#include "data/fault.h"
#include "tally.h"

namespace data_test {

using native_test::tally;

template <class T>
std::string show(const T& value) {
    if constexpr (std::is_arithmetic_v<T>)
        return std::to_string(value);
    else if constexpr (std::is_convertible_v<T, std::string>)
        return value;
    else
        return "?";
}

// The fields of the Fault that a call throws; empty if it succeeds.
template <class Call>
std::string fault_of(const Call& call) {
    try {
        call();
    } catch (const neox::data::Fault& fault) {
        return std::string(fault.what()) + "; where=" + fault.where + "; got=" + fault.got + "; want=" + fault.want +
               "; do=" + fault.action + (fault.kind == neox::data::FaultKind::disk ? "; disk" : "");
    }
    return "";
}

// A temporary folder, removed with its content.
class Folder {
  public:
    Folder() {
        std::string name = (std::filesystem::temp_directory_path() / "neox_data_XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr) std::perror("mkdtemp"), std::exit(2);
        path_ = name;
    }
    ~Folder() { std::filesystem::remove_all(path_); }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    std::string operator/(const std::string& name) const { return path_ + "/" + name; }
    size_t num_files() const {
        return static_cast<size_t>(
            std::distance(std::filesystem::directory_iterator(path_), std::filesystem::directory_iterator()));
    }

  private:
    std::string path_;
};

inline std::vector<uint8_t> content_of(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline void put(const std::string& path, const std::vector<uint8_t>& content) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
}

}  // namespace data_test

#define EXPECT_EQ(got, want)                                                                  \
    do {                                                                                      \
        const auto got_ = (got);                                                              \
        const decltype(got_) want_ = (want);                                                  \
        data_test::tally.check(got_ == want_, #got " == " #want, __FILE__, __LINE__,          \
                               data_test::show(got_) + " and not " + data_test::show(want_)); \
    } while (0)
#define EXPECT_FAULT(call, word)                                                                                       \
    do {                                                                                                               \
        const std::string message_ = data_test::fault_of([&] { call; });                                               \
        data_test::tally.check(message_.find(word) != std::string::npos, "the fault names " #word, __FILE__, __LINE__, \
                               "\"" + message_ + "\"");                                                                \
    } while (0)
