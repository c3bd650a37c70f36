// Asking memory for what is read soon, some lines at a time, from inside another computation's loop. A core takes in a line
// every few nanoseconds, however many it asks for at once; lines that it computes between cost it nothing.
#pragma once

#include <cstdint>
#include <vector>

namespace onebase {

// Memory that is read from beginning to end.
struct Run {
    const char *first, *end;
};

class FetchAhead {
public:
    FetchAhead() = default;

    // For a loop that calls it `calls` times. The runs must outlive it.
    FetchAhead(const std::vector<Run>& runs, int64_t calls) : next_(runs.data()), last_(next_ + runs.size()) {
        int64_t lines = 0;
        for (const Run& run : runs) lines += (run.end - run.first + LINE - 1) / LINE;
        lines_at_once_ = (lines + calls - 1) / calls;
    }

    void operator()() {
        for (int64_t i = 0; i < lines_at_once_; i++) {
            if (at_ >= end_) {
                if (next_ == last_) return;
                at_ = next_->first;
                end_ = next_++->end;
            }
            __builtin_prefetch(at_, 0, 2);  // into the second cache: the first has no room for it
            at_ += LINE;
        }
    }

private:
    static constexpr int64_t LINE = 64;

    const char *at_ = nullptr, *end_ = nullptr;
    const Run *next_ = nullptr, *last_ = nullptr;
    int64_t lines_at_once_ = 0;
};

}  // namespace onebase
