// The threads behind parallel.h.

#include "parallel.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "simd.h"

namespace onebase {
namespace {

constexpr int SPINS = 2000;  // some 40 µs

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

class Pool {
public:
    explicit Pool(int64_t threads) {
        for (int64_t i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
    }

    ~Pool() {
        stopping_ = true;
        wake();
        for (auto& worker : workers_) worker.join();
    }

    int64_t size() const { return int64_t(workers_.size()) + 1; }

    void run(int64_t pieces, void (*run)(const void*, int64_t), const void* context) {
        const std::unique_lock<std::mutex> turn(calling_, std::try_to_lock);
        if (!turn) {  // another thread computes: its call has the workers, this one does without
            for (int64_t piece = 0; piece < pieces; piece++) run(context, piece);
            return;
        }
        run_ = run;
        context_ = context;
        unclaimed_ = pieces;  // publishes the two lines above
        if (sleeping_) wake();
        claim_pieces();
        while (claiming_) pause();  // pieces that workers are still at
    }

private:
    // All pieces of a call are claimed once `unclaimed_` is not positive; its fields may change only when besides nobody
    // is between counting himself in `claiming_` and out. So whoever claims a piece sees the fields of that piece's call.
    void claim_pieces() {
        int64_t piece;
        while ((piece = --unclaimed_) >= 0) run_(context_, piece);
    }

    void work() {
        while (!stopping_) {
            for (int spin = 0; spin < SPINS && unclaimed_ <= 0; spin++) pause();
            if (unclaimed_ <= 0) sleep();
            claiming_++;
            claim_pieces();
            claiming_--;
        }
    }

    void sleep() {
        const int64_t seen = wakes_;
        sleeping_++;
        if (unclaimed_ <= 0 && !stopping_) wakes_.wait(seen);
        sleeping_--;
    }

    void wake() {
        wakes_++;
        wakes_.notify_all();
    }

    std::vector<std::thread> workers_;
    std::mutex calling_;
    void (*run_)(const void*, int64_t) = nullptr;
    const void* context_ = nullptr;
    alignas(64) std::atomic<int64_t> unclaimed_{0};
    alignas(64) std::atomic<int64_t> claiming_{0};
    alignas(64) std::atomic<int64_t> sleeping_{0}, wakes_{0};
    std::atomic<bool> stopping_{false};
};

std::unique_ptr<Pool>& pool() {
    static std::unique_ptr<Pool> instance = std::make_unique<Pool>(1);
    return instance;
}

}  // namespace

int64_t num_threads() { return pool()->size(); }

void run_pieces(int64_t pieces, void (*run)(const void*, int64_t), const void* context) {
    pool()->run(pieces, run, context);
}

}  // namespace onebase

// How many threads compute from now on, the caller's own among them. Not to be called while an op runs.
ONEBASE_EXPORT void onebase_set_threads(int64_t threads) {
    if (threads != onebase::num_threads()) onebase::pool() = std::make_unique<onebase::Pool>(threads);
}
