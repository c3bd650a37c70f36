// The side path of a projection group: y[rows of a segment] += (x Aᵀ) B for each segment's own adapter, then its epilogue.
// Here is what runs on every machine; lora_amx.h has bfloat16 for those with AMX.
//
// Two passes over the work of all segments together, shrink (x Aᵀ) and expand (· B), each cut into pieces of about the
// same number of bytes to read, for reading the adapters once is what this costs.

#include <algorithm>
#include <functional>
#include <type_traits>
#include <vector>

#include "lora_call.h"
#include "side_path.h"

#if defined(__AVX512BF16__)
#include "lora_row.h"
#include "lora_row_int8.h"
#endif
#if defined(__AMX_BF16__)
#include "lora_amx.h"
#endif

namespace onebase {

namespace {

template <class M>
constexpr int64_t RANKS = std::is_same_v<M, Int8Code> ? 32 : 8;  // of A in a piece of the shrink; 32 share x's integers
constexpr int64_t COLUMNS = 1536;  // most columns of B that one piece of the expand takes: long runs of memory
constexpr int64_t FEW_COLUMNS = 256;  // where there are too few segments to give all threads something
constexpr size_t MANY_SEGMENTS = 4;
constexpr int64_t ROWS = 4;       // rows of x or y that share one reading of A or B
constexpr int64_t FETCHED_BYTES = 1280 << 10;  // for each thread, that its second cache can hold until the expand

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
template <int N, class T, class M>
inline void dot_rows(const T* x, int64_t x_stride, const M* a, int64_t k, float* out, int64_t out_stride) {
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

// Single rows in bfloat16.
#if defined(__AVX512BF16__)
template <bool IS_FETCHED, class M>
void shrink_rows(const LoraGroup<BFloat16, M>& group, const ShrinkPiece& piece) {
    const int64_t k = group.num_inputs;
    const M* a = group.a(*piece.segment) + piece.first_rank * k;
    float* shrunk = piece.shrunk + piece.first_rank;
    for (int64_t row = piece.segment->start; row < piece.segment->stop; row++, shrunk += piece.total_rank)
        shrink_row<IS_FETCHED>(group.x + row * k, a, k, piece.last_rank - piece.first_rank, shrunk);
}

template <bool IS_FETCHED, class M>
void expand_rows(const LoraGroup<BFloat16, M>& group, const ExpandPiece& piece, BFloat16* y) {
    std::conditional_t<std::is_same_v<M, Int8Code>, float[COLUMNS], PairSums[COLUMNS / ROW_STEP]> sums;
    const float* shrunk = piece.shrunk;
    for (int64_t row = piece.segment->start; row < piece.segment->stop; row++, shrunk += piece.total_rank)
        expand_row<IS_FETCHED>(static_cast<const M*>(piece.b), piece.rank, piece.width, piece.columns, shrunk,
                               static_cast<const BFloat16*>(piece.gain), sums,
                               y + row * group.num_outputs + piece.y_column);
}
#endif

template <class T, class M>
void multiply_rows(const LoraGroup<T, M>& group, const ShrinkPiece& piece, [[maybe_unused]] bool is_fetched) {
    const int64_t k = group.num_inputs, rows = piece.segment->stop - piece.segment->start;
    const M* a = group.a(*piece.segment);
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (is_whole(a, k)) return is_fetched ? shrink_rows<true>(group, piece) : shrink_rows<false>(group, piece);
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

template <class T, class M>
void shrink(const LoraGroup<T, M>& group, const ShrinkPiece& piece, bool is_fetched) {
    multiply_rows(group, piece, is_fetched);
    if constexpr (!LoraGroup<T, M>::IS_INT8) return;
    float* shrunk = piece.shrunk;
    for (int64_t row = piece.segment->start; row < piece.segment->stop; row++, shrunk += piece.total_rank)
        for (int64_t rank = piece.first_rank; rank < piece.last_rank; rank++)
            shrunk[rank] *= group.scale(*piece.segment, rank);
}

// y[N rows, 64 columns] += shrunk[N rows, rank] · b[rank, 64 columns], for rows that share an adapter; then the epilogue.
template <int N, class M, class T>
inline void expand_rows(const ExpandPiece& piece, int64_t column, const float* shrunk, T* y, int64_t y_stride) {
    const M* b = static_cast<const M*>(piece.b) + column;
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
template <class M, class T>
inline void expand_row(const ExpandPiece& piece, const float* shrunk, T* y) {
    const M* b = static_cast<const M*>(piece.b);
    alignas(64) float sums[COLUMNS];
    const int64_t columns = piece.columns / LANES * LANES;
    for (int64_t i = 0; i < columns; i += LANES) store(sums + i, load(y + i));
    for (int64_t rank = 0; rank < piece.rank; rank++) {
        const M* row = b + rank * piece.width;
        const float factor = shrunk[rank];
        for (int64_t i = 0; i < columns; i += LANES) store(sums + i, load(sums + i) + load(row + i) * factor);
    }
    if (piece.gain)
        for (int64_t i = 0; i < columns; i += LANES)
            store(sums + i, finish(load(sums + i), static_cast<const T*>(piece.gain) + i, piece.width));
    for (int64_t i = 0; i < columns; i += LANES) store(y + i, load(sums + i));
}

template <class M, class T>
inline void expand_one(const ExpandPiece& piece, int64_t column, const float* shrunk, T* y) {
    const M* b = static_cast<const M*>(piece.b) + column;
    float total = load_one(y);
    for (int64_t rank = 0; rank < piece.rank; rank++) total += load_one(b + rank * piece.width) * shrunk[rank];
    if (piece.gain) total = finish_one(total, static_cast<const T*>(piece.gain) + column, piece.width);
    store_one(y, total);
}

template <class T, class M>
void expand(const LoraGroup<T, M>& group, const ExpandPiece& piece, T* y, [[maybe_unused]] bool is_fetched) {
    const int64_t rows = piece.segment->stop - piece.segment->start, stride = group.num_outputs;
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (rows <= ROWS && is_whole(static_cast<const M*>(piece.b), piece.columns))
            return is_fetched ? expand_rows<true>(group, piece, y) : expand_rows<false>(group, piece, y);
    }
#endif
    y += piece.segment->start * stride + piece.y_column;
    const int64_t whole_rows = rows / ROWS * ROWS, by_64 = piece.columns / 64 * 64, by_16 = piece.columns / LANES * LANES;
    const auto shrunk = [&](int64_t row) { return piece.shrunk + row * piece.total_rank; };
    for (int64_t column = 0; column < by_64; column += 64)
        for (int64_t row = 0; row < whole_rows; row += ROWS)
            expand_rows<ROWS, M>(piece, column, shrunk(row), y + row * stride + column, stride);
    for (int64_t row = whole_rows; row < rows; row++) expand_row<M>(piece, shrunk(row), y + row * stride);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = row < whole_rows ? by_64 : by_16; column < piece.columns; column++)
            expand_one<M>(piece, column, shrunk(row), y + row * stride + column);
}

// Segments that are computed by vectors, row by row or a few rows at a time.
template <class T, class M>
class VectorLora final : public SidePath {
public:
    VectorLora(const LoraGroup<T, M>& group, std::vector<Segment> segments, bool is_fetched)
        : SidePath(group.x, is_fetched), group_(group), segments_(std::move(segments)) {
        int64_t size = 0;
        for (const Segment& segment : segments_) size += (segment.stop - segment.start) * group.total_rank(segment);
        shrunk_.resize(size);
        const int64_t columns = segments_.size() < MANY_SEGMENTS ? FEW_COLUMNS : COLUMNS;
        float* shrunk = shrunk_.data();
        for (const Segment& segment : segments_) {
            const int64_t total_rank = group.total_rank(segment);
            for (int64_t rank = 0; rank < total_rank; rank += RANKS<M>)
                shrinks_.push_back({&segment, rank, std::min(rank + RANKS<M>, total_rank), shrunk, total_rank});
            group.each_slice(segment, [&](const LoraSlice<T, M>& slice) {
                for (int64_t column = 0; column < slice.width; column += columns)
                    expands_.push_back({&segment, slice.b + column, slice.rank, slice.width,
                                        std::min(columns, slice.width - column), slice.first_column + column,
                                        shrunk + slice.first_rank, total_rank, slice.gain ? slice.gain + column : nullptr});
            });
            shrunk += (segment.stop - segment.start) * total_rank;
        }
    }

    int64_t num_shrinks() const override { return int64_t(shrinks_.size()); }
    int64_t num_expands() const override { return int64_t(expands_.size()); }
    void shrink(int64_t first, int64_t last) override {
        for (int64_t i = first; i < last; i++) onebase::shrink(group_, shrinks_[i], is_fetched);
    }
    void expand(int64_t first, int64_t last, void* y) const override {
        for (int64_t i = first; i < last; i++) onebase::expand(group_, expands_[i], static_cast<T*>(y), is_fetched);
    }
    void add_shrink_runs(int64_t i, std::vector<Run>& runs) const override {
        const ShrinkPiece& piece = shrinks_[i];
        add_rows(runs, group_.a(*piece.segment), piece.first_rank, piece.last_rank, group_.num_inputs, group_.num_inputs);
    }
    void add_expand_runs(int64_t i, std::vector<Run>& runs) const override {
        const ExpandPiece& piece = expands_[i];
        add_rows(runs, static_cast<const M*>(piece.b), 0, piece.rank, piece.columns, piece.width);
    }

private:
    const LoraGroup<T, M> group_;
    const std::vector<Segment> segments_;
    std::vector<float> shrunk_;
    std::vector<ShrinkPiece> shrinks_;
    std::vector<ExpandPiece> expands_;
};

#if defined(__AMX_BF16__)
// Long segments by AMX and the others by vectors, side by side: threads wait for one another once a pass.
template <class M>
class MixedLora final : public SidePath {
public:
    MixedLora(const LoraGroup<BFloat16, M>& group, const std::vector<Segment>& long_segments,
              const std::vector<Segment>& short_segments, bool is_fetched)
        : SidePath(group.x, is_fetched), by_amx_(group, long_segments), by_vectors_(group, short_segments, is_fetched) {}

    int64_t num_shrinks() const override { return by_amx_.num_shrinks() + by_vectors_.num_shrinks(); }
    int64_t num_expands() const override { return by_amx_.num_expands() + by_vectors_.num_expands(); }
    void shrink(int64_t first, int64_t last) override {
        const int64_t amx = by_amx_.num_shrinks(), border = std::clamp(amx, first, last);
        const Tiles tiles;
        for (int64_t i = first; i < border; i++) by_amx_.shrink(i);
        by_vectors_.shrink(border - amx, last - amx);
    }
    void expand(int64_t first, int64_t last, void* y) const override {
        const int64_t amx = by_amx_.num_expands(), border = std::clamp(amx, first, last);
        const Tiles tiles;
        for (int64_t i = first; i < border; i++) by_amx_.expand(i, static_cast<BFloat16*>(y));
        by_vectors_.expand(border - amx, last - amx, y);
    }
    void add_shrink_runs(int64_t i, std::vector<Run>& runs) const override {
        const int64_t amx = by_amx_.num_shrinks();
        i < amx ? by_amx_.add_shrink_runs(i, runs) : by_vectors_.add_shrink_runs(i - amx, runs);
    }
    void add_expand_runs(int64_t i, std::vector<Run>& runs) const override {
        const int64_t amx = by_amx_.num_expands();
        i < amx ? by_amx_.add_expand_runs(i, runs) : by_vectors_.add_expand_runs(i - amx, runs);
    }

private:
    AmxLora<M> by_amx_;
    VectorLora<BFloat16, M> by_vectors_;
};
#endif

template <class T, class M>
std::unique_ptr<SidePath> make_side_path(const LoraGroup<T, M>& group, std::vector<Segment> segments, bool is_fetched) {
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<T, BFloat16>) {
        const auto is_long = [&](const Segment& segment) {
            const int64_t rows = segment.stop - segment.start;
            return rows > 1 && rows * group.total_rank(segment) > FEW_PRODUCTS * group.num_slices;
        };
        const auto first_long = std::stable_partition(segments.begin(), segments.end(), std::not_fn(is_long));
        if (AmxLora<M>::carries(group) && first_long != segments.end())
            return std::make_unique<MixedLora<M>>(group, std::vector<Segment>(first_long, segments.end()),
                                                  std::vector<Segment>(segments.begin(), first_long), is_fetched);
    }
#endif
    return std::make_unique<VectorLora<T, M>>(group, std::move(segments), is_fetched);
}

template <class T, class M>
std::unique_ptr<SidePath> make_side_path(const AddLora& call, const Step& step, bool is_started) {
    const LoraGroup<T, M> group{static_cast<const T*>(call.x), static_cast<const T*>(step.arena),
                                step.adapter_table + call.place * step.slots * TABLE_COLUMNS, call.widths,
                                call.num_slices, call.num_inputs, call.num_outputs};
    std::vector<Segment> segments(step.segments, step.segments + step.num_segments);
    int64_t bytes = 0;
    for (const Segment& segment : segments) bytes += group.num_bytes(segment);
    const bool is_fetched = is_started && bytes <= FETCHED_BYTES * num_threads();
    return make_side_path(group, std::move(segments), is_fetched);
}

// `is_started`: the product that makes y follows.
std::unique_ptr<SidePath> make_side_path(const AddLora& call, const Step& step, bool is_started) {
    std::unique_ptr<SidePath> side;
    dispatch(call.dtype, [&]<class T>() {
        side = step.adapters_are_int8 ? make_side_path<T, Int8Code>(call, step, is_started)
                                      : make_side_path<T, T>(call, step, is_started);
    });
    return side;
}

}  // namespace
}  // namespace onebase

// The contract of start_lora in reference.py: what follows is the product that makes y, then onebase_add_lora.
ONEBASE_EXPORT void onebase_start_lora(const onebase::AddLora* call, const onebase::Step* step) {
    auto& started = onebase::started_side_path();
    started = step->num_segments ? onebase::make_side_path(*call, *step, true) : nullptr;
}

// The contract of add_lora_ in reference.py; all matrices of `dtype`, contiguous.
ONEBASE_EXPORT void onebase_add_lora(const onebase::AddLora* call, const onebase::Step* step) {
    if (step->num_segments == 0) return;
    std::unique_ptr<onebase::SidePath> side;
    if (call->is_started) side = std::move(onebase::started_side_path());
    if (!side) side = onebase::make_side_path(*call, *step, false);
    if (!side->is_shrunk)
        onebase::parallel(side->num_shrinks(), [&](int64_t first, int64_t last) { side->shrink(first, last); });
    onebase::parallel(side->num_expands(), [&](int64_t first, int64_t last) { side->expand(first, last, call->y); });
}
