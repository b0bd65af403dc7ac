// The exception of the dataset core: the fields of the one-line error format (neox/errors.py), filled in where the
// error is detected.
#pragma once

#include <stdexcept>
#include <string>

namespace neox::data {

enum class FaultKind { data, disk };

struct Fault : std::runtime_error {
    FaultKind kind = FaultKind::data;
    std::string where, got, want, action;  // an empty field is left out of the message

    explicit Fault(const std::string& what) : std::runtime_error(what) {}
    Fault& at(std::string value) { return where = std::move(value), *this; }
    Fault& found(std::string value) { return got = std::move(value), *this; }
    Fault& expected(std::string value) { return want = std::move(value), *this; }
    Fault& advise(std::string value) { return action = std::move(value), *this; }
    Fault& on_disk() { return kind = FaultKind::disk, *this; }
};

}  // namespace neox::data
