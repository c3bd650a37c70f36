// Attention over the paged KV cache: decode steps and chunks of prefill, any mix of them in one call.
//
// A piece of work is a few queries of one request together with all query heads of one KV head, so that each key and
// value is read and widened once for all of them. Scores and softmax are fp32.

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace onebase {

struct Attention {
    const void* q;  // [tokens, heads, head_size], tokens q_stride numbers apart
    void* out;      // [tokens, heads, head_size], contiguous
    const void* k_cache;
    const void* v_cache;  // [blocks, block_size, kv_heads, head_size]
    int64_t q_stride;
    const int64_t* query_starts;  // [requests + 1]
    const int64_t* context_lens;  // [requests]
    const int32_t* block_tables;  // [requests, table_width]
    int64_t num_requests, table_width, block_size, heads, kv_heads, head_size;
    int64_t window;  // how many keys a query sees, itself included; 0 for all
    float scale;
};

namespace {

constexpr int64_t MAX_QUERIES = 8;  // of a piece

struct Piece {
    int64_t request, first_token, num_queries, first_position, kv_head;
};

// Where one request's keys or values of one KV head lie.
template <class T>
struct PagedRows {
    const T* cache;
    const int32_t* blocks;
    int64_t block_size, row_stride, offset;

    const T* operator[](int64_t position) const {
        return cache + (blocks[position / block_size] * block_size + position % block_size) * row_stride + offset;
    }
};

// Memory of one thread, kept between its pieces.
struct Scratch {
    std::vector<float> queries, scores, sums;
};

template <class T>
class PieceAttention {
public:
    PieceAttention(const Attention& a, const Piece& piece, Scratch& scratch)
        : a_(a), piece_(piece), group_(a.heads / a.kv_heads), rows_(group_ * piece.num_queries),
          first_key_(a.window ? std::max<int64_t>(0, piece.first_position - a.window + 1) : 0),
          num_keys_(piece.first_position + piece.num_queries - first_key_), scratch_(scratch) {
        scratch.queries.resize(rows_ * a.head_size);
        scratch.scores.resize(rows_ * num_keys_);
        scratch.sums.assign(rows_ * a.head_size, 0.0f);
    }

    void run() {
        widen_queries();
        score_keys();
        for (int64_t row = 0; row < rows_; row++) softmax(row);
        sum_values();
        write();
    }

private:
    // Row r is query r / group of the piece under the KV head's query head r % group.
    int64_t token(int64_t row) const { return piece_.first_token + row / group_; }
    int64_t head(int64_t row) const { return piece_.kv_head * group_ + row % group_; }

    PagedRows<T> rows_of(const void* cache) const {
        return {static_cast<const T*>(cache), a_.block_tables + piece_.request * a_.table_width, a_.block_size,
                a_.kv_heads * a_.head_size, piece_.kv_head * a_.head_size};
    }

    void widen_queries() {
        for (int64_t row = 0; row < rows_; row++) {
            const T* q = static_cast<const T*>(a_.q) + token(row) * a_.q_stride + head(row) * a_.head_size;
            float* to = scratch_.queries.data() + row * a_.head_size;
            for (int64_t i = 0; i < a_.head_size; i += LANES) store(to + i, load(q + i) * a_.scale);
        }
    }

    void score_keys() {
        const PagedRows<T> keys = rows_of(a_.k_cache);
        for (int64_t key = 0; key < num_keys_; key++) {
            const T* k = keys[first_key_ + key];
            for (int64_t row = 0; row < rows_; row++) {
                const float* q = scratch_.queries.data() + row * a_.head_size;
                F32x16 products{};
                for (int64_t i = 0; i < a_.head_size; i += LANES) products += load(k + i) * load(q + i);
                scratch_.scores[row * num_keys_ + key] = sum(products);
            }
        }
    }

    // Scores of a row to weights; keys that its query does not see get none.
    void softmax(int64_t row) {
        float* scores = scratch_.scores.data() + row * num_keys_;
        const int64_t position = piece_.first_position + row / group_;
        const int64_t last = position + 1 - first_key_;
        const int64_t first = a_.window ? std::max<int64_t>(0, position + 1 - a_.window - first_key_) : 0;
        float most = scores[first];
        for (int64_t i = first; i < last; i++) most = std::max(most, scores[i]);
        std::fill(scores, scores + first, 0.0f);
        std::fill(scores + last, scores + num_keys_, 0.0f);
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

    void sum_values() {
        const PagedRows<T> values = rows_of(a_.v_cache);
        for (int64_t key = 0; key < num_keys_; key++) {
            const T* v = values[first_key_ + key];
            for (int64_t row = 0; row < rows_; row++) {
                const float weight = scratch_.scores[row * num_keys_ + key];
                float* to = scratch_.sums.data() + row * a_.head_size;
                for (int64_t i = 0; i < a_.head_size; i += LANES) store(to + i, load(to + i) + load(v + i) * weight);
            }
        }
    }

    void write() {
        for (int64_t row = 0; row < rows_; row++) {
            T* to = static_cast<T*>(a_.out) + (token(row) * a_.heads + head(row)) * a_.head_size;
            const float* from = scratch_.sums.data() + row * a_.head_size;
            for (int64_t i = 0; i < a_.head_size; i += LANES) store(to + i, load(from + i));
        }
    }

    const Attention& a_;
    const Piece& piece_;
    const int64_t group_, rows_, first_key_, num_keys_;
    Scratch& scratch_;
};

std::vector<Piece> cut(const Attention& a) {
    std::vector<Piece> pieces;
    for (int64_t request = 0; request < a.num_requests; request++) {
        const int64_t start = a.query_starts[request], stop = a.query_starts[request + 1];
        const int64_t before = a.context_lens[request] - (stop - start);
        for (int64_t token = start; token < stop; token += MAX_QUERIES)
            for (int64_t kv_head = 0; kv_head < a.kv_heads; kv_head++)
                pieces.push_back({request, token, std::min(MAX_QUERIES, stop - token), before + token - start, kv_head});
    }
    return pieces;
}

}  // namespace
}  // namespace onebase

// The contract of paged_attention in reference.py; head_size must be a multiple of 16.
ONEBASE_EXPORT void onebase_attention(const onebase::Attention* attention, int32_t dtype) {
    const auto pieces = onebase::cut(*attention);
    onebase::dispatch(dtype, [&]<class T>() {
        onebase::parallel(int64_t(pieces.size()), [&](int64_t first, int64_t last) {
            thread_local onebase::Scratch scratch;
            for (int64_t i = first; i < last; i++) onebase::PieceAttention<T>(*attention, pieces[i], scratch).run();
        });
    });
}
