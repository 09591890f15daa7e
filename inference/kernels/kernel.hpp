// Shared by the kernels: vectors of 16 numbers, bfloat16, and e^x. Vector extensions of GCC and Clang, for any CPU.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;

typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

struct bf16 { uint16_t bits; };

inline floats load(const float* p) { return *reinterpret_cast<const floats*>(p); }
inline floats load(const bf16* p) {
#if defined(__AVX512F__)
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
    words wide = __builtin_convertvector(*reinterpret_cast<const halves*>(p), words) << 16;
    return (floats)wide;  // the same bits
#endif
}
inline floats load(const int8_t* p) {
#if defined(__AVX512F__)  // compilers translate the line below to code ten times slower
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const bytes*>(p), ints), floats);
#endif
}
inline float widen(bf16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline void store(float* p, floats v) { *reinterpret_cast<floats*>(p) = v; }
inline void store(bf16* p, float v) {  // rounded to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    p->bits = std::isnan(v) ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float sum(floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

// e^x to about two units in the last place: 2^n times a polynomial of the rest. Beyond 87 it is infinite, below -87 e^-87;
// NaN stays NaN.
inline __attribute__((always_inline)) floats exp(floats of) {
#if defined(__AVX512F__)
    const floats x = (floats)_mm512_min_ps(_mm512_set1_ps(87.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), (__m512)of));
    const floats n = (floats)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    floats x = of < -87.0f ? floats{} - 87.0f : of;
    x = x > 87.0f ? floats{} + 87.0f : x;
    const floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
#endif
    floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
    p = (floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    p *= (floats)((__builtin_convertvector(n, ints) + 127) << 23);
#endif
    return of > 87.0f ? floats{} + INFINITY : p;
}

inline floats silu(floats x) {
    x = x < -87.0f ? floats{} - 87.0f : x;  // where it is 0 for all purposes, and the reciprocal still a number
    const floats below = 1.0f + exp(-x);
#if defined(__AVX512F__)
    const floats guess = (floats)_mm512_rcp14_ps((__m512)below);  // a division takes three times as long
    return x * (guess * (2.0f - below * guess));
#else
    return x / below;
#endif
}

}  // namespace
