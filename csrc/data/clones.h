// NEOX_CLONES before a function: compiled for several instruction sets, the best one chosen when the library is loaded.
// Sanitizers are not ready at that time, so they get the plain function; so do other compilers and processors.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define NEOX_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define NEOX_CLONES
#endif
