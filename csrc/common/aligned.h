// Memory for `n` numbers of type T that begins a cache line; none of them is initialised.
#pragma once

#include <cstddef>
#include <new>

namespace movae {

template <class T>
struct Aligned {
    explicit Aligned(size_t n) : p(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)))) {}
    ~Aligned() { ::operator delete(p, std::align_val_t(64)); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
    T* p;
};

}  // namespace movae
