// The side path of a projection group: y[rows of a segment] += (x Aᵀ) B for each segment's own adapter.
//
// Two passes over the work of all segments together, shrink (x Aᵀ) and expand (· B), each cut into pieces of about the
// same number of bytes to read, for reading the adapters once is what this costs.

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace onebase {

constexpr int64_t TABLE_COLUMNS = 4;  // of a row of the table: offset in the arena, ranks of up to three slices

struct Segment {
    int64_t slot, start, stop;  // rows start to stop - 1 of x and y
};

namespace {

constexpr int64_t RANKS = 8;      // rows of A that one piece of the shrink takes
constexpr int64_t COLUMNS = 128;  // columns of B that one piece of the expand takes
constexpr int64_t ROWS = 4;       // rows of x or y that share one reading of A or B

template <class T>
struct Group {
    const T* x;
    T* y;
    const T* arena;
    const int64_t* table;  // [slots, TABLE_COLUMNS]
    const int64_t* widths;
    int64_t num_slices, num_inputs, num_outputs;

    const int64_t* ranks(const Segment& segment) const { return table + segment.slot * TABLE_COLUMNS + 1; }
    int64_t total_rank(const Segment& segment) const {
        int64_t total = 0;
        for (int64_t i = 0; i < num_slices; i++) total += ranks(segment)[i];
        return total;
    }
    const T* a(const Segment& segment) const { return arena + table[segment.slot * TABLE_COLUMNS]; }
};

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
};

// Dot products of up to ROWS rows of x with one row of A.
template <int N, class T>
inline void dot_rows(const T* x, int64_t x_stride, const T* a, int64_t k, float* out, int64_t out_stride) {
    F32x16 sums[N] = {};
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == sizeof(BFloat16)) {
        __m512 pair_sums[N] = {};
        for (; i + 32 <= k; i += 32) {
            const __m512bh row = load_raw<__m512bh>(a + i);
            for (int n = 0; n < N; n++)
                pair_sums[n] = _mm512_dpbf16_ps(pair_sums[n], load_raw<__m512bh>(x + n * x_stride + i), row);
        }
        for (int n = 0; n < N; n++) sums[n] = (F32x16)pair_sums[n];
    }
#endif
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
void shrink(const Group<T>& group, const ShrinkPiece& piece) {
    const int64_t k = group.num_inputs, rows = piece.segment->stop - piece.segment->start;
    const T* a = group.a(*piece.segment);
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

// y[N rows, 64 columns] += shrunk[N rows, rank] · b[rank, 64 columns].
template <int N, class T>
inline void expand_rows(const ExpandPiece& piece, const T* b, const float* shrunk, T* y, int64_t y_stride) {
    F32x16 sums[N][4];
    for (int n = 0; n < N; n++)
        for (int v = 0; v < 4; v++) sums[n][v] = load(y + n * y_stride + v * LANES);
    for (int64_t rank = 0; rank < piece.rank; rank++)
        for (int v = 0; v < 4; v++) {
            const F32x16 row = load(b + rank * piece.width + v * LANES);
            for (int n = 0; n < N; n++) sums[n][v] += row * shrunk[n * piece.total_rank + rank];
        }
    for (int n = 0; n < N; n++)
        for (int v = 0; v < 4; v++) store(y + n * y_stride + v * LANES, sums[n][v]);
}

template <class T>
inline void expand_one(const ExpandPiece& piece, const T* b, const float* shrunk, T* y) {
    float total = load_one(y);
    for (int64_t rank = 0; rank < piece.rank; rank++) total += load_one(b + rank * piece.width) * shrunk[rank];
    store_one(y, total);
}

template <class T>
void expand(const Group<T>& group, const ExpandPiece& piece) {
    const int64_t rows = piece.segment->stop - piece.segment->start, stride = group.num_outputs;
    const T* b = static_cast<const T*>(piece.b);
    T* y = group.y + piece.segment->start * stride + piece.y_column;
    int64_t column = 0;
    for (; column + 64 <= piece.columns; column += 64) {
        int64_t row = 0;
        for (; row + ROWS <= rows; row += ROWS)
            expand_rows<ROWS>(piece, b + column, piece.shrunk + row * piece.total_rank, y + row * stride + column, stride);
        for (; row < rows; row++)
            expand_rows<1>(piece, b + column, piece.shrunk + row * piece.total_rank, y + row * stride + column, stride);
    }
    for (; column < piece.columns; column++)
        for (int64_t row = 0; row < rows; row++)
            expand_one(piece, b + column, piece.shrunk + row * piece.total_rank, y + row * stride + column);
}

template <class T>
void add_lora(const Group<T>& group, const Segment* segments, int64_t num_segments) {
    int64_t size = 0;
    for (int64_t s = 0; s < num_segments; s++)
        size += (segments[s].stop - segments[s].start) * group.total_rank(segments[s]);
    std::vector<float> all_shrunk(size);
    std::vector<ShrinkPiece> shrinks;
    std::vector<ExpandPiece> expands;
    float* shrunk = all_shrunk.data();
    for (const Segment* segment = segments; segment != segments + num_segments; segment++) {
        const int64_t total_rank = group.total_rank(*segment);
        for (int64_t rank = 0; rank < total_rank; rank += RANKS)
            shrinks.push_back({segment, rank, std::min(rank + RANKS, total_rank), shrunk, total_rank});
        const T* b = group.a(*segment) + total_rank * group.num_inputs;
        int64_t first_rank = 0, first_column = 0;
        for (int64_t slice = 0; slice < group.num_slices; slice++) {
            const int64_t rank = group.ranks(*segment)[slice], width = group.widths[slice];
            for (int64_t column = 0; rank && column < width; column += COLUMNS)
                expands.push_back({segment, b + column, rank, width, std::min(COLUMNS, width - column),
                                   first_column + column, shrunk + first_rank, total_rank});
            b += rank * width;
            first_rank += rank;
            first_column += width;
        }
        shrunk += (segment->stop - segment->start) * total_rank;
    }
    parallel(int64_t(shrinks.size()), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) shrink(group, shrinks[i]);
    });
    parallel(int64_t(expands.size()), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) expand(group, expands[i]);
    });
}

}  // namespace
}  // namespace onebase

// The contract of add_lora_ in reference.py; all matrices of `dtype`, contiguous.
ONEBASE_EXPORT void onebase_add_lora(
    void* y, const void* x, const void* arena, const int64_t* table, const int64_t* widths, int64_t num_slices,
    int64_t num_inputs, int64_t num_outputs, const onebase::Segment* segments, int64_t num_segments, int32_t dtype) {
    onebase::dispatch(dtype, [&]<class T>() {
        const onebase::Group<T> group{static_cast<const T*>(x), static_cast<T*>(y), static_cast<const T*>(arena),
                                      table, widths, num_slices, num_inputs, num_outputs};
        onebase::add_lora(group, segments, num_segments);
    });
}
