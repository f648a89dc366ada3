// A fixed array of zeros that costs memory only where it is written: calloc hands out untouched
// pages for large sizes, where a std::vector would write them all.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

namespace pgk {

template <typename T>
class ZeroedArray {
  static_assert(std::is_trivial_v<T>);

 public:
  ZeroedArray() = default;
  explicit ZeroedArray(std::size_t count) : data_(static_cast<T*>(std::calloc(count, sizeof(T)))) {
    if (!data_) throw std::bad_alloc();
  }
  T& operator[](std::size_t index) { return data_.get()[index]; }
  const T& operator[](std::size_t index) const { return data_.get()[index]; }
  // The caller frees it with std::free.
  T* release() { return data_.release(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace pgk
