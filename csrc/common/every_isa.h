// Compiles the header that MOVAE_KERNEL names once per instruction set, in the namespaces portable, avx2 and avx512, with
// MOVAE_VECTOR_BYTES set to its width. No include guard: it is included in the namespace that those are to lie in.

// GCC 12's own header passes a deliberately undefined register to the unmasked forms.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// The vector types of a namespace never cross a call: everything that takes one is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace portable {
#define MOVAE_VECTOR_BYTES 16
#include MOVAE_KERNEL
#undef MOVAE_VECTOR_BYTES
}  // namespace portable

#ifdef __x86_64__
#define MOVAE_TARGET "avx2,fma"
#include "common/target_begin.h"
namespace avx2 {
#define MOVAE_VECTOR_BYTES 32
#include MOVAE_KERNEL
#undef MOVAE_VECTOR_BYTES
}  // namespace avx2
#include "common/target_end.h"

#define MOVAE_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"
#include "common/target_begin.h"
namespace avx512 {
#define MOVAE_VECTOR_BYTES 64
#include MOVAE_KERNEL
#undef MOVAE_VECTOR_BYTES
}  // namespace avx512
#include "common/target_end.h"
#endif

#undef MOVAE_KERNEL
