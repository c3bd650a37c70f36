// Sixteen numbers at a time, whatever the machine: GCC's vector types, with intrinsics where the compiler needs help.
//
// Every source file is compiled once per instruction set (see build.py); what differs between them is here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace onebase {

constexpr int64_t LANES = 16;

typedef float F32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));
typedef uint8_t U8x16 __attribute__((vector_size(16)));
typedef int8_t I8x16 __attribute__((vector_size(16)));

// A bfloat16 number: the upper half of a float.
struct BFloat16 {
    uint16_t bits;
};

// Only read: nothing computes in it.
struct Float16 {
    _Float16 value;
};

// A number of an adapter's matrix in 8 bits: its row's scale times (byte − 128). What is loaded is without the scale.
struct Int8Code {
    uint8_t byte;
};

template <class Vector, class T>
inline Vector load_raw(const T* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline F32x16 broadcast(float value) { return F32x16{} + value; }

// GCC widens a vector half by half.
inline U32x16 widen_integers(U16x16 v) {
#if defined(__AVX512F__)
    return (U32x16)_mm512_cvtepu16_epi32((__m256i)v);
#else
    return __builtin_convertvector(v, U32x16);
#endif
}
inline U32x16 widen_integers(U8x16 v) {
#if defined(__AVX512F__)
    return (U32x16)_mm512_cvtepu8_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, U32x16);
#endif
}

// The lowest byte of each; also this GCC does piece by piece.
inline U8x16 lowest_bytes(U32x16 v) {
#if defined(__AVX512F__)
    return (U8x16)_mm512_cvtepi32_epi8((__m512i)v);
#else
    return __builtin_convertvector(v, U8x16);
#endif
}

inline F32x16 widen(U16x16 bits) { return (F32x16)(widen_integers(bits) << 16); }

// Rounds to nearest, ties to even, as torch does.
inline U16x16 narrow(F32x16 v) {
#if defined(__AVX512BF16__)
    return (U16x16)_mm512_cvtneps_pbh((__m512)v);
#else
    const U32x16 bits = (U32x16)v;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, U16x16);
#endif
}

inline F32x16 load(const int8_t* from) {
#if defined(__AVX512F__)
    return (F32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    return __builtin_convertvector(__builtin_convertvector(load_raw<I8x16>(from), I32x16), F32x16);
#endif
}
inline F32x16 load(const Int8Code* from) {
    const U32x16 bytes = widen_integers(load_raw<U8x16>(from));
#if defined(__AVX512F__)
    return (F32x16)_mm512_cvtepi32_ps((__m512i)bytes) - 128.0f;
#else
    return __builtin_convertvector((I32x16)bytes, F32x16) - 128.0f;
#endif
}
inline F32x16 load(const float* from) { return load_raw<F32x16>(from); }
inline F32x16 load(const BFloat16* from) { return widen(load_raw<U16x16>(from)); }
inline F32x16 load(const Float16* from) {
#if defined(__AVX512F__)
    return (F32x16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
    F32x16 v;
    for (int i = 0; i < LANES; i++) v[i] = float(from[i].value);
    return v;
#endif
}
inline void store(float* to, F32x16 v) { std::memcpy(to, &v, sizeof v); }
inline void store(BFloat16* to, F32x16 v) {
    const U16x16 bits = narrow(v);
    std::memcpy(to, &bits, sizeof bits);
}

// 32 numbers: a whole line of bfloat16.
inline void store_two(float* to, F32x16 first, F32x16 second) {
    store(to, first);
    store(to + LANES, second);
}
inline void store_two(BFloat16* to, F32x16 first, F32x16 second) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
    store(to, first);
    store(to + LANES, second);
#endif
}

// Single numbers, for what is left of a row after its last sixteen.
inline float load_one(const float* from) { return *from; }
inline float load_one(const BFloat16* from) {
    const uint32_t bits = uint32_t(from->bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float load_one(const Float16* from) { return float(from->value); }
inline float load_one(const Int8Code* from) { return float(from->byte) - 128.0f; }
inline void store_one(float* to, float value) { *to = value; }
inline void store_one(BFloat16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
template <class T>
inline float round_to(float value) {
    T rounded;
    store_one(&rounded, value);
    return load_one(&rounded);
}
template <class T>
inline F32x16 round_to(F32x16 v) {
    if constexpr (sizeof(T) == sizeof(float)) return v;
    else return widen(narrow(v));
}

inline float sum(F32x16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

// The sums of 16 vectors, one in each lane: halves are added crosswise, four times.
inline F32x16 sums(const F32x16 (&vectors)[16]) {
    F32x16 eight[8], four[4], two[2];
    for (int i = 0; i < 8; i++)
        eight[i] = __builtin_shufflevector(vectors[i], vectors[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   __builtin_shufflevector(vectors[i], vectors[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        four[i] = __builtin_shufflevector(eight[i], eight[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                  __builtin_shufflevector(eight[i], eight[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        two[i] = __builtin_shufflevector(four[i], four[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                 __builtin_shufflevector(four[i], four[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return __builtin_shufflevector(two[0], two[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(two[0], two[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// b where a is not a number, which is how the machine's own have it too.
inline F32x16 max(F32x16 a, F32x16 b) {
#if defined(__AVX512F__)
    return (F32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}
inline F32x16 min(F32x16 a, F32x16 b) {
#if defined(__AVX512F__)
    return (F32x16)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}

// 1 / x, but for the last bit.
inline F32x16 reciprocal(F32x16 x) {
#if defined(__AVX512F__)
    const F32x16 estimate = (F32x16)_mm512_rcp14_ps((__m512)x);  // division takes as long as a dozen products
    return estimate * (2.0f - x * estimate);
#else
    return 1.0f / x;
#endif
}
inline float reciprocal(float x) { return 1.0f / x; }

// table[index mod 16], lane by lane.
inline F32x16 lookup(F32x16 table, U32x16 index) {
#if defined(__AVX512F__)
    return (F32x16)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
    __m256 low, high;
    std::memcpy(&low, &table, 32);
    std::memcpy(&high, (const char*)&table + 32, 32);
    F32x16 result;
    for (int half = 0; half < 2; half++) {
        __m256i i;
        std::memcpy(&i, (const char*)&index + 32 * half, 32);
        const __m256 use_high = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // bit 3 to the sign
        const __m256 v = _mm256_blendv_ps(
            _mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), use_high);
        std::memcpy((char*)&result + 32 * half, &v, 32);
    }
    return result;
#else
    F32x16 result;
    for (int i = 0; i < LANES; i++) result[i] = table[index[i] & 15];
    return result;
#endif
}

inline const I32x16 LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// table[index], lane by lane, for tables of any length.
inline F32x16 gather(const float* table, I32x16 index) {
#if defined(__AVX512F__)
    return (F32x16)_mm512_i32gather_ps((__m512i)index, table, 4);
#else
    F32x16 result;
    for (int i = 0; i < LANES; i++) result[i] = table[index[i]];
    return result;
#endif
}

// e^x to about 2 units in the last place (Cephes' polynomial); below -87 it is 0, above 88 e^88.
inline F32x16 exp(F32x16 x) {
    constexpr float TO_INTEGER = 3 << 22;  // added to a small number, it leaves the nearest integer in the lowest bits
    const F32x16 clamped = min(max(x, broadcast(-87.0f)), broadcast(88.0f));
    const F32x16 shifted = clamped * 1.44269504088896341f + TO_INTEGER;
    const F32x16 whole = shifted - TO_INTEGER;
    const F32x16 r = clamped - whole * 0.693359375f - whole * -2.12194440e-4f;
    F32x16 p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const F32x16 result = (F32x16)((I32x16)p + ((I32x16)shifted << 23));  // times 2 to the power of that integer
    return x < -87.0f ? F32x16{} : result;
}
inline float exp(float x) { return __builtin_expf(x); }

// tanh(x) to about 1e-7.
inline F32x16 tanh(F32x16 x) {
    const F32x16 e = exp(max(x, -x) * -2.0f);
    const F32x16 magnitude = (1.0f - e) / (1.0f + e);
    return x < 0 ? -magnitude : magnitude;
}

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Calls `body.template operator()<T>()` with the element type, which is computed in, that a code of the C interface is.

template <class Body>
inline void dispatch(int32_t dtype, Body body) {
    if (dtype == BFLOAT16) body.template operator()<BFloat16>();
    else body.template operator()<float>();
}

}  // namespace onebase

#define ONEBASE_EXPORT extern "C" __attribute__((visibility("default")))
