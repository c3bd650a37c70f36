// A vector whose numbers start at the start of a cache line: tiles whose rows lie across two take twice as long to load.
#pragma once

#include <new>
#include <vector>

namespace onebase {

template <class T>
struct CacheLineAllocator {
    using value_type = T;
    static constexpr std::align_val_t LINE{64};
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), LINE)); }
    void deallocate(T* numbers, size_t) { ::operator delete(numbers, LINE); }
    friend bool operator==(CacheLineAllocator, CacheLineAllocator) { return true; }
};
template <class T>
using AlignedVector = std::vector<T, CacheLineAllocator<T>>;

}  // namespace onebase
