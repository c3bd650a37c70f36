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

// The pieces of a call that one thread begins with: `unclaimed` many, of which the last is `end` - 1.
struct alignas(64) Share {
    std::atomic<int64_t> unclaimed{0};
    int64_t end = 0;
};

class Pool {
public:
    explicit Pool(int64_t threads) : shares_(threads) {
        for (int64_t i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
    }

    ~Pool() {
        stopping_ = true;
        calls_++;
        calls_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    int64_t size() const { return int64_t(shares_.size()); }

    void run(int64_t pieces, void (*run)(const void*, int64_t), const void* context) {
        const std::unique_lock<std::mutex> turn(calling_, std::try_to_lock);
        if (!turn) {  // another thread computes: its call has the workers, this one does without
            for (int64_t piece = 0; piece < pieces; piece++) run(context, piece);
            return;
        }
        run_ = run;
        context_ = context;
        int64_t first = 0;
        for (int64_t i = 0; i < size(); i++) {
            const int64_t end = pieces * (i + 1) / size();
            shares_[i].end = end;
            shares_[i].unclaimed = end - first;  // publishes what is above
            first = end;
        }
        calls_++;
        if (sleeping_) calls_.notify_all();
        claim_pieces(0);
        while (claiming_) pause();  // pieces that workers are still at
    }

private:
    // All pieces of a call are claimed once no share has any; its fields may change only when besides nobody is between
    // counting himself in `claiming_` and out. So whoever claims a piece sees the fields of that piece's call.
    void claim_pieces(int64_t thread) {
        for (int64_t i = 0; i < size(); i++) {
            Share& share = shares_[(thread + i) % size()];
            int64_t left;
            while ((left = share.unclaimed--) > 0) run_(context_, share.end - left);
        }
    }

    void work(int64_t thread) {
        uint32_t seen = 0;
        while (!stopping_) {
            for (int spin = 0; spin < SPINS && calls_ == seen; spin++) pause();
            if (calls_ == seen) sleep(seen);
            seen = calls_;
            claiming_++;
            claim_pieces(thread);
            claiming_--;
        }
    }

    void sleep(uint32_t seen) {
        sleeping_++;
        calls_.wait(seen);
        sleeping_--;
    }

    std::vector<std::thread> workers_;
    std::vector<Share> shares_;  // of each thread, the caller's first
    std::mutex calling_;
    void (*run_)(const void*, int64_t) = nullptr;
    const void* context_ = nullptr;
    alignas(64) std::atomic<uint32_t> calls_{0};
    alignas(64) std::atomic<int64_t> claiming_{0};
    alignas(64) std::atomic<int64_t> sleeping_{0};
    std::atomic<bool> stopping_{false};
};

std::unique_ptr<Pool>& pool() {
    static std::unique_ptr<Pool> instance = std::make_unique<Pool>(1);
    return instance;
}

}  // namespace

int64_t num_threads() { return pool()->size(); }

void run_pieces(int64_t pieces, void (*run)(const void* context, int64_t piece), const void* context) {
    pool()->run(pieces, run, context);
}

}  // namespace onebase

// How many threads compute from now on, the caller's own among them. Not to be called while an op runs.
ONEBASE_EXPORT void onebase_set_threads(int64_t threads) {
    if (threads != onebase::num_threads()) onebase::pool() = std::make_unique<onebase::Pool>(threads);
}
