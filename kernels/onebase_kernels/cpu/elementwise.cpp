// The small ops between the products: RMS norm, rotary embedding, the gated activation, writing keys and values.

#include "parallel.h"
#include "simd.h"

namespace onebase {
namespace {

// Below so many numbers, waking other threads costs more than they save.
constexpr int64_t WORTH_SHARING = 1 << 14;

template <class Body>
void for_rows(int64_t rows, int64_t numbers_per_row, Body body) {
    if (rows * numbers_per_row < WORTH_SHARING) {
        for (int64_t row = 0; row < rows; row++) body(row);
        return;
    }
    parallel(rows, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) body(row);
    });
}

template <class T>
void rms_norm(const T* x, const T* weight, T* y, int64_t size, float eps) {
    F32x16 squares{};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const F32x16 v = load(x + i);
        squares += v * v;
    }
    float total = sum(squares);
    for (int64_t j = i; j < size; j++) total += load_one(x + j) * load_one(x + j);
    const float factor = 1.0f / __builtin_sqrtf(total / float(size) + eps);
    for (i = 0; i + LANES <= size; i += LANES) store(y + i, round_to<T>(load(x + i) * factor) * load(weight + i));
    for (; i < size; i++) store_one(y + i, round_to<T>(load_one(x + i) * factor) * load_one(weight + i));
}

template <class T>
void rotate(T* head, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const F32x16 a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
        store(head + i, a * c - b * s);
        store(head + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = load_one(head + i), b = load_one(head + half + i);
        store_one(head + i, a * cos[i] - b * sin[i]);
        store_one(head + half + i, b * cos[i] + a * sin[i]);
    }
}

template <class T>
void silu_mul(const T* gate, const T* up, T* y, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const F32x16 g = load(gate + i);
        store(y + i, round_to<T>(g / (exp(-g) + 1.0f)) * load(up + i));
    }
    for (; i < size; i++) {
        const float g = load_one(gate + i);
        store_one(y + i, round_to<T>(g / (__builtin_expf(-g) + 1.0f)) * load_one(up + i));
    }
}

}  // namespace
}  // namespace onebase

// y[rows, size] = x / √(mean(x²) + eps) · weight, all contiguous.
ONEBASE_EXPORT void onebase_rms_norm(
    const void* x, const void* weight, void* y, int64_t rows, int64_t size, float eps, int32_t dtype) {
    onebase::dispatch(dtype, [&]<class T>() {
        onebase::for_rows(rows, size, [&](int64_t row) {
            onebase::rms_norm(static_cast<const T*>(x) + row * size, static_cast<const T*>(weight),
                              static_cast<T*>(y) + row * size, size, eps);
        });
    });
}

// Rotates `heads` heads of each token in place; a token's heads are contiguous, tokens lie token_stride numbers apart.
ONEBASE_EXPORT void onebase_rope(
    void* x, int64_t tokens, int64_t token_stride, int64_t heads, int64_t head_size, const float* cos,
    const float* sin, int32_t dtype) {
    onebase::dispatch(dtype, [&]<class T>() {
        const int64_t half = head_size / 2;
        onebase::for_rows(tokens, heads * head_size, [&](int64_t token) {
            for (int64_t head = 0; head < heads; head++)
                onebase::rotate(static_cast<T*>(x) + token * token_stride + head * head_size, cos + token * half,
                                sin + token * half, half);
        });
    });
}

// y[rows, size] = silu(gate) · up, of gate_up[rows, 2 · size].
ONEBASE_EXPORT void onebase_silu_mul(const void* gate_up, void* y, int64_t rows, int64_t size, int32_t dtype) {
    onebase::dispatch(dtype, [&]<class T>() {
        onebase::for_rows(rows, 4 * size, [&](int64_t row) {
            const T* gate = static_cast<const T*>(gate_up) + row * 2 * size;
            onebase::silu_mul(gate, gate + size, static_cast<T*>(y) + row * size, size);
        });
    });
}

// Copies each token's heads (contiguous, tokens token_stride bytes apart) to its slot of a cache.
ONEBASE_EXPORT void onebase_write_cache(
    const char* x, int64_t tokens, int64_t token_stride, int64_t token_bytes, const int64_t* slots, char* cache) {
    for (int64_t token = 0; token < tokens; token++)
        std::memcpy(cache + slots[token] * token_bytes, x + token * token_stride, token_bytes);
}
