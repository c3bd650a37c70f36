// Attention over the paged KV cache: decode steps and chunks of prefill, any mix of them in one call.
//
// A piece of work is a few queries of one request together with all query heads of one KV head, so that each key and
// value is read and widened once for all of them. Scores and softmax are fp32.

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "step.h"

namespace onebase {

struct Attention {
    const void* q;  // [tokens, heads, head_size], tokens q_stride numbers apart
    void* out;      // [tokens, heads, head_size], contiguous
    const void* k_cache;
    const void* v_cache;  // [blocks, block_size, kv_heads, head_size]
    int64_t q_stride;
    int64_t block_size, heads, kv_heads, head_size;
    int64_t window;  // how many keys a query sees, itself included; 0 for all
    float scale;
    int32_t dtype;
};

namespace {

constexpr int64_t MAX_QUERIES = 8;  // of a piece
constexpr int64_t KEYS_AHEAD = 12;

struct Piece {
    int64_t request, first_token, num_queries, first_position, kv_head;
};

// Memory of one thread, kept between its pieces.
struct Scratch {
    std::vector<int64_t> offsets;
    std::vector<float> queries, scores;
};

// VECTORS of 16 numbers make a head.
template <class T, int VECTORS>
class PieceAttention {
public:
    PieceAttention(const Attention& a, const Step& step, const Piece& piece, Scratch& scratch)
        : a_(a), step_(step), piece_(piece), group_(a.heads / a.kv_heads), rows_(group_ * piece.num_queries),
          first_key_(a.window ? std::max<int64_t>(0, piece.first_position - a.window + 1) : 0),
          num_keys_(piece.first_position + piece.num_queries - first_key_), scratch_(scratch) {}

    void run() {
        find_keys();
        widen_queries();
        score_keys();
        for (int64_t row = 0; row < rows_; row++) {
            softmax(row);
            sum_values(row);
        }
    }

private:
    static constexpr int64_t HEAD = VECTORS * LANES;

    // Row r is query r / group of the piece under the KV head's query head r % group.
    int64_t token(int64_t row) const { return piece_.first_token + row / group_; }
    int64_t head(int64_t row) const { return piece_.kv_head * group_ + row % group_; }

    // Where each key, and in the other cache its value, begins.
    void find_keys() {
        const int32_t* blocks = step_.block_tables + piece_.request * step_.table_width;
        const int64_t stride = a_.kv_heads * HEAD;
        scratch_.offsets.resize(num_keys_);
        int64_t block = first_key_ / a_.block_size, within = first_key_ % a_.block_size;
        for (int64_t& offset : scratch_.offsets) {
            offset = (blocks[block] * a_.block_size + within) * stride + piece_.kv_head * HEAD;
            if (++within == a_.block_size) within = 0, block++;
        }
    }

    // A key or a value, with those to come fetched from memory meanwhile: one head of each token is no stream to the CPU.
    const T* row_of(const void* cache, int64_t key) const {
        const T* rows = static_cast<const T*>(cache);
        const T* ahead = rows + scratch_.offsets[std::min(key + KEYS_AHEAD, num_keys_ - 1)];
        for (int64_t i = 0; i < HEAD; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(ahead + i);
        return rows + scratch_.offsets[key];
    }

    void widen_queries() {
        scratch_.queries.resize(rows_ * HEAD);
        for (int64_t row = 0; row < rows_; row++) {
            const T* q = static_cast<const T*>(a_.q) + token(row) * a_.q_stride + head(row) * HEAD;
            for (int v = 0; v < VECTORS; v++)
                store(scratch_.queries.data() + row * HEAD + v * LANES, load(q + v * LANES) * a_.scale);
        }
    }

    void score_keys() {
        scratch_.scores.resize(rows_ * num_keys_);
        const float* queries = scratch_.queries.data();
        for (int64_t key = 0; key < num_keys_; key++) {
            const T* at = row_of(a_.k_cache, key);
            F32x16 k[VECTORS];
            for (int v = 0; v < VECTORS; v++) k[v] = load(at + v * LANES);
            for (int64_t row = 0; row < rows_; row++) {
                F32x16 products{};
                for (int v = 0; v < VECTORS; v++) products += k[v] * load(queries + row * HEAD + v * LANES);
                scratch_.scores[row * num_keys_ + key] = sum(products);
            }
        }
    }

    // Which of the piece's keys a row's query sees, from first to before last.
    int64_t last_seen(int64_t row) const { return piece_.first_position + row / group_ + 1 - first_key_; }
    int64_t first_seen(int64_t row) const { return a_.window ? std::max<int64_t>(0, last_seen(row) - a_.window) : 0; }

    void softmax(int64_t row) {
        float* scores = scratch_.scores.data() + row * num_keys_;
        const int64_t first = first_seen(row), last = last_seen(row);
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
    }

    void sum_values(int64_t row) {
        const float* weights = scratch_.scores.data() + row * num_keys_;
        F32x16 sums[VECTORS] = {};
        for (int64_t key = first_seen(row); key < last_seen(row); key++) {
            const T* at = row_of(a_.v_cache, key);
            for (int v = 0; v < VECTORS; v++) sums[v] += load(at + v * LANES) * weights[key];
        }
        T* to = static_cast<T*>(a_.out) + (token(row) * a_.heads + head(row)) * HEAD;
        for (int v = 0; v < VECTORS; v++) store(to + v * LANES, sums[v]);
    }

    const Attention& a_;
    const Step& step_;
    const Piece& piece_;
    const int64_t group_, rows_, first_key_, num_keys_;
    Scratch& scratch_;
};

void cut(const Attention& a, const Step& step, std::vector<Piece>& pieces) {
    pieces.clear();
    for (int64_t request = 0; request < step.num_requests; request++) {
        const int64_t start = step.query_starts[request], stop = step.query_starts[request + 1];
        const int64_t before = step.context_lens[request] - (stop - start);
        for (int64_t token = start; token < stop; token += MAX_QUERIES)
            for (int64_t kv_head = 0; kv_head < a.kv_heads; kv_head++)
                pieces.push_back({request, token, std::min(MAX_QUERIES, stop - token), before + token - start, kv_head});
    }
}

template <class T, int VECTORS>
void attend(const Attention& attention, const Step& step) {
    thread_local std::vector<Piece> pieces;
    cut(attention, step, pieces);
    const Piece* first_piece = pieces.data();  // the caller's, for all threads
    parallel(int64_t(pieces.size()), [&](int64_t first, int64_t last) {
        thread_local Scratch scratch;
        for (int64_t i = first; i < last; i++)
            PieceAttention<T, VECTORS>(attention, step, first_piece[i], scratch).run();
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
