// What the asynchronous units (async.cpp, wgmma.cpp) and the scheduler (simt.cpp) use of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

void suspend(const char* what);  // the running thread waits until resume(its index)
void resume(int thread);

// Addresses in the block's window of shared memory, 32 bits as on the GPU. They name existing bytes, or the launch ends
// with an error.
uint32_t window_address(const void* address, size_t bytes, const char* what);
char* window_data(uint32_t address, size_t bytes, const char* what);

namespace async {

void begin_block(int num_threads);
bool land_one();  // one part of a bulk copy, chosen at random; false if none is in flight
std::string open_barriers();
// What a thread must not leave in flight when it exits, for a message; empty if nothing. `last`: it is the last thread
// of the block.
std::string in_flight_at_exit(int thread, bool last);

}  // namespace async

namespace wgmma {

void begin_block(int num_threads);
std::string in_flight_at_exit(int thread);

}  // namespace wgmma
}  // namespace simt
