// The small ops between the products: embedding, RMS norm, rotary embedding, gated activation, writing keys and values.

#include "parallel.h"
#include "simd.h"
#include "step.h"

namespace onebase {
namespace {

// Below so many numbers, waking other threads costs more than they save.
constexpr int64_t WORTH_SHARING = 1 << 13;

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
void add(T* x, const T* delta, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(x + i, load(x + i) + load(delta + i));
    for (; i < size; i++) store_one(x + i, load_one(x + i) + load_one(delta + i));
}

template <class T>
void normalize(const T* x, const T* weight, T* y, int64_t size, float eps) {
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

// All pointers of a call are to numbers of `dtype` unless they say otherwise; the formulas are reference.py's.

struct Embed {
    const char* table;
    char* y;
    int64_t row_bytes;
};

struct RmsNorm {
    void* x;            // [rows, heads, size], a row's heads without gaps
    const void* delta;  // added to x first, in place; may be null
    const void* weight;
    void* y;  // [rows, heads, size]
    int64_t x_stride;
    int64_t heads, size;
    float eps;
    int32_t dtype;
};

struct Rope {
    void* x;  // [rows, heads, head_size], a row's heads without gaps
    int64_t x_stride;
    int64_t heads, head_size;
    const float* cos;  // [positions, head_size / 2], as sin
    const float* sin;
    int32_t dtype;
};

struct SiluMul {
    const void* gate_up;  // [rows, 2 · size]
    void* y;
    int64_t size;
    int32_t dtype;
};

// Strides and sizes are bytes here.
struct WriteCache {
    const char* x;  // [rows, heads, head_bytes], a row's heads without gaps
    int64_t x_stride;
    char* cache;  // [blocks, block_size, heads, head_bytes]
    int64_t block_stride, slot_stride, head_stride;
    int64_t block_size, heads, head_bytes;
};

}  // namespace onebase

ONEBASE_EXPORT void onebase_embed(const onebase::Embed* call, const onebase::Step* step) {
    for (int64_t row = 0; row < step->rows; row++)
        std::memcpy(call->y + row * call->row_bytes, call->table + step->token_ids[row] * call->row_bytes,
                    call->row_bytes);
}

ONEBASE_EXPORT void onebase_rms_norm(const onebase::RmsNorm* call, const onebase::Step* step) {
    onebase::dispatch(call->dtype, [&]<class T>() {
        const int64_t width = call->heads * call->size;
        onebase::for_rows(step->rows, width, [&](int64_t row) {
            T* x = static_cast<T*>(call->x) + row * call->x_stride;
            if (call->delta) onebase::add(x, static_cast<const T*>(call->delta) + row * width, width);
            for (int64_t first = 0; first < width; first += call->size)
                onebase::normalize(x + first, static_cast<const T*>(call->weight),
                                   static_cast<T*>(call->y) + row * width + first, call->size, call->eps);
        });
    });
}

ONEBASE_EXPORT void onebase_rope(const onebase::Rope* call, const onebase::Step* step) {
    onebase::dispatch(call->dtype, [&]<class T>() {
        const int64_t half = call->head_size / 2;
        onebase::for_rows(step->rows, call->heads * call->head_size, [&](int64_t row) {
            const int64_t angles = step->positions[row] * half;
            for (int64_t head = 0; head < call->heads; head++)
                onebase::rotate(static_cast<T*>(call->x) + row * call->x_stride + head * call->head_size,
                                call->cos + angles, call->sin + angles, half);
        });
    });
}

ONEBASE_EXPORT void onebase_silu_mul(const onebase::SiluMul* call, const onebase::Step* step) {
    onebase::dispatch(call->dtype, [&]<class T>() {
        const int64_t size = call->size;
        onebase::for_rows(step->rows, 4 * size, [&](int64_t row) {
            const T* gate = static_cast<const T*>(call->gate_up) + row * 2 * size;
            onebase::silu_mul(gate, gate + size, static_cast<T*>(call->y) + row * size, size);
        });
    });
}

ONEBASE_EXPORT void onebase_write_cache(const onebase::WriteCache* call, const onebase::Step* step) {
    for (int64_t row = 0; row < step->rows; row++) {
        const int64_t slot = step->slot_mapping[row];
        char* to = call->cache + slot / call->block_size * call->block_stride + slot % call->block_size * call->slot_stride;
        for (int64_t head = 0; head < call->heads; head++)
            std::memcpy(to + head * call->head_stride, call->x + row * call->x_stride + head * call->head_bytes,
                        call->head_bytes);
    }
}
