// Parts of neox._data that are bound in separate files.
#pragma once

#include <pybind11/pybind11.h>

namespace neox::data {

void bind_text(pybind11::module_& module);
void bind_corpus(pybind11::module_& module);

}  // namespace neox::data
