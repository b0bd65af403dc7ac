#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {
constexpr size_t kGuard = 4096;
}

#if defined(__x86_64__)
// switch_stack(save: rdi, load: rsi): pushes the callee-saved registers on the old stack and pops them from the new
// one.
asm(R"(.text
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
)");
extern "C" void simt_switch_stack(void** save, void* load);
#endif

Fiber::Fiber(Fiber&& other) noexcept
    : stack_pointer_(other.stack_pointer_),
      stack_(other.stack_),
      owns_stack_(std::exchange(other.owns_stack_, false)),
      stack_bytes_(other.stack_bytes_),
      asan_frames_(other.asan_frames_) {}

Fiber::~Fiber() {
    if (owns_stack_) munmap(stack_ - kGuard, stack_bytes_ + kGuard);
}

void Fiber::prepare(void (*entry)(), size_t stack_bytes) {
    if (!stack_) {
        void* const memory = mmap(nullptr, stack_bytes + kGuard, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of an emulated thread");
        mprotect(memory, kGuard, PROT_NONE);
        stack_ = static_cast<char*>(memory) + kGuard;
        stack_bytes_ = stack_bytes;
        owns_stack_ = true;
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, stack_bytes_);  // the previous thread left it without unwinding
    asan_frames_ = nullptr;
#endif
#if defined(__x86_64__)
    auto** top = reinterpret_cast<void**>(stack_ + stack_bytes_ - 64);
    *--top = nullptr;  // at entry rsp % 16 == 8, as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers popped by the switch
    stack_pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = stack_bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
    stack_pointer_ = stack_;
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.asan_frames_, to.stack_, to.stack_bytes_);
#endif
#if defined(__x86_64__)
    simt_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.asan_frames_, nullptr, nullptr);
#endif
}

void Fiber::entered([[maybe_unused]] Fiber& self, [[maybe_unused]] Fiber& creator) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    if (!creator.stack_bytes_) {  // the first fiber records the bounds of the OS thread's stack
        creator.stack_ = static_cast<char*>(const_cast<void*>(stack));
        creator.stack_bytes_ = bytes;
    }
#endif
}

}  // namespace simt
