// Work on torch's own threads.
//
// The library is compiled for OpenMP but not linked to a runtime of its own: its calls find the one that torch has
// loaded (see library.py). A second pool would spin beside torch's and halve a small machine.
#pragma once

#include <cstdint>
#include <omp.h>

namespace onebase {

// Calls `body(first, last)` on each thread with that thread's share of `count` items.
template <class Body>
inline void parallel(int64_t count, Body body) {
    if (count <= 1 || omp_get_max_threads() == 1) {
        if (count > 0) body(int64_t(0), count);
        return;
    }
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t first = count * thread / threads, last = count * (thread + 1) / threads;
        if (first < last) body(first, last);
    }
}

}  // namespace onebase
