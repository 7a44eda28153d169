// Memory that begins a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace movae {

// Numbers of type T, none of them initialised; grows only.
template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t n) { resize(n); }
    T* resize(int64_t n) {  // what it held is lost where it grows
        if (n > size_) {
            const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
            data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
            if (!data_) throw std::bad_alloc();
            size_ = n;
        }
        return data_.get();
    }
    T* get() const { return data_.get(); }
    T& operator[](int64_t i) const { return data_.get()[i]; }

  private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> data_;
    int64_t size_ = 0;
};

}  // namespace movae
