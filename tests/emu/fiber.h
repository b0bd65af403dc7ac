// Stackful coroutines: 15 instructions a switch on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

// One stack and the registers of what runs on it. The entry function must not return: it switches away for good.
class Fiber {
  public:
    Fiber() = default;
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    Fiber(Fiber&& other) noexcept;
    ~Fiber();

    // Makes the next switch to this fiber call entry() on a fresh stack of `stack_bytes`, with a guard page below.
    void prepare(void (*entry)(), size_t stack_bytes);
    // Suspends `from`, which must be running, and runs `to`. `last`: from never runs again.
    static void switch_to(Fiber& from, Fiber& to, bool last);
    // First statement of an entry function.
    static void entered(Fiber& self, Fiber& creator);

  private:
    void* stack_pointer_ = nullptr;
    char* stack_ = nullptr;
    bool owns_stack_ = false;  // false: this is the stack that the OS thread came with
    size_t stack_bytes_ = 0;
    void* asan_frames_ = nullptr;
#if !defined(__x86_64__)
    ucontext_t context_;
#endif
};

}  // namespace simt
