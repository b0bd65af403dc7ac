// What the asynchronous units (async.cpp, wgmma.cpp) and the scheduler (simt.cpp) use of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "async.h"

namespace simt {

void suspend(const char* what);  // the running thread waits until resume(its index)
void resume(int thread);

// The host's address of a 32-bit address in shared memory, the inverse of window_address(). The bytes must exist.
char* window_data(uint32_t address, size_t bytes, const char* what);

namespace async {

void begin_block(int num_threads);
bool land_one();              // one part of a bulk copy, chosen at random; false if none is in flight
std::string open_barriers();  // the mbarriers at which threads wait, for a message
// What a thread leaves in flight at its exit, for a message; empty if nothing. `last`: it is the last one of the block.
std::string in_flight_at_exit(int thread, bool last);

}  // namespace async

namespace wgmma {

void begin_block(int num_threads);
std::string in_flight_at_exit(int thread);

}  // namespace wgmma
}  // namespace simt
