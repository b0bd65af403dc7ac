// A corpus of inputs for a random test, kept in corpus/NAME.hex: one input per line, in hexadecimal. It is replayed before anything is drawn, and
// what is drawn begins with one of its inputs as often as not.
//
// An input joins it when it reaches a step in the code under test (one basic block after another) that none before it has reached: the sanitized
// variant is compiled with -fsanitize-coverage=trace-pc, whose hook is in coverage.cpp. With NEOX_CORPUS_KEEP=1 the file is written anew at the end,
// an input that the ones after it make superfluous left out. The plain variant replays and keeps nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "coverage.h"

namespace data_test {

using Bytes = std::vector<uint8_t>;

class Corpus {
  public:
    using Run = std::function<void(const Bytes&)>;

    // Reads the file and runs all its inputs.
    Corpus(const std::string& name, const Run& run) : path_(std::string(NEOX_CORPUS_FOLDER "/") + name + ".hex"), run_(run), known_(kSteps) {
        std::ifstream file(path_);
        for (std::string line; std::getline(file, line);) {
            Bytes input;
            for (size_t i = 0; i + 1 < line.size(); i += 2) input.push_back(static_cast<uint8_t>(std::stoul(line.substr(i, 2), nullptr, 16)));
            inputs_.push_back(input);
            try_input(input);
        }
        replayed_ = inputs_.size();
    }

    size_t replayed() const { return replayed_; }
    const std::vector<Bytes>& inputs() const { return inputs_; }

    // Runs an input, and takes it in if it reaches something new.
    void operator()(const Bytes& input) {
        if (try_input(input) && input.size() <= kLongest) inputs_.push_back(input);
    }

    // Writes the file where that is asked for: short inputs first, those that add nothing to them left out.
    void keep() {
        if (!std::getenv("NEOX_CORPUS_KEEP")) return;
        std::fill(known_.begin(), known_.end(), 0);
        std::sort(inputs_.begin(), inputs_.end(), [](const Bytes& a, const Bytes& b) { return a.size() != b.size() ? a.size() < b.size() : a < b; });
        std::ofstream file(path_);
        size_t kept = 0;
        for (const Bytes& input : inputs_) {
            if (!try_input(input)) continue;
            for (const uint8_t byte : input) {
                char digits[3];
                std::snprintf(digits, sizeof digits, "%02x", byte);
                file << digits;
            }
            file << "\n";
            ++kept;
        }
        std::printf("%zu inputs in %s\n", kept, path_.c_str());
    }

  private:
    static constexpr size_t kLongest = 4096;

    bool try_input(const Bytes& input) {
        std::fill_n(steps_taken, kSteps, uint8_t{0});
        run_(input);
        bool fresh = false;
        for (size_t i = 0; i < kSteps; ++i) {
            if (steps_taken[i] && !known_[i]) known_[i] = 1, fresh = true;
        }
        return fresh;
    }

    std::string path_;
    Run run_;
    std::vector<uint8_t> known_;
    std::vector<Bytes> inputs_;
    size_t replayed_ = 0;
};

}  // namespace data_test
