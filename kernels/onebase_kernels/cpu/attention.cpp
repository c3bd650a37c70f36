// Attention over the paged KV cache: decode steps and chunks of prefill, any mix of them in one call. Scores and softmax
// are fp32. Here is what runs on every machine; attention_amx.h has bfloat16 for those with AMX.

#include "attention_call.h"
#include "parallel.h"

#if defined(__AMX_BF16__)
#include "attention_amx.h"
#endif

namespace onebase {
namespace {

constexpr int64_t KEYS_AHEAD = 12;
constexpr int ROWS_TOGETHER = 4;  // that share one reading of a value

// Memory of one thread, kept between its pieces.
struct Scratch {
    std::vector<float> queries;  // [rows][HEAD], times the scale
    std::vector<float> scores;   // [rows][keys, rounded up to whole vectors]
};

// VECTORS of 16 numbers make a head.
template <class T, int VECTORS>
class VectorAttention {
public:
    VectorAttention(const Attention& a, const Step& step, const Piece& piece, Scratch& scratch)
        : view_(a, step, piece), scratch_(scratch), first_(view_.first_key()),
          num_keys_(view_.last_key() + 1 - first_), stride_((num_keys_ + LANES - 1) / LANES * LANES) {}

    void run() {
        widen_queries();
        score_keys();
        if (view_.softcap()) cap_scores(scratch_.scores.data(), view_.num_rows() * stride_, view_.softcap());
        for (int64_t row = 0; row < view_.num_rows(); row++) softmax(row);
        int64_t row = 0;
        for (; row + ROWS_TOGETHER <= view_.num_rows(); row += ROWS_TOGETHER) sum_values<ROWS_TOGETHER>(row);
        switch (view_.num_rows() - row) {
            case 1: sum_values<1>(row); break;
            case 2: sum_values<2>(row); break;
            case 3: sum_values<3>(row); break;
        }
    }

private:
    static constexpr int64_t HEAD = VECTORS * LANES;

    // One head of each token is no stream to the CPU, so keys and values to come are fetched meanwhile.
    static const T* prefetched(const T* now, const T* ahead) {
        for (int64_t i = 0; i < HEAD; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(ahead + i);
        return now;
    }
    int64_t ahead(int64_t key) const { return first_ + std::min(key + KEYS_AHEAD, num_keys_ - 1); }

    void widen_queries() {
        scratch_.queries.resize(view_.num_rows() * HEAD);
        for (int64_t row = 0; row < view_.num_rows(); row++)
            for (int v = 0; v < VECTORS; v++)
                store(scratch_.queries.data() + row * HEAD + v * LANES,
                      load(view_.query(row) + v * LANES) * view_.scale());
    }

    void score_keys() {
        scratch_.scores.resize(view_.num_rows() * stride_);
        for (int64_t start = 0; start < num_keys_; start += LANES) {
            const int64_t count = std::min(LANES, num_keys_ - start);
            alignas(64) float keys[LANES * HEAD];
            for (int64_t i = 0; i < count; i++) {
                const T* key = prefetched(view_.key(first_ + start + i), view_.key(ahead(start + i)));
                for (int v = 0; v < VECTORS; v++) store(keys + i * HEAD + v * LANES, load(key + v * LANES));
            }
            for (int64_t row = 0; row < view_.num_rows(); row++)
                store(scratch_.scores.data() + row * stride_ + start, products(row, keys, count));
        }
    }

    // A row's products with up to 16 keys, one in each lane.
    F32x16 products(int64_t row, const float* keys, int64_t count) const {
        F32x16 query[VECTORS], partial[LANES] = {};
        for (int v = 0; v < VECTORS; v++) query[v] = load(scratch_.queries.data() + row * HEAD + v * LANES);
        for (int64_t i = 0; i < count; i++)
            for (int v = 0; v < VECTORS; v++) partial[i] += query[v] * load(keys + i * HEAD + v * LANES);
        return sums(partial);
    }

    void softmax(int64_t row) {
        float* scores = scratch_.scores.data() + row * stride_;
        const int64_t first = view_.first_seen(row) - first_, last = view_.last_seen(row) + 1 - first_;
        float most = scores[first];
        for (int64_t i = first; i < last; i++) most = std::max(most, scores[i]);
        float total = 0;
        int64_t i = first;
        for (; i + LANES <= last; i += LANES) {
            const F32x16 weights = exp(load(scores + i) - most);
            store(scores + i, weights);
            total += sum(weights);
        }
        for (; i < last; i++) total += scores[i] = __builtin_expf(scores[i] - most);
        const float factor = 1.0f / total;
        for (i = first; i < last; i++) scores[i] *= factor;
        std::fill(scores, scores + first, 0.0f);
        std::fill(scores + last, scores + num_keys_, 0.0f);
    }

    template <int ROWS>
    void sum_values(int64_t row) {
        const float* weights = scratch_.scores.data() + row * stride_;
        F32x16 sums[ROWS][VECTORS] = {};
        for (int64_t key = view_.first_seen(row) - first_; key <= view_.last_seen(row + ROWS - 1) - first_; key++) {
            const T* value = prefetched(view_.value(first_ + key), view_.value(ahead(key)));
            for (int v = 0; v < VECTORS; v++) {
                const F32x16 numbers = load(value + v * LANES);
                for (int r = 0; r < ROWS; r++) sums[r][v] += numbers * weights[r * stride_ + key];
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) store(view_.out(row + r) + v * LANES, sums[r][v]);
    }

    const PieceView<T, HEAD> view_;
    Scratch& scratch_;
    const int64_t first_, num_keys_, stride_;
};

template <class T, int VECTORS>
void attend(const Attention& attention, const Step& step) {
    thread_local std::vector<Piece> cut_pieces;
    cut(attention, step, cut_pieces);
    const Piece* pieces = cut_pieces.data();  // the caller's, for all threads
    const int64_t count = int64_t(cut_pieces.size());
    parallel(count, [&](int64_t first, int64_t last) {
#if defined(__AMX_BF16__)
        if constexpr (sizeof(T) == sizeof(BFloat16) && VECTORS % 2 == 0) {
            const Tiles tiles;
            thread_local AmxScratch scratch;
            for (int64_t i = first; i < last; i++) {
                using Piecewise = AmxAttention<VECTORS * LANES>;
                scratch.next.clear();  // what a request's first rows have read, a cache has for the others
                if (i + 1 < count && pieces[i + 1].first_row == 0)
                    Piecewise(attention, step, pieces[i + 1], scratch).add_first_runs(scratch.next);
                Piecewise(attention, step, pieces[i], scratch).run();
            }
            return;
        }
#endif
        thread_local Scratch scratch;
        for (int64_t i = first; i < last; i++) VectorAttention<T, VECTORS>(attention, step, pieces[i], scratch).run();
    });
}

template <class T>
void attend(const Attention& attention, const Step& step) {
    switch (attention.head_size) {
        case 16: return attend<T, 1>(attention, step);
        case 32: return attend<T, 2>(attention, step);
        case 48: return attend<T, 3>(attention, step);
        case 64: return attend<T, 4>(attention, step);
        case 80: return attend<T, 5>(attention, step);
        case 96: return attend<T, 6>(attention, step);
        case 128: return attend<T, 8>(attention, step);
        case 192: return attend<T, 12>(attention, step);
        case 256: return attend<T, 16>(attention, step);
    }
}

}  // namespace
}  // namespace onebase

// The contract of paged_attention in reference.py, for the head sizes above; backend.py knows them.
ONEBASE_EXPORT void onebase_attention(const onebase::Attention* call, const onebase::Step* step) {
    onebase::dispatch(call->dtype, [&]<class T>() { onebase::attend<T>(*call, *step); });
}
