// NEOX_CLONES before a function compiles it for several instruction sets; the loader picks the best one. Not used with
// sanitizers, which are not yet initialised when the loader picks, nor with other compilers and processors.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#if __GNUC__ >= 12
#define NEOX_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else  // gcc 11 knows x86-64-v4 but cannot pick by it
#define NEOX_CLONES __attribute__((target_clones("default", "avx2")))
#endif
#else
#define NEOX_CLONES
#endif
