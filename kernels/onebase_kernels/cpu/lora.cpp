// The side path of a projection group: y[rows of a segment] += (x Aᵀ) B for each segment's own adapter, then its epilogue.
// Here is what runs on every machine; lora_amx.h has bfloat16 for those with AMX.
//
// Two passes over the work of all segments together, shrink (x Aᵀ) and expand (· B), each cut into pieces of about the
// same number of bytes to read, for reading the adapters once is what this costs.

#include <algorithm>
#include <functional>
#include <vector>

#include "lora_call.h"
#include "parallel.h"

#if defined(__AVX512BF16__)
#include "lora_row.h"
#endif
#if defined(__AMX_BF16__)
#include "lora_amx.h"
#endif

namespace onebase {

namespace {

constexpr int64_t RANKS = 8;      // rows of A that one piece of the shrink takes
constexpr int64_t COLUMNS = 1536;  // most columns of B that one piece of the expand takes: long runs of memory
constexpr int64_t FEW_COLUMNS = 256;  // where there are too few segments to give all threads something
constexpr size_t MANY_SEGMENTS = 4;
constexpr int64_t ROWS = 4;       // rows of x or y that share one reading of A or B

struct ShrinkPiece {
    const Segment* segment;
    int64_t first_rank, last_rank;
    float* shrunk;  // [rows of the segment, total rank]
    int64_t total_rank;
};

struct ExpandPiece {
    const Segment* segment;
    const void* b;  // [rank, width], at the piece's first column
    int64_t rank, width, columns;
    int64_t y_column;
    const float* shrunk;  // at the slice's first rank
    int64_t total_rank;
    const void* gain;  // of the slice's epilogue, at the piece's first column; null if it has none
};

// Dot products of up to ROWS rows of x with one row of A.
template <int N, class T>
inline void dot_rows(const T* x, int64_t x_stride, const T* a, int64_t k, float* out, int64_t out_stride) {
    F32x16 sums[N] = {};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        const F32x16 row = load(a + i);
        for (int n = 0; n < N; n++) sums[n] += load(x + n * x_stride + i) * row;
    }
    for (int n = 0; n < N; n++) {
        float total = sum(sums[n]);
        for (int64_t j = i; j < k; j++) total += load_one(x + n * x_stride + j) * load_one(a + j);
        out[n * out_stride] = total;
    }
}

template <class T>
void shrink(const LoraGroup<T>& group, const ShrinkPiece& piece) {
    const int64_t k = group.num_inputs, rows = piece.segment->stop - piece.segment->start;
    const T* a = group.a(*piece.segment);
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == sizeof(BFloat16)) {
        if (is_whole(k)) {
            for (int64_t row = 0; row < rows; row++)
                shrink_row(group.x + (piece.segment->start + row) * k, a + piece.first_rank * k, k,
                           piece.last_rank - piece.first_rank, piece.shrunk + row * piece.total_rank + piece.first_rank);
            return;
        }
    }
#endif
    for (int64_t rank = piece.first_rank; rank < piece.last_rank; rank++) {
        const T* x = group.x + piece.segment->start * k;
        float* out = piece.shrunk + rank;
        int64_t row = 0;
        for (; row + ROWS <= rows; row += ROWS)
            dot_rows<ROWS>(x + row * k, k, a + rank * k, k, out + row * piece.total_rank, piece.total_rank);
        for (; row < rows; row++)
            dot_rows<1>(x + row * k, k, a + rank * k, k, out + row * piece.total_rank, piece.total_rank);
    }
}

// y[N rows, 64 columns] += shrunk[N rows, rank] · b[rank, 64 columns], for rows that share an adapter; then the epilogue.
template <int N, class T>
inline void expand_rows(const ExpandPiece& piece, int64_t column, const float* shrunk, T* y, int64_t y_stride) {
    const T* b = static_cast<const T*>(piece.b) + column;
    F32x16 sums[N][4];
    for (int n = 0; n < N; n++)
        for (int v = 0; v < 4; v++) sums[n][v] = load(y + n * y_stride + v * LANES);
    for (int64_t rank = 0; rank < piece.rank; rank++)
        for (int v = 0; v < 4; v++) {
            const F32x16 row = load(b + rank * piece.width + v * LANES);
            for (int n = 0; n < N; n++) sums[n][v] += row * shrunk[n * piece.total_rank + rank];
        }
    if (piece.gain)
        for (int n = 0; n < N; n++)
            for (int v = 0; v < 4; v++)
                sums[n][v] = finish(sums[n][v], static_cast<const T*>(piece.gain) + column + v * LANES, piece.width);
    for (int n = 0; n < N; n++)
        for (int v = 0; v < 4; v++) store(y + n * y_stride + v * LANES, sums[n][v]);
}

// The same for one row and all columns of a piece. B is read once, so it is memory that counts: it goes by in long runs,
// rank by rank, and the sums wait in the first cache.
template <class T>
inline void expand_row(const ExpandPiece& piece, const float* shrunk, T* y) {
    const T* b = static_cast<const T*>(piece.b);
    alignas(64) float sums[COLUMNS];
    const int64_t columns = piece.columns / LANES * LANES;
    for (int64_t i = 0; i < columns; i += LANES) store(sums + i, load(y + i));
    for (int64_t rank = 0; rank < piece.rank; rank++) {
        const T* row = b + rank * piece.width;
        const float factor = shrunk[rank];
        for (int64_t i = 0; i < columns; i += LANES) store(sums + i, load(sums + i) + load(row + i) * factor);
    }
    if (piece.gain)
        for (int64_t i = 0; i < columns; i += LANES)
            store(sums + i, finish(load(sums + i), static_cast<const T*>(piece.gain) + i, piece.width));
    for (int64_t i = 0; i < columns; i += LANES) store(y + i, load(sums + i));
}

template <class T>
inline void expand_one(const ExpandPiece& piece, int64_t column, const float* shrunk, T* y) {
    const T* b = static_cast<const T*>(piece.b) + column;
    float total = load_one(y);
    for (int64_t rank = 0; rank < piece.rank; rank++) total += load_one(b + rank * piece.width) * shrunk[rank];
    if (piece.gain) total = finish_one(total, static_cast<const T*>(piece.gain) + column, piece.width);
    store_one(y, total);
}

template <class T>
void expand(const LoraGroup<T>& group, const ExpandPiece& piece) {
    const int64_t rows = piece.segment->stop - piece.segment->start, stride = group.num_outputs;
    T* y = group.y + piece.segment->start * stride + piece.y_column;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == sizeof(BFloat16)) {
        if (rows <= FEW_ROWS && is_whole(piece.columns)) {
            alignas(64) float sums[COLUMNS];
            for (int64_t row = 0; row < rows; row++)
                expand_row(static_cast<const T*>(piece.b), piece.rank, piece.width, piece.columns,
                           piece.shrunk + row * piece.total_rank, static_cast<const T*>(piece.gain), sums, y + row * stride);
            return;
        }
    }
#endif
    const int64_t whole_rows = rows / ROWS * ROWS, by_64 = piece.columns / 64 * 64, by_16 = piece.columns / LANES * LANES;
    const auto shrunk = [&](int64_t row) { return piece.shrunk + row * piece.total_rank; };
    for (int64_t column = 0; column < by_64; column += 64)
        for (int64_t row = 0; row < whole_rows; row += ROWS)
            expand_rows<ROWS>(piece, column, shrunk(row), y + row * stride + column, stride);
    for (int64_t row = whole_rows; row < rows; row++) expand_row(piece, shrunk(row), y + row * stride);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = row < whole_rows ? by_64 : by_16; column < piece.columns; column++)
            expand_one(piece, column, shrunk(row), y + row * stride + column);
}

// The segments that are computed row by row, in pieces.
template <class T>
class VectorLora {
public:
    VectorLora(const LoraGroup<T>& group, const std::vector<Segment>& segments) : group_(group), segments_(segments) {
        int64_t size = 0;
        for (const Segment& segment : segments_) size += (segment.stop - segment.start) * group.total_rank(segment);
        shrunk_.resize(size);
        const int64_t columns = segments_.size() < MANY_SEGMENTS ? FEW_COLUMNS : COLUMNS;
        float* shrunk = shrunk_.data();
        for (const Segment& segment : segments_) {
            const int64_t total_rank = group.total_rank(segment);
            for (int64_t rank = 0; rank < total_rank; rank += RANKS)
                shrinks_.push_back({&segment, rank, std::min(rank + RANKS, total_rank), shrunk, total_rank});
            group.each_slice(segment, [&](const LoraSlice<T>& slice) {
                for (int64_t column = 0; column < slice.width; column += columns)
                    expands_.push_back({&segment, slice.b + column, slice.rank, slice.width,
                                        std::min(columns, slice.width - column), slice.first_column + column,
                                        shrunk + slice.first_rank, total_rank, slice.gain ? slice.gain + column : nullptr});
            });
            shrunk += (segment.stop - segment.start) * total_rank;
        }
    }

    int64_t num_shrinks() const { return int64_t(shrinks_.size()); }
    int64_t num_expands() const { return int64_t(expands_.size()); }
    void shrink(int64_t piece) const { onebase::shrink(group_, shrinks_[piece]); }
    void expand(int64_t piece) const { onebase::expand(group_, expands_[piece]); }

private:
    const LoraGroup<T>& group_;
    std::vector<Segment> segments_;
    std::vector<float> shrunk_;
    std::vector<ShrinkPiece> shrinks_;
    std::vector<ExpandPiece> expands_;
};

#if defined(__AMX_BF16__)
// Long segments by AMX and the others by vectors, side by side: threads wait for one another once a pass.
void add_lora_with_amx(const LoraGroup<BFloat16>& group, const std::vector<Segment>& long_segments,
                       const std::vector<Segment>& short_segments) {
    AmxLora by_amx(group, long_segments);
    const VectorLora<BFloat16> by_vectors(group, short_segments);
    const int64_t shrinks = by_amx.num_shrinks(), expands = by_amx.num_expands();
    parallel(shrinks + by_vectors.num_shrinks(), [&](int64_t first, int64_t last) {
        const Tiles tiles;
        for (int64_t i = first; i < last; i++) i < shrinks ? by_amx.shrink(i) : by_vectors.shrink(i - shrinks);
    });
    parallel(expands + by_vectors.num_expands(), [&](int64_t first, int64_t last) {
        const Tiles tiles;
        for (int64_t i = first; i < last; i++) i < expands ? by_amx.expand(i) : by_vectors.expand(i - expands);
    });
}
#endif

template <class T>
void add_lora(const LoraGroup<T>& group, const Segment* segments, int64_t num_segments) {
    std::vector<Segment> short_segments(segments, segments + num_segments);
#if defined(__AMX_BF16__)
    if constexpr (sizeof(T) == sizeof(BFloat16)) {
        if (AmxLora::carries(group)) {
            const auto is_long = [](const Segment& segment) { return segment.stop - segment.start > FEW_ROWS; };
            const auto first_long =
                std::stable_partition(short_segments.begin(), short_segments.end(), std::not_fn(is_long));
            const std::vector<Segment> long_segments(first_long, short_segments.end());
            short_segments.erase(first_long, short_segments.end());
            if (!long_segments.empty()) return add_lora_with_amx(group, long_segments, short_segments);
        }
    }
#endif
    const VectorLora<T> by_vectors(group, short_segments);
    parallel(by_vectors.num_shrinks(), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) by_vectors.shrink(i);
    });
    parallel(by_vectors.num_expands(), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) by_vectors.expand(i);
    });
}

}  // namespace
}  // namespace onebase

// The contract of add_lora_ in reference.py; all matrices of `dtype`, contiguous.
ONEBASE_EXPORT void onebase_add_lora(const onebase::AddLora* call, const onebase::Step* step) {
    if (step->num_segments == 0) return;
    onebase::dispatch(call->dtype, [&]<class T>() {
        const onebase::LoraGroup<T> group{
            static_cast<const T*>(call->x), static_cast<T*>(call->y), static_cast<const T*>(step->arena),
            step->adapter_table + call->place * step->slots * onebase::TABLE_COLUMNS, call->widths, call->num_slices,
            call->num_inputs, call->num_outputs};
        onebase::add_lora(group, step->segments, step->num_segments);
    });
}
