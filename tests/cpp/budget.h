// The length of a random test: the first argument is a number of cases, or of seconds with the suffix s (600s); the
// second is the seed.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace data_test {

class Budget {
  public:
    Budget(int count, char** arguments, uint64_t cases)
        : cases_(cases), seed_(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1) {
        if (count < 2) return;
        const std::string limit = arguments[1];
        const uint64_t number = std::strtoull(limit.c_str(), nullptr, 10);
        limit.back() == 's' ? seconds_ = static_cast<double>(number) : cases_ = number;
    }
    uint64_t seed() const { return seed_; }
    uint64_t done() const { return done_; }
    double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
    // Whether another case is to be run.
    bool next() {
        if (seconds_ > 0 ? done_ % 256 == 0 && seconds() >= seconds_ : done_ >= cases_) return false;
        return ++done_, true;
    }

  private:
    uint64_t cases_, seed_, done_ = 0;
    double seconds_ = 0;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace data_test
