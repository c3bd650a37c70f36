// An adapter's matrices on their way to the arena: converted, scaled, and turned where the kernels read them turned.

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace onebase {

struct Matrix {
    int64_t source;  // of [rows, columns] numbers: bytes from the call's base
    int64_t rows, columns;
    int64_t offset;  // in the target
    float scale;
    int32_t dtype;  // of the source; FLOAT16 too
    int32_t is_transposed;
    int64_t scales;  // of its rows, where in the target, if it is to be kept in 8 bits; else -1
};

namespace {

template <class From, class To>
void copy(const From* from, int64_t count, float scale, To* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i) * scale);
    for (; i < count; i++) store_one(to + i, load_one(from + i) * scale);
}

// A few columns (B has one for each rank), so that 16 rows of them, one run of numbers, stay in the first cache.
template <class From, class To>
void copy_transposed(const From* from, int64_t rows, int64_t columns, float scale, To* to) {
    std::vector<float> sixteen(LANES * columns);
    const I32x16 rows_apart = LANE * int32_t(columns);
    int64_t row = 0;
    for (; row + LANES <= rows; row += LANES) {
        copy(from + row * columns, LANES * columns, scale, sixteen.data());
        for (int64_t column = 0; column < columns; column++)
            store(to + column * rows + row, gather(sixteen.data() + column, rows_apart));
    }
    for (; row < rows; row++)
        for (int64_t column = 0; column < columns; column++)
            store_one(to + column * rows + row, load_one(from + row * columns + column) * scale);
}

template <class From, class To>
void copy(const Matrix& matrix, const From* from, To* to) {
    if (matrix.is_transposed) copy_transposed(from, matrix.rows, matrix.columns, matrix.scale, to);
    else copy(from, matrix.rows * matrix.columns, matrix.scale, to);
}

// A row, times `factor`, in 8 bits, as int8_matrices.py has it; returns its scale.
template <class From>
float encode(const From* row, int64_t count, float factor, uint8_t* bytes) {
    const int64_t whole = count / LANES * LANES;
    F32x16 most{};
    for (int64_t i = 0; i < whole; i += LANES) most = max(most, max(load(row + i), -load(row + i)));
    float largest = 0;
    for (int lane = 0; lane < LANES; lane++) largest = std::max(largest, most[lane]);
    for (int64_t i = whole; i < count; i++) largest = std::max(largest, std::fabs(load_one(row + i)));
    const float steps = largest > 0 ? 127 / largest * std::copysign(1.0f, factor) : 0;
    constexpr float TO_BYTE = (3 << 22) + 128;  // added to a small number, it leaves the nearest integer plus 128 at the end
    for (int64_t i = 0; i < whole; i += LANES) {
        const U8x16 rounded = lowest_bytes((U32x16)(load(row + i) * steps + TO_BYTE));
        std::memcpy(bytes + i, &rounded, sizeof rounded);
    }
    for (int64_t i = whole; i < count; i++) bytes[i] = uint8_t(128 + int32_t(std::nearbyint(load_one(row + i) * steps)));
    return largest * std::fabs(factor) / 127;
}

template <class From>
void encode(const Matrix& matrix, const From* from, float* scales, uint8_t* bytes) {
    if (!matrix.is_transposed) {
        for (int64_t row = 0; row < matrix.rows; row++)
            scales[row] = encode(from + row * matrix.columns, matrix.columns, matrix.scale, bytes + row * matrix.columns);
        return;
    }
    std::vector<float> turned(matrix.rows * matrix.columns);
    copy_transposed(from, matrix.rows, matrix.columns, 1.0f, turned.data());
    for (int64_t row = 0; row < matrix.columns; row++)
        scales[row] = encode(turned.data() + row * matrix.rows, matrix.rows, matrix.scale, bytes + row * matrix.rows);
}

template <class From, class To>
void put(const Matrix& matrix, int64_t base, To* target) {
    const From* from = reinterpret_cast<const From*>(base + matrix.source);
    if (matrix.scales < 0) copy(matrix, from, target + matrix.offset);
    else
        encode(matrix, from, reinterpret_cast<float*>(target + matrix.scales),
               reinterpret_cast<uint8_t*>(target + matrix.offset));
}

}  // namespace
}  // namespace onebase

// The contract of copy_file_matrices_ in reference.py, and of copy_matrices_, where sources are addresses: with a base of
// 0. `dtype` is the target's.
ONEBASE_EXPORT void onebase_copy_matrices(const onebase::Matrix* matrices, int64_t count, int64_t base, void* target,
                                          int32_t dtype) {
    onebase::dispatch(dtype, [&]<class To>() {
        To* numbers = static_cast<To*>(target);
        for (int64_t i = 0; i < count; i++) {
            const onebase::Matrix& matrix = matrices[i];
            if (matrix.dtype == onebase::FLOAT16) onebase::put<onebase::Float16>(matrix, base, numbers);
            else onebase::dispatch(matrix.dtype, [&]<class From>() { onebase::put<From>(matrix, base, numbers); });
        }
    });
}
