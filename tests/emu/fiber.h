// Stackful coroutines: 15 instructions per switch on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

// A stack and the saved registers of its code. The entry function must not return; it ends by switching away.
class Fiber {
  public:
    Fiber() = default;
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    Fiber(Fiber&& other) noexcept;
    ~Fiber();

    // The next switch to this fiber will call entry() on a fresh stack of `stack_bytes`, with a guard page below.
    void prepare(void (*entry)(), size_t stack_bytes);
    // Suspends `from`, which must be running, and resumes `to`. `last`: `from` never runs again.
    static void switch_to(Fiber& from, Fiber& to, bool last);
    // Must be the first statement of an entry function.
    static void entered(Fiber& self, Fiber& creator);

  private:
    void* stack_pointer_ = nullptr;
    char* stack_ = nullptr;
    bool owns_stack_ = false;  // false for the stack of the OS thread
    size_t stack_bytes_ = 0;
    void* asan_frames_ = nullptr;
#if !defined(__x86_64__)
    ucontext_t context_;
#endif
};

}  // namespace simt
