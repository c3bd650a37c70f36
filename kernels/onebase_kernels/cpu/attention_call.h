// What attention.cpp and attention_amx.h share: the call, and the pieces that its work is cut into.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"
#include "step.h"

namespace onebase {

struct Attention {
    const void* q;  // [tokens, heads, head_size], tokens q_stride numbers apart
    void* out;      // [tokens, heads, head_size], contiguous
    const void* k_cache;
    const void* v_cache;  // [blocks, block_size, kv_heads, head_size], each head's numbers side by side
    int64_t q_stride;
    int64_t block_stride, slot_stride, head_stride;  // numbers from one to the next in both caches
    int64_t block_size, heads, kv_heads, head_size;
    int64_t window;  // how many keys a query sees, itself included; 0 for all
    float scale;
    float softcap;  // scores go no further than this, smoothly; 0 for no cap
    int32_t dtype;

    int64_t group() const { return heads / kv_heads; }
};

constexpr int64_t MAX_ROWS = 16;

// Some queries of one request under all query heads of one KV head, so that each key and value is read once for all of
// them: row r of the request is its query r / group under head r % group of the group.
struct Piece {
    int64_t request, kv_head, first_row, num_rows;
};

inline void cut(const Attention& a, const Step& step, std::vector<Piece>& pieces) {
    pieces.clear();
    for (int64_t request = 0; request < step.num_requests; request++) {
        const int64_t rows = (step.query_starts[request + 1] - step.query_starts[request]) * a.group();
        for (int64_t row = 0; row < rows; row += MAX_ROWS)
            for (int64_t kv_head = 0; kv_head < a.kv_heads; kv_head++)
                pieces.push_back({request, kv_head, row, std::min(MAX_ROWS, rows - row)});
    }
}

// cap · tanh(score / cap), in place, of whole vectors.
inline void cap_scores(float* scores, int64_t count, float cap) {
    for (int64_t i = 0; i < count; i += LANES) store(scores + i, tanh(load(scores + i) * (1.0f / cap)) * cap);
}

// Where a piece's rows, keys and values lie. Keys are counted from the request's first.
template <class T, int HEAD>
class PieceView {
public:
    PieceView(const Attention& a, const Step& step, const Piece& piece)
        : a_(a), piece_(piece), group_(a.group()),
          blocks_(step.block_tables + piece.request * step.table_width),
          first_token_(step.query_starts[piece.request]),
          first_position_(step.context_lens[piece.request] - (step.query_starts[piece.request + 1] - first_token_)) {}

    int64_t num_rows() const { return piece_.num_rows; }
    float scale() const { return a_.scale; }
    float softcap() const { return a_.softcap; }

    // The keys that a row sees: from first_seen to last_seen.
    int64_t last_seen(int64_t row) const { return first_position_ + (piece_.first_row + row) / group_; }
    int64_t first_seen(int64_t row) const { return a_.window ? std::max<int64_t>(0, last_seen(row) - a_.window + 1) : 0; }
    int64_t first_key() const { return first_seen(0); }
    int64_t last_key() const { return last_seen(piece_.num_rows - 1); }

    const T* query(int64_t row) const {
        return static_cast<const T*>(a_.q) + token(row) * a_.q_stride + head(row) * HEAD;
    }
    T* out(int64_t row) const { return static_cast<T*>(a_.out) + (token(row) * a_.heads + head(row)) * HEAD; }
    const T* key(int64_t key) const { return at(a_.k_cache, key); }
    const T* value(int64_t key) const { return at(a_.v_cache, key); }

    // Keys of one block lie so many numbers apart.
    int64_t key_stride() const { return a_.slot_stride; }
    int64_t block_size() const { return a_.block_size; }

private:
    int64_t token(int64_t row) const { return first_token_ + (piece_.first_row + row) / group_; }
    int64_t head(int64_t row) const { return piece_.kv_head * group_ + (piece_.first_row + row) % group_; }
    const T* at(const void* cache, int64_t key) const {
        return static_cast<const T*>(cache) + blocks_[key / a_.block_size] * a_.block_stride +
               key % a_.block_size * a_.slot_stride + piece_.kv_head * a_.head_stride;
    }

    const Attention& a_;
    const Piece& piece_;
    const int64_t group_;
    const int32_t* blocks_;
    const int64_t first_token_, first_position_;
};

}  // namespace onebase
