// Whether this compiler and processor family can hold several variants of a kernel in one file.
#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define SPARSEMOE_X86_VARIANTS 1
#else
#define SPARSEMOE_X86_VARIANTS 0
#endif
