// A CUDA stream in interfaces without CUDA headers: a cudaStream_t, or null in the emulator.
#pragma once

namespace neox {

using Stream = void*;

}  // namespace neox
