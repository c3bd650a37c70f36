// Work shared between a few threads of the library's own, for machines that are busy with other things too.
//
// A call cuts its work into pieces that threads claim one by one, the caller among them, and ends as soon as all pieces
// are done: it never waits for a thread that claimed none, because the system is running something else in its place.
// (OpenMP's barrier does wait; on two cores shared with the HTTP process a step then takes ten times as long.) Each thread
// begins with a share of its own, the same for the same number of items, so what one op leaves in a thread's cache the
// next one finds there. Between calls the threads spin for some microseconds, for the next op of a step is near, then sleep.
#pragma once

#include <algorithm>
#include <cstdint>

namespace onebase {

constexpr int64_t PIECES_PER_THREAD = 4;

// How many threads compute, the caller among them.
int64_t num_threads();

// Calls `run(context, piece)` for every piece in [0, pieces), on all threads.
void run_pieces(int64_t pieces, void (*run)(const void* context, int64_t piece), const void* context);

// Calls `body(piece)` for every piece in [0, pieces), on all threads.
template <class Body>
inline void run_each(int64_t pieces, const Body& body) {
    if (pieces == 1) return body(0);
    run_pieces(pieces, [](const void* opaque, int64_t piece) { (*static_cast<const Body*>(opaque))(piece); }, &body);
}

// How many pieces a call of so many items is cut into.
inline int64_t num_pieces(int64_t count) {
    return std::min(count, num_threads() == 1 ? 1 : num_threads() * PIECES_PER_THREAD);
}

// Calls `body(first, last)` for runs of items that together are [0, count).
template <class Body>
inline void parallel(int64_t count, Body body) {
    const int64_t pieces = num_pieces(count);
    run_each(pieces, [&](int64_t piece) { body(count * piece / pieces, count * (piece + 1) / pieces); });
}

}  // namespace onebase
