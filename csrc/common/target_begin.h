// Compiles what follows, up to target_end.h, for the instruction set that MOVAE_TARGET names: the build as a whole
// stays at the architecture's baseline, and only code behind a run-time check uses more.
#define MOVAE_PRAGMA_(text) _Pragma(#text)
#define MOVAE_PRAGMA(text) MOVAE_PRAGMA_(text)
#ifdef __clang__
MOVAE_PRAGMA(clang attribute push(__attribute__((target(MOVAE_TARGET))), apply_to = function))
#else
#pragma GCC push_options
MOVAE_PRAGMA(GCC target(MOVAE_TARGET))
#endif
