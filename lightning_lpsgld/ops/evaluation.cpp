// One pass over memory for what stands between two layers in evaluation: cast, batch norm, ReLU, cast.
//
// A sample (or 16,384 elements, where samples share no exponent) is read, goes through all of it in the cache, and is
// written as codes or floats. ops/evaluation.py is the definition; rounding is to nearest, nothing is drawn. A number
// that is not finite, or an exponent whose power of two is no normal float, is left to the definition: the call says so.
// The vector code is compiled once per instruction set: the file includes itself. The batch norm is torch's: one fused
// multiply-add with a scale and a shift per channel, exact in all of them (where there is no such instruction it is made
// in double, whose second rounding is seen once in 2^29).

#ifndef LPSGLD_EVALUATION  // ======================= common to all instruction sets =======================

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(_WIN32)
#define EXPORT extern "C" __attribute__((dllexport))
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

namespace lpsgld {

int vector_level();                                                                    // cpu.cpp
void in_parallel(int threads, int64_t items, void (*work)(void *, int64_t), void *);  // cpu.cpp

// Mirrors of the ctypes structures in evaluation.py.
struct Grid {
  int32_t present, shared;          // shared: one exponent a sample, else gap = 2^offset
  int32_t offset, low, high, carry;  // as Format in cpu.cpp
  float code_min, code_max;
};
struct Chain {
  const float *x;
  float *values;  // one of values and codes is null
  int8_t *codes, *exponents;
  const float *scale, *shift;  // per channel, or null
  int64_t samples, channels, pixels;
  int32_t channels_last, relu;
  Grid first, last;
};

namespace evaluation {

constexpr int32_t INFINITE = 0x7f800000;

struct Work {
  const Chain *chain;
  int64_t pieces, length;  // pieces of a sample, of so many elements
  std::atomic<int> refused;
  bool (*piece)(const Chain &, int64_t start, int64_t n, float *buffer);
};

INLINE int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
INLINE float power_of_two(int k) {
  int32_t bits = (k + 127) << 23;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
INLINE bool is_normal(int k) { return k > -126 && k < 126; }

// Exponent of a block rounded to nearest, from the bits of its largest magnitude; as exponent_for_nearest in cpu.cpp.
INLINE int exponent_of(const Grid &g, int32_t peak) {
  if (!g.shared) return 0;
  int e = peak ? (peak >> 23 ? (peak >> 23) - 127 : -127) : g.low;
  e = e < g.low ? g.low : e > g.high ? g.high : e;
  float magnitude;
  memcpy(&magnitude, &peak, 4);
  const bool raised = g.carry && e < g.high && std::ldexp(double(magnitude), -(e + g.offset)) >= double(g.code_max) + 0.5;
  return e + raised;
}

}  // namespace evaluation
}  // namespace lpsgld

#define LPSGLD_EVALUATION baseline
#include "evaluation.cpp"
#undef LPSGLD_EVALUATION
#if defined(__x86_64__) && !defined(__clang__)
#define LPSGLD_EVALUATION_TARGETS
#define LPSGLD_FUSED
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LPSGLD_EVALUATION avx2
#include "evaluation.cpp"
#undef LPSGLD_EVALUATION
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#define LPSGLD_EVALUATION avx512
#include "evaluation.cpp"
#undef LPSGLD_EVALUATION
#pragma GCC pop_options
#endif

namespace lpsgld {
namespace evaluation {

static void work_on(void *context, int64_t item) {
  Work &work = *static_cast<Work *>(context);
  const Chain &c = *work.chain;
  static thread_local std::vector<float> buffer;
  const int64_t whole = c.channels * c.pixels, start = item % work.pieces * work.length;
  const int64_t n = start + work.length < whole ? work.length : whole - start;
  float *room = nullptr;
  if (!c.values) {
    if (int64_t(buffer.size()) < n) buffer.resize(size_t(n));
    room = buffer.data();
  }
  if (!work.piece(c, item / work.pieces * whole + start, n, room)) work.refused.store(1);
}

}  // namespace evaluation
}  // namespace lpsgld

EXPORT int lpsgld_chain_size() { return int(sizeof(lpsgld::Chain)); }

// Scale and shift of a batch norm in evaluation; weight and bias may be null. Returns 1 if one is not finite.
EXPORT int lpsgld_norm(const float *mean, const float *variance, const float *weight, const float *bias, double eps,
                       float *scale, float *shift, int64_t channels) {
  bool finite = true;
  for (int64_t c = 0; c < channels; c++) {
    scale[c] = 1.0f / std::sqrt(variance[c] + float(eps)) * (weight ? weight[c] : 1.0f);
    shift[c] = std::fma(-mean[c], scale[c], bias ? bias[c] : 0.0f);
    finite &= std::isfinite(scale[c]) && std::isfinite(shift[c]);
  }
  return !finite;
}

// Returns 0, or 1 where the definition has to do it: nothing of the result is valid then.
EXPORT int lpsgld_chain(const lpsgld::Chain *chain, int threads) {
  using namespace lpsgld::evaluation;
  const lpsgld::Chain &c = *chain;
  const bool shared = (c.first.present && c.first.shared) || (c.last.present && c.last.shared);
  const int64_t whole = c.channels * c.pixels, unit = c.channels_last ? c.channels : c.pixels;
  Work work{chain, 1, whole, {0}, baseline::piece};
#if defined(LPSGLD_EVALUATION_TARGETS)
  const int level = lpsgld::vector_level();
  if (level >= 1 && __builtin_cpu_supports("fma")) work.piece = level == 2 ? avx512::piece : avx2::piece;
#endif
  if (!shared && whole > 16384) {
    work.length = unit * (16384 / unit ? 16384 / unit : 1);
    work.pieces = (whole + work.length - 1) / work.length;
  }
  lpsgld::in_parallel(c.samples * whole < 16384 ? 1 : threads, c.samples * work.pieces, work_on, &work);
  return work.refused.load();
}

#else  // ======================= vector code, once per instruction set =======================

namespace lpsgld {
namespace evaluation {
namespace LPSGLD_EVALUATION {

INLINE float fused(float x, float a, float b) {
#if defined(LPSGLD_FUSED)
  return __builtin_fmaf(x, a, b);
#else
  return float(double(x) * double(a) + double(b));  // the product of two floats is exact in double
#endif
}

static int32_t peak_of(const float *x, int64_t n) {
  int32_t peak = 0;
  for (int64_t i = 0; i < n; i++) {
    const int32_t bits = bits_of(x[i]) & 0x7fffffff;
    peak = bits > peak ? bits : peak;
  }
  return peak;
}

struct Rounding {
  float up, gap, low, high;
};
// The code, as a float that is never -0.
INLINE float code_of(float x, const Rounding &r) {
  float a = x * r.up;
  a = a < r.low ? r.low : a;
  a = a > r.high ? r.high : a;
  return ((a + 0x1.8p23f) - 0x1.8p23f) + 0.0f;
}
INLINE Rounding rounding(const Grid &g, int gap) {
  return {power_of_two(-gap), power_of_two(gap), g.code_min, g.code_max};
}

template <bool FIRST, bool NORM, bool RELU> INLINE float between(float x, const Rounding &r, float a, float b) {
  if (FIRST) x = code_of(x, r) * r.gap;
  if (NORM) x = fused(x, a, b);
  return RELU && !(x > 0.0f) ? 0.0f : x;
}

// What stands between the first rounding and the last, of n elements from `start`; returns the largest magnitude's bits.
template <bool FIRST, bool NORM, bool RELU>
static int32_t middle(const Chain &c, int64_t start, int64_t n, const Rounding &r, float *out) {
  const float *x = c.x + start;
  if (!NORM) {
    for (int64_t i = 0; i < n; i++) out[i] = between<FIRST, false, RELU>(x[i], r, 0, 0);
  } else if (c.channels_last) {
    for (int64_t i = 0; i < n; i += c.channels)
      for (int64_t k = 0; k < c.channels; k++)
        out[i + k] = between<FIRST, true, RELU>(x[i + k], r, c.scale[k], c.shift[k]);
  } else {
    for (int64_t i = 0, k = start / c.pixels % c.channels; i < n; i += c.pixels, k++) {
      const float a = c.scale[k], b = c.shift[k];
      for (int64_t p = 0; p < c.pixels; p++) out[i + p] = between<FIRST, true, RELU>(x[i + p], r, a, b);
    }
  }
  return peak_of(out, n);
}

template <bool FIRST, bool NORM>
static int32_t with_relu(const Chain &c, int64_t start, int64_t n, const Rounding &r, float *out) {
  return c.relu ? middle<FIRST, NORM, true>(c, start, n, r, out) : middle<FIRST, NORM, false>(c, start, n, r, out);
}

static bool piece(const Chain &c, int64_t start, int64_t n, float *buffer) {
  float *y = c.values ? c.values + start : buffer;
  Rounding r{};
  const int32_t before = peak_of(c.x + start, n);
  if (before >= INFINITE) return false;
  if (c.first.present) {
    const int gap = exponent_of(c.first, before) + c.first.offset;
    if (!is_normal(gap)) return false;
    r = rounding(c.first, gap);
  }
  int32_t peak;
  if (c.first.present)
    peak = c.scale ? with_relu<true, true>(c, start, n, r, y) : with_relu<true, false>(c, start, n, r, y);
  else
    peak = c.scale ? with_relu<false, true>(c, start, n, r, y) : with_relu<false, false>(c, start, n, r, y);
  if (peak >= INFINITE) return false;
  if (!c.last.present) return true;
  const int e = exponent_of(c.last, peak), gap = e + c.last.offset;
  if (!is_normal(gap)) return false;
  r = rounding(c.last, gap);
  if (c.values) {
    for (int64_t i = 0; i < n; i++) y[i] = code_of(y[i], r) * r.gap;
  } else {
    int8_t *codes = c.codes + start;
    for (int64_t i = 0; i < n; i++) codes[i] = int8_t(int32_t(code_of(y[i], r)));
  }
  if (c.exponents && c.last.shared) c.exponents[start / (c.channels * c.pixels)] = int8_t(e);
  return true;
}

}  // namespace LPSGLD_EVALUATION
}  // namespace evaluation
}  // namespace lpsgld
#endif
