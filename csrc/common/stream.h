// A CUDA stream as the torch-free interfaces pass it: a cudaStream_t, or null in the emulator.
#pragma once

namespace neox {

using Stream = void*;

}  // namespace neox
