// The small ops between the products: embedding, sums, norms, rotary embedding, gated activations, writing keys and values.

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
void scale_row(const T* x, T* y, int64_t size, float scale) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(y + i, load(x + i) * scale);
    for (; i < size; i++) store_one(y + i, load_one(x + i) * scale);
}

template <class T>
void add(T* x, const T* delta, int64_t size, float scale = 1.0f) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(x + i, load(x + i) + load(delta + i) * scale);
    for (; i < size; i++) store_one(x + i, load_one(x + i) + load_one(delta + i) * scale);
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

// The sum of f(x) over a row; f takes sixteen numbers or one.
template <class T, class F>
float sum_of(const T* x, int64_t size, F f) {
    F32x16 sums{};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums += f(load(x + i));
    float total = sum(sums);
    for (; i < size; i++) total += f(load_one(x + i));
    return total;
}

// bias may be null.
template <class T>
void normalize_layer(const T* x, const T* weight, const T* bias, T* y, int64_t size, float eps) {
    const float mean = sum_of(x, size, [](auto v) { return v; }) / float(size);
    const float variance = sum_of(x, size, [&](auto v) { return (v - mean) * (v - mean); }) / float(size);
    const float factor = 1.0f / __builtin_sqrtf(variance + eps);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const F32x16 scaled = (load(x + i) - mean) * factor * load(weight + i);
        store(y + i, bias ? scaled + load(bias + i) : scaled);
    }
    for (; i < size; i++) {
        const float scaled = (load_one(x + i) - mean) * factor * load_one(weight + i);
        store_one(y + i, bias ? scaled + load_one(bias + i) : scaled);
    }
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

// Activations of sixteen numbers or of one.
struct Silu {
    template <class N>
    N operator()(N x) const {
        return x * reciprocal(exp(-x) + 1.0f);
    }
};

// x (1 + tanh(u)) / 2 = x / (1 + e^-2u), with u = √(2 / π) (x + 0.044715 x³).
struct GeluTanh {
    template <class N>
    N operator()(N x) const {
        return x * reciprocal(exp(x * (x * x * -0.0713548163f - 1.5957691216f)) + 1.0f);
    }
};

template <class T, class Activation>
void gate_row(const T* gate, const T* up, T* y, int64_t size, Activation activate) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        store(y + i, round_to<T>(activate(load(gate + i))) * load(up + i));
    for (; i < size; i++)
        store_one(y + i, round_to<T>(activate(load_one(gate + i))) * load_one(up + i));
}

}  // namespace

// All pointers of a call are to numbers of `dtype` unless they say otherwise; the formulas are reference.py's.

struct Embed {
    const char* table;
    char* y;
    int64_t row_bytes;
    float scale;  // 1 for numbers of any type
    int32_t dtype;
};

struct ReplaceRows {
    char* x;  // [rows, row_bytes]
    int64_t row_bytes;
};

struct Add {
    void* x;            // [rows, size]
    const void* delta;  // [rows, size]
    int64_t size;
    float scale;
    int32_t dtype;
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

struct LayerNorm {
    const void* x;  // [rows, size]
    const void* weight;
    const void* bias;  // may be null
    void* y;           // [rows, size]
    int64_t size;
    float eps;
    int32_t dtype;
};

struct Rope {
    void* x;  // [rows, heads, head_size], a row's heads without gaps
    int64_t x_stride;
    int64_t heads, head_size;
    int64_t half;      // of the numbers that are rotated, a head's first ones
    const float* cos;  // [positions, half], as sin
    const float* sin;
    int32_t dtype;
};

struct GatedActivation {
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

namespace {

template <class Activation>
void gate(const GatedActivation& call, const Step& step, Activation activate) {
    dispatch(call.dtype, [&]<class T>() {
        const int64_t size = call.size;
        for_rows(step.rows, 4 * size, [&](int64_t row) {
            const T* gate = static_cast<const T*>(call.gate_up) + row * 2 * size;
            gate_row(gate, gate + size, static_cast<T*>(call.y) + row * size, size, activate);
        });
    });
}

}  // namespace
}  // namespace onebase

ONEBASE_EXPORT void onebase_embed(const onebase::Embed* call, const onebase::Step* step) {
    for (int64_t row = 0; row < step->rows; row++) {
        const char* from = call->table + step->token_ids[row] * call->row_bytes;
        char* to = call->y + row * call->row_bytes;
        if (call->scale == 1.0f) std::memcpy(to, from, call->row_bytes);
        else onebase::dispatch(call->dtype, [&]<class T>() {
            onebase::scale_row((const T*)from, (T*)to, call->row_bytes / int64_t(sizeof(T)), call->scale);
        });
    }
}

ONEBASE_EXPORT void onebase_replace_rows(const onebase::ReplaceRows* call, const onebase::Step* step) {
    for (int64_t i = 0; i < step->num_replaced; i++)
        std::memcpy(call->x + step->replaced_rows[i] * call->row_bytes, step->replacements + i * call->row_bytes,
                    call->row_bytes);
}

ONEBASE_EXPORT void onebase_add(const onebase::Add* call, const onebase::Step* step) {
    onebase::dispatch(call->dtype, [&]<class T>() {
        onebase::for_rows(step->rows, call->size, [&](int64_t row) {
            onebase::add(static_cast<T*>(call->x) + row * call->size,
                         static_cast<const T*>(call->delta) + row * call->size, call->size, call->scale);
        });
    });
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

ONEBASE_EXPORT void onebase_layer_norm(const onebase::LayerNorm* call, const onebase::Step* step) {
    onebase::dispatch(call->dtype, [&]<class T>() {
        onebase::for_rows(step->rows, call->size, [&](int64_t row) {
            onebase::normalize_layer(static_cast<const T*>(call->x) + row * call->size,
                                     static_cast<const T*>(call->weight), static_cast<const T*>(call->bias),
                                     static_cast<T*>(call->y) + row * call->size, call->size, call->eps);
        });
    });
}

ONEBASE_EXPORT void onebase_rope(const onebase::Rope* call, const onebase::Step* step) {
    onebase::dispatch(call->dtype, [&]<class T>() {
        onebase::for_rows(step->rows, call->heads * call->head_size, [&](int64_t row) {
            const int64_t angles = step->positions[row] * call->half;
            for (int64_t head = 0; head < call->heads; head++)
                onebase::rotate(static_cast<T*>(call->x) + row * call->x_stride + head * call->head_size,
                                call->cos + angles, call->sin + angles, call->half);
        });
    });
}

ONEBASE_EXPORT void onebase_silu_mul(const onebase::GatedActivation* call, const onebase::Step* step) {
    onebase::gate(*call, *step, onebase::Silu{});
}

ONEBASE_EXPORT void onebase_gelu_mul(const onebase::GatedActivation* call, const onebase::Step* step) {
    onebase::gate(*call, *step, onebase::GeluTanh{});
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
