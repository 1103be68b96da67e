// Epochs of SVRG for linear models, with 8-bit data and offsets (HALP) and with float32 ones: the same algorithm twice.
//
// Plain C++17 behind a C interface, loaded with ctypes by kernels.py; fallback.py is the definition in numpy.
// With margins m_i = x_i.u cached at the centre, both need of every row one dot product with the offset z and one
// accumulation into the gradient; what differs is the bytes read. Words: the *outer* pass moves the centre and takes the
// full gradient, the *inner* one goes through mini-batches (*blocks* of consecutive rows) in a given order.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_X86 1
#define TARGET(x) __attribute__((target(x)))
#else
#define HAVE_X86 0
#endif
#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#define ALWAYS_INLINE inline
#else
#define ALWAYS_INLINE __attribute__((always_inline)) inline
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

// Mirror of the ctypes structure in kernels.py. `d` is a multiple of 64; padding columns are zero.
struct Problem {
  const void* x;       // (n, d) int8 codes or float32
  const float* y;      // targets; for logistic loss -1 or 1
  double* margin;      // (n,) x_i.u at the centre
  float* odds;         // (n,) exp(y_i margin_i), for the logistic loss
  double* residual;    // (n,) derivative of the loss at the centre, as far as it is in `full` (see outer_low)
  double* full;        // (d,) sum of residual_i x_i
  void* offset;        // (d,) int8 codes or float32
  const float* drift;  // (d,) (lr full/n + a centre) / gap, a = lr * penalty: constant in an epoch
  const float* shrink; // (d,) 1 / (1 + a)
  const int32_t* order;  // (blocks,) of `batch` rows each, in the order in which they are read
  int64_t n, d, batch, blocks, first_step;
  uint64_t seed;
  double gap, unit, lr;  // value of one offset code, of one data code
  int32_t loss;          // 0: (m - y)^2 / 2, 1: log(1 + exp(-y m))
  int32_t draws;         // 0 rounds to nearest: only to time the draws
  int32_t threads, level;  // level 0: portable, 1: AVX2, 2: AVX-512 with VNNI
};

// ------------------------------------------------------------------------------------------------------- pieces

// Bytes that are wanted soon, on their way into the second-level cache: whoever computes fetches some lines now and then,
// so that memory is never waited for and never idle.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  template <class T>
  static Ahead of(const T* x, int64_t count) {
    return {reinterpret_cast<const char*>(x), reinterpret_cast<const char*>(x + count)};
  }
  ALWAYS_INLINE void fetch(int lines) {
#if HAVE_X86
    if (at >= end) return;
    for (int k = 0; k < lines; ++k) _mm_prefetch(at + 64 * k, _MM_HINT_T1);
    at += 64 * lines;
#endif
  }
};

// A meeting in two halves: between `arrive` and `wait` a thread does what needs nothing of the others. Each tells its
// turns on a cache line of its own.
class Meeting {
 public:
  explicit Meeting(int count) : turns_(count) {}
  void arrive(int t, int64_t turn) { turns_[t].turn.store(turn, std::memory_order_release); }
  void wait(int64_t turn) const {
    for (const Turn& other : turns_)
      for (int spins = 0; other.turn.load(std::memory_order_acquire) < turn; ++spins)
        if (spins > 2000) std::this_thread::yield();
  }

 private:
  struct Turn {
    std::atomic<int64_t> turn{0};
    char rest[128 - sizeof(std::atomic<int64_t>)];
  };
  std::vector<Turn> turns_;
};

// An array on a cache line's boundary: no load of a vector register then crosses one.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : raw_(count + 64 / sizeof(T)) {
    const auto address = reinterpret_cast<uintptr_t>(raw_.data());
    at_ = raw_.data() + ((address + 63) / 64 * 64 - address) / sizeof(T);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return at_; }
  T& operator[](int64_t i) const { return at_[i]; }

 private:
  std::vector<T> raw_;
  T* at_;
};

// Words of Philox4x32-10 for counters (k, 0, stream, step), `count` a multiple of 64: word 64 * j + 16 * w + lane is the
// w-th of counter 16 * j + lane.
inline void philox_plain(uint32_t* out, int64_t count, uint32_t step, uint32_t stream, uint64_t seed) {
  for (int64_t j = 0; j < count; j += 64) {
    uint32_t c0[16], c1[16], c2[16], c3[16];
    for (int l = 0; l < 16; ++l) c0[l] = uint32_t(j / 4 + l), c1[l] = 0, c2[l] = stream, c3[l] = step;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int l = 0; l < 16; ++l) {
        const uint64_t p0 = uint64_t(c0[l]) * 0xD2511F53u, p1 = uint64_t(c2[l]) * 0xCD9E8D57u;
        c0[l] = uint32_t(p1 >> 32) ^ c1[l] ^ k0;
        c1[l] = uint32_t(p1);
        c2[l] = uint32_t(p0 >> 32) ^ c3[l] ^ k1;
        c3[l] = uint32_t(p0);
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    std::memcpy(out + j, c0, 64), std::memcpy(out + j + 16, c1, 64);
    std::memcpy(out + j + 32, c2, 64), std::memcpy(out + j + 48, c3, 64);
  }
}

inline float round_up_if(float value, float uniform) {
  const float lower = std::floor(value);
  return lower + (uniform < value - lower ? 1.0f : 0.0f);
}

// exp(x) - 1 for |x| <= 60, within some units in the last place, without branches: x = n ln 2 + r, and the power series
// of r, which is all there is where n = 0, so that small x lose nothing.
ALWAYS_INLINE float exp_minus_one(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float series = 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f}) series = series * r + c;
  uint32_t bits;  // unsigned: the bits that leave on the left are those of the shift's own exponent
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return power * (series * r) + (power - 1.0f);
}

// Change of the logistic loss's derivative when a margin moves by `change`; no cancellation however small that is.
// With E = exp(y m) cached at the centre: y (1/(1+E) - 1/(1+Ee)), e = exp(y change).
ALWAYS_INLINE void respond_plain(const float* y, const float* odds, const float* change, float factor, int64_t rows,
                                 float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    float moved = y[i] * change[i];
    moved = moved < -60.0f ? -60.0f : moved > 60.0f ? 60.0f : moved;
    const float less = exp_minus_one(moved), slope = y[i] * (odds[i] / (1.0f + odds[i]));
    out[i] = factor * slope * (less / (1.0f + odds[i] * (1.0f + less)));
  }
}

// ------------------------------------------------------------------------ dot products and accumulation, portable

inline void dots_int8_plain(const int8_t* x, int64_t rows, int64_t d, const int8_t* z, int32_t* out, Ahead&) {
  for (int64_t i = 0; i < rows; ++i) {
    int32_t sum = 0;
    for (int64_t j = 0; j < d; ++j) sum += int32_t(x[i * d + j]) * z[j];
    out[i] = sum;
  }
}

inline void sums_int8_plain(const int8_t* x, int64_t rows, int64_t d, const int8_t* q, int32_t* out, Ahead&) {
  std::memset(out, 0, d * sizeof(int32_t));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < d; ++j) out[j] += int32_t(x[i * d + j]) * q[i];
}

// See `move_low`.
inline int64_t move_low_plain(int8_t* z, const float* g, const float* drift, const float* shrink, const uint32_t* words,
                              int64_t d) {
  int64_t outside = 0;
  for (int64_t j = 0; j < d; ++j) {
    const float value = round_up_if((z[j] - g[j] - drift[j]) * shrink[j], float(words[j] >> 8) / 16777216.0f);
    outside += std::fabs(value) > 127.0f;
    z[j] = int8_t(value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value);
  }
  return outside;
}

// Codes of weights in units of `1 / inverse`, rounded stochastically.
inline void code_weights_plain(const float* weights, float inverse, const uint32_t* bits, int64_t rows, int8_t* codes) {
  for (int64_t i = 0; i < rows; ++i) codes[i] = int8_t(round_up_if(weights[i] * inverse, float(bits[i] >> 8) / 16777216.0f));
}

inline void dots_float_plain(const float* x, int64_t rows, int64_t d, const float* z, float* out, Ahead&) {
  for (int64_t i = 0; i < rows; ++i) {
    float lane[32] = {};
    for (int64_t j = 0; j < d; j += 32)
      for (int l = 0; l < 32; ++l) lane[l] += x[i * d + j + l] * z[j + l];
    float sum = 0;
    for (float part : lane) sum += part;
    out[i] = sum;
  }
}

inline void sums_float_plain(const float* x, int64_t rows, int64_t d, const float* q, float* out, Ahead&) {
  for (int64_t j = 0; j < d; j += 64) {
    float lane[64];
    std::memcpy(lane, out + j, sizeof lane);
    for (int64_t i = 0; i < rows; ++i)
      for (int l = 0; l < 64; ++l) lane[l] += x[i * d + j + l] * q[i];
    std::memcpy(out + j, lane, sizeof lane);
  }
}

#if HAVE_X86
// ------------------------------------------------------------------------------------------------------- AVX2

#define AVX2 "avx2,fma"

// Sums of the lanes of four vectors.
TARGET(AVX2) inline __m128i hsum256(const __m256i* v) {
  const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

// vpmaddubsw takes unsigned by signed bytes: |w| times x with w's sign. Pairs fit into 16 bits, as no |x| is above 127 and
// no |w| above 128. `weights` and `sizes` are w and |w|.
TARGET(AVX2) ALWAYS_INLINE __m256i products(__m256i x, __m256i weights, __m256i sizes) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(sizes, _mm256_sign_epi8(x, weights)), _mm256_set1_epi16(1));
}

TARGET(AVX2) void dots_int8_avx2(const int8_t* x, int64_t rows, int64_t d, const int8_t* z, int32_t* out,
                                 Ahead& ahead) {
  Ahead next = ahead;
  for (int64_t i = 0; i < rows; i += 4) {
    __m256i s[4] = {};
    const int64_t left = rows - i < 4 ? rows - i : 4;
    const int8_t* p[4];
    for (int k = 0; k < 4; ++k) p[k] = x + (i + (k < left ? k : 0)) * d;
    for (int64_t j = 0; j < d; j += 32) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(z + j)), size = _mm256_abs_epi8(w);
      next.fetch(1);
      for (int k = 0; k < 4; ++k) {
        const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p[k] + j));
        s[k] = _mm256_add_epi32(s[k], products(row, w, size));
      }
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), hsum256(s));
  }
  ahead = next;
}

// Rows whose weights have one sign, by fours: so the size of a weight is the unsigned factor, and the sign is that of the
// addition. What is missing to a four is a row times zero. Without branches, as signs are as good as random.
struct Fours {
  std::vector<const int8_t*> row;
  std::vector<uint8_t> size;
  int64_t count = 0;
  void gather(const int8_t* x, int64_t rows, int64_t d, const int8_t* q, int sign) {
    row.resize(rows + 4), size.resize(rows + 4);
    const int8_t** to = row.data();
    uint8_t* sizes = size.data();
    int64_t found = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const int weight = q[i] * sign;
      to[found] = x + i * d, sizes[found] = uint8_t(weight);
      found += weight > 0;
    }
    count = (found + 3) / 4;
    for (; found < 4 * count; ++found) to[found] = x, sizes[found] = 0;
  }
};

// sums +- rows of up to 4 fours from column j on. Four rows' bytes of one column come side by side in a 32-bit lane.
template <int Sign>
TARGET(AVX2) ALWAYS_INLINE void add_fours(__m256i* sums, const int8_t* const* row, const uint8_t* sizes, int64_t fours,
                                          int64_t j, Ahead& next) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i s[4];
  for (int k = 0; k < 4; ++k) s[k] = _mm256_load_si256(sums + k);
  for (int64_t f = 0; f < fours; ++f) {
    __m256i r[4];
    for (int k = 0; k < 4; ++k) r[k] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[4 * f + k] + j));
    next.fetch(1);
    const __m256i a = _mm256_unpacklo_epi8(r[0], r[1]), b = _mm256_unpacklo_epi8(r[2], r[3]);
    const __m256i c = _mm256_unpackhi_epi8(r[0], r[1]), e = _mm256_unpackhi_epi8(r[2], r[3]);
    const __m256i t[4] = {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b), _mm256_unpacklo_epi16(c, e),
                          _mm256_unpackhi_epi16(c, e)};
    int32_t packed;
    std::memcpy(&packed, sizes + 4 * f, 4);
    const __m256i w = _mm256_set1_epi32(packed);
    for (int k = 0; k < 4; ++k) {
      const __m256i part = _mm256_madd_epi16(_mm256_maddubs_epi16(w, t[k]), ones);
      s[k] = Sign > 0 ? _mm256_add_epi32(s[k], part) : _mm256_sub_epi32(s[k], part);
    }
  }
  for (int k = 0; k < 4; ++k) _mm256_store_si256(sums + k, s[k]);
}

template <int Sign>
TARGET(AVX2) inline void add_signed_avx2(const Fours& some, int64_t d, int32_t* out, Ahead& ahead) {
  Ahead next = ahead;
  for (int64_t f = 0; f < some.count; f += 4) {
    const int8_t* const* row = some.row.data() + 4 * f;
    for (int64_t j = 0; j < d; j += 32) {
      __m256i* const sums = reinterpret_cast<__m256i*>(out + j);
      if (f + 4 <= some.count) add_fours<Sign>(sums, row, some.size.data() + 4 * f, 4, j, next);
      else add_fours<Sign>(sums, row, some.size.data() + 4 * f, some.count - f, j, next);
    }
  }
  ahead = next;
}

TARGET(AVX2) void sums_int8_avx2(const int8_t* x, int64_t rows, int64_t d, const int8_t* q, int32_t* out,
                                 Ahead& ahead) {
  static thread_local Fours some;
  std::memset(out, 0, d * sizeof(int32_t));
  some.gather(x, rows, d, q, 1);
  add_signed_avx2<1>(some, d, out, ahead);
  some.gather(x, rows, d, q, -1);
  add_signed_avx2<-1>(some, d, out, ahead);
  // Unpacking works within 128-bit lanes: lane L of s[k] holds columns 16 L + 4 k .. 16 L + 4 k + 3.
  __m256i* const sums = reinterpret_cast<__m256i*>(out);
  for (int64_t j = 0; j < d / 8; j += 4) {
    __m256i s[4];
    for (int k = 0; k < 4; ++k) s[k] = _mm256_load_si256(sums + j + k);
    _mm256_store_si256(sums + j, _mm256_permute2x128_si256(s[0], s[1], 0x20));
    _mm256_store_si256(sums + j + 1, _mm256_permute2x128_si256(s[2], s[3], 0x20));
    _mm256_store_si256(sums + j + 2, _mm256_permute2x128_si256(s[0], s[1], 0x31));
    _mm256_store_si256(sums + j + 3, _mm256_permute2x128_si256(s[2], s[3], 0x31));
  }
}

TARGET(AVX2) inline float hsum256(__m256 v) {
  float lane[8];
  _mm256_storeu_ps(lane, v);
  return lane[0] + lane[1] + lane[2] + lane[3] + lane[4] + lane[5] + lane[6] + lane[7];
}

TARGET(AVX2) void dots_float_avx2(const float* x, int64_t rows, int64_t d, const float* z, float* out, Ahead& ahead) {
  Ahead next = ahead;
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    __m256 s[4][2] = {};
    const float* p = x + i * d;
    for (int64_t j = 0; j < d; j += 16) {
      const __m256 w = _mm256_loadu_ps(z + j), v = _mm256_loadu_ps(z + j + 8);
      next.fetch(2);
      for (int k = 0; k < 4; ++k) {
        s[k][0] = _mm256_fmadd_ps(_mm256_loadu_ps(p + k * d + j), w, s[k][0]);
        s[k][1] = _mm256_fmadd_ps(_mm256_loadu_ps(p + k * d + j + 8), v, s[k][1]);
      }
    }
    for (int k = 0; k < 4; ++k) out[i + k] = hsum256(_mm256_add_ps(s[k][0], s[k][1]));
  }
  ahead = next;
  for (; i < rows; ++i) {
    __m256 s = _mm256_setzero_ps();
    for (int64_t j = 0; j < d; j += 8) s = _mm256_fmadd_ps(_mm256_loadu_ps(x + i * d + j), _mm256_loadu_ps(z + j), s);
    out[i] = hsum256(s);
  }
}

TARGET(AVX2) void sums_float_avx2(const float* x, int64_t rows, int64_t d, const float* q, float* out, Ahead& ahead) {
  Ahead next = ahead;
  for (int64_t j = 0; j < d; j += 64) {
    __m256 s[8];
    for (int k = 0; k < 8; ++k) s[k] = _mm256_loadu_ps(out + j + 8 * k);
    for (int64_t i = 0; i < rows; ++i) {
      const __m256 w = _mm256_set1_ps(q[i]);
      next.fetch(2);
      for (int k = 0; k < 8; ++k) s[k] = _mm256_fmadd_ps(_mm256_loadu_ps(x + i * d + j + 8 * k), w, s[k]);
    }
    for (int k = 0; k < 8; ++k) _mm256_storeu_ps(out + j + 8 * k, s[k]);
  }
  ahead = next;
}

// Two vectors side by side: one multiplication waits for the other's.
TARGET(AVX2) void philox_avx2(uint32_t* out, int64_t count, uint32_t step, uint32_t stream, uint64_t seed) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53u), m1 = _mm256_set1_epi64x(0xCD9E8D57u);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t j = 0; j < count; j += 64) {
    __m256i c[4][2];
    for (int h = 0; h < 2; ++h) {
      c[0][h] = _mm256_add_epi32(lane, _mm256_set1_epi32(int32_t(j / 4 + 8 * h))), c[1][h] = _mm256_setzero_si256();
      c[2][h] = _mm256_set1_epi32(int32_t(stream)), c[3][h] = _mm256_set1_epi32(int32_t(step));
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int h = 0; h < 2; ++h) {
        const __m256i e0 = _mm256_mul_epu32(c[0][h], m0), o0 = _mm256_mul_epu32(_mm256_srli_epi64(c[0][h], 32), m0);
        const __m256i e1 = _mm256_mul_epu32(c[2][h], m1), o1 = _mm256_mul_epu32(_mm256_srli_epi64(c[2][h], 32), m1);
        const __m256i h0 = _mm256_blend_epi32(_mm256_srli_epi64(e0, 32), o0, 0xaa);
        const __m256i h1 = _mm256_blend_epi32(_mm256_srli_epi64(e1, 32), o1, 0xaa);
        const __m256i l0 = _mm256_blend_epi32(e0, _mm256_slli_epi64(o0, 32), 0xaa);
        const __m256i l1 = _mm256_blend_epi32(e1, _mm256_slli_epi64(o1, 32), 0xaa);
        c[0][h] = _mm256_xor_si256(_mm256_xor_si256(h1, c[1][h]), _mm256_set1_epi32(int32_t(k0)));
        c[1][h] = l1;
        c[2][h] = _mm256_xor_si256(_mm256_xor_si256(h0, c[3][h]), _mm256_set1_epi32(int32_t(k1)));
        c[3][h] = l0;
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int w = 0; w < 8; ++w) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j + 8 * w), c[w / 2][w % 2]);
  }
}

// Down to the integer below, or up where the uniform of the word is less than the fraction.
TARGET(AVX2) inline __m256 rounded_avx2(__m256 t, const uint32_t* words) {
  const __m256 lower = _mm256_floor_ps(t);
  const __m256i bits = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)), 8);
  const __m256 u = _mm256_mul_ps(_mm256_cvtepi32_ps(bits), _mm256_set1_ps(1.0f / 16777216));
  const __m256 up = _mm256_cmp_ps(u, _mm256_sub_ps(t, lower), _CMP_LT_OQ);
  return _mm256_add_ps(lower, _mm256_and_ps(up, _mm256_set1_ps(1.0f)));
}

TARGET(AVX2) inline void store_codes(int8_t* out, __m256 value) {
  const __m256i code = _mm256_cvtps_epi32(value);
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(half, half));
}

// One step of 8 offsets at a time; see `move_low`.
TARGET(AVX2) int64_t move_low_avx2(int8_t* z, const float* g, const float* drift, const float* shrink, const uint32_t* words,
                                   int64_t d) {
  int64_t outside = 0;
  const __m256 top = _mm256_set1_ps(127.0f), bottom = _mm256_set1_ps(-127.0f), sign = _mm256_set1_ps(-0.0f);
  for (int64_t j = 0; j < d; j += 8) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(z + j));
    const __m256 old = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    const __m256 t = _mm256_sub_ps(_mm256_sub_ps(old, _mm256_loadu_ps(g + j)), _mm256_loadu_ps(drift + j));
    const __m256 value = rounded_avx2(_mm256_mul_ps(t, _mm256_loadu_ps(shrink + j)), words + j);
    outside += __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, value), top, _CMP_GT_OQ)));
    store_codes(z + j, _mm256_max_ps(bottom, _mm256_min_ps(top, value)));
  }
  return outside;
}

TARGET(AVX2) void respond_avx2(const float* y, const float* odds, const float* change, float factor, int64_t rows, float* out) {
  respond_plain(y, odds, change, factor, rows, out);
}

// See `code_weights_plain`; reads and writes up to 7 elements past the end.
TARGET(AVX2) void code_weights_avx2(const float* weights, float inverse, const uint32_t* bits, int64_t rows, int8_t* codes) {
  for (int64_t i = 0; i < rows; i += 8)
    store_codes(codes + i, rounded_avx2(_mm256_mul_ps(_mm256_loadu_ps(weights + i), _mm256_set1_ps(inverse)), bits + i));
}

// ------------------------------------------------------------------------------------------- AVX-512 with VNNI
#define AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma"

// vpdpbusd takes unsigned by signed bytes: x ^ 0x80 is x + 128, and 128 * sum(z) is taken off again.
TARGET(AVX512) void dots_int8_avx512(const int8_t* x, int64_t rows, int64_t d, const int8_t* z, int32_t* out,
                                     Ahead& ahead) {
  const __m512i flip = _mm512_set1_epi8(int8_t(0x80));
  __m512i total = _mm512_setzero_si512();
  for (int64_t j = 0; j < d; j += 64) total = _mm512_dpbusd_epi32(total, flip, _mm512_loadu_si512(z + j));
  const int32_t bias = _mm512_reduce_add_epi32(total);
  Ahead next = ahead;
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    __m512i s[4] = {};
    const int8_t* p = x + i * d;
    for (int64_t j = 0; j < d; j += 64) {
      const __m512i w = _mm512_loadu_si512(z + j);
      next.fetch(2);
      for (int k = 0; k < 4; ++k)
        s[k] = _mm512_dpbusd_epi32(s[k], _mm512_xor_si512(_mm512_loadu_si512(p + k * d + j), flip), w);
    }
    for (int k = 0; k < 4; ++k) out[i + k] = _mm512_reduce_add_epi32(s[k]) - bias;
  }
  ahead = next;
  for (; i < rows; ++i) {
    __m512i s = _mm512_setzero_si512();
    for (int64_t j = 0; j < d; j += 64)
      s = _mm512_dpbusd_epi32(s, _mm512_xor_si512(_mm512_loadu_si512(x + i * d + j), flip), _mm512_loadu_si512(z + j));
    out[i] = _mm512_reduce_add_epi32(s) - bias;
  }
}

// Four rows at a time: their bytes of one column side by side in a 32-bit lane, against (q_i .. q_i+3).
TARGET(AVX512) void sums_int8_avx512(const int8_t* x, int64_t rows, int64_t d, const int8_t* q, int32_t* out,
                                     Ahead& ahead) {
  const __m512i flip = _mm512_set1_epi8(int8_t(0x80));
  Ahead next = ahead;
  int32_t bias = 0;
  for (int64_t i = 0; i < rows; ++i) bias += q[i];
  for (int64_t j = 0; j < d; j += 16) _mm512_storeu_si512(out + j, _mm512_set1_epi32(-128 * bias));
  for (int64_t top = 0; top < rows; top += 16) {
    const int64_t bottom = top + 16 < rows ? top + 16 : rows;
    for (int64_t j = 0; j < d; j += 64) {
      __m512i s[4];
      for (int k = 0; k < 4; ++k) s[k] = _mm512_loadu_si512(out + j + 16 * k);
      for (int64_t i = top; i < bottom; i += 4) {
        __m512i r[4];
        const int64_t left = rows - i < 4 ? rows - i : 4;
        for (int64_t k = 0; k < 4; ++k)
          r[k] = _mm512_xor_si512(_mm512_loadu_si512(x + (i + (k < left ? k : 0)) * d + j), flip);
        next.fetch(2);
        const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpacklo_epi8(r[2], r[3]);
        const __m512i c = _mm512_unpackhi_epi8(r[0], r[1]), e = _mm512_unpackhi_epi8(r[2], r[3]);
        int32_t packed = 0;
        if (left == 4) std::memcpy(&packed, q + i, 4);
        else std::memcpy(&packed, q + i, left);
        const __m512i w = _mm512_set1_epi32(packed);
        s[0] = _mm512_dpbusd_epi32(s[0], _mm512_unpacklo_epi16(a, b), w);
        s[1] = _mm512_dpbusd_epi32(s[1], _mm512_unpackhi_epi16(a, b), w);
        s[2] = _mm512_dpbusd_epi32(s[2], _mm512_unpacklo_epi16(c, e), w);
        s[3] = _mm512_dpbusd_epi32(s[3], _mm512_unpackhi_epi16(c, e), w);
      }
      for (int k = 0; k < 4; ++k) _mm512_storeu_si512(out + j + 16 * k, s[k]);
    }
  }
  ahead = next;
  // Unpacking works within 128-bit lanes: lane L of s[k] holds columns 16 L + 4 k .. 16 L + 4 k + 3.
  for (int64_t j = 0; j < d; j += 64) {
    __m512i s[4];
    for (int k = 0; k < 4; ++k) s[k] = _mm512_loadu_si512(out + j + 16 * k);
    const __m512i a = _mm512_shuffle_i32x4(s[0], s[1], 0x44), b = _mm512_shuffle_i32x4(s[2], s[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(s[0], s[1], 0xee), e = _mm512_shuffle_i32x4(s[2], s[3], 0xee);
    _mm512_storeu_si512(out + j, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(out + j + 16, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(out + j + 32, _mm512_shuffle_i32x4(c, e, 0x88));
    _mm512_storeu_si512(out + j + 48, _mm512_shuffle_i32x4(c, e, 0xdd));
  }
}

TARGET(AVX512) void dots_float_avx512(const float* x, int64_t rows, int64_t d, const float* z, float* out,
                                      Ahead& ahead) {
  Ahead next = ahead;
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    __m512 s[4] = {};
    const float* p = x + i * d;
    for (int64_t j = 0; j < d; j += 16) {
      const __m512 w = _mm512_loadu_ps(z + j);
      next.fetch(2);
      for (int k = 0; k < 4; ++k) s[k] = _mm512_fmadd_ps(_mm512_loadu_ps(p + k * d + j), w, s[k]);
    }
    for (int k = 0; k < 4; ++k) out[i + k] = _mm512_reduce_add_ps(s[k]);
  }
  ahead = next;
  for (; i < rows; ++i) {
    __m512 s = _mm512_setzero_ps();
    for (int64_t j = 0; j < d; j += 16) s = _mm512_fmadd_ps(_mm512_loadu_ps(x + i * d + j), _mm512_loadu_ps(z + j), s);
    out[i] = _mm512_reduce_add_ps(s);
  }
}

TARGET(AVX512) void sums_float_avx512(const float* x, int64_t rows, int64_t d, const float* q, float* out,
                                      Ahead& ahead) {
  Ahead next = ahead;
  for (int64_t j = 0; j < d; j += 64) {
    __m512 s[4];
    for (int k = 0; k < 4; ++k) s[k] = _mm512_loadu_ps(out + j + 16 * k);
    for (int64_t i = 0; i < rows; ++i) {
      const __m512 w = _mm512_set1_ps(q[i]);
      next.fetch(2);
      for (int k = 0; k < 4; ++k) s[k] = _mm512_fmadd_ps(_mm512_loadu_ps(x + i * d + j + 16 * k), w, s[k]);
    }
    for (int k = 0; k < 4; ++k) _mm512_storeu_ps(out + j + 16 * k, s[k]);
  }
  ahead = next;
}

TARGET(AVX512) void philox_avx512(uint32_t* out, int64_t count, uint32_t step, uint32_t stream, uint64_t seed) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53u), m1 = _mm512_set1_epi64(0xCD9E8D57u);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t j = 0; j < count; j += 64) {
    __m512i c0 = _mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(j / 4))), c1 = _mm512_setzero_si512();
    __m512i c2 = _mm512_set1_epi32(int32_t(stream)), c3 = _mm512_set1_epi32(int32_t(step));
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m512i e0 = _mm512_mul_epu32(c0, m0), o0 = _mm512_mul_epu32(_mm512_srli_epi64(c0, 32), m0);
      const __m512i e1 = _mm512_mul_epu32(c2, m1), o1 = _mm512_mul_epu32(_mm512_srli_epi64(c2, 32), m1);
      const __m512i h0 = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(e0, 32), o0);
      const __m512i h1 = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(e1, 32), o1);
      const __m512i l0 = _mm512_mask_blend_epi32(0xaaaa, e0, _mm512_slli_epi64(o0, 32));
      const __m512i l1 = _mm512_mask_blend_epi32(0xaaaa, e1, _mm512_slli_epi64(o1, 32));
      c0 = _mm512_xor_si512(_mm512_xor_si512(h1, c1), _mm512_set1_epi32(int32_t(k0)));
      c1 = l1;
      c2 = _mm512_xor_si512(_mm512_xor_si512(h0, c3), _mm512_set1_epi32(int32_t(k1)));
      c3 = l0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    _mm512_storeu_si512(out + j, c0), _mm512_storeu_si512(out + j + 16, c1);
    _mm512_storeu_si512(out + j + 32, c2), _mm512_storeu_si512(out + j + 48, c3);
  }
}

// Down to the integer below, or up where the uniform of the word is less than the fraction.
TARGET(AVX512) inline __m512 rounded_avx512(__m512 t, const uint32_t* words) {
  const __m512 lower = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512 u = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_loadu_si512(words), 8)),
                                 _mm512_set1_ps(1.0f / 16777216));
  const __mmask16 up = _mm512_cmp_ps_mask(u, _mm512_sub_ps(t, lower), _CMP_LT_OQ);
  return _mm512_mask_add_ps(lower, up, lower, _mm512_set1_ps(1.0f));
}

// One step of 16 offsets at a time; see `move_low`.
TARGET(AVX512) int64_t move_low_avx512(int8_t* z, const float* g, const float* drift, const float* shrink,
                                       const uint32_t* words, int64_t d) {
  int64_t outside = 0;
  const __m512 top = _mm512_set1_ps(127.0f), bottom = _mm512_set1_ps(-127.0f);
  for (int64_t j = 0; j < d; j += 16) {
    const __m512 old = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<__m128i*>(z + j))));
    const __m512 t = _mm512_sub_ps(_mm512_sub_ps(old, _mm512_loadu_ps(g + j)), _mm512_loadu_ps(drift + j));
    const __m512 value = rounded_avx512(_mm512_mul_ps(t, _mm512_loadu_ps(shrink + j)), words + j);
    outside += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_abs_ps(value), top, _CMP_GT_OQ));
    const __m512i code = _mm512_cvtps_epi32(_mm512_max_ps(bottom, _mm512_min_ps(top, value)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(z + j), _mm512_cvtepi32_epi8(code));
  }
  return outside;
}

TARGET(AVX512) void respond_avx512(const float* y, const float* odds, const float* change, float factor, int64_t rows,
                                   float* out) {
  respond_plain(y, odds, change, factor, rows, out);
}

// See `code_weights_plain`; reads and writes up to 15 elements past the end.
TARGET(AVX512) void code_weights_avx512(const float* weights, float inverse, const uint32_t* bits, int64_t rows,
                                        int8_t* codes) {
  for (int64_t i = 0; i < rows; i += 16) {
    const __m512 value = rounded_avx512(_mm512_mul_ps(_mm512_loadu_ps(weights + i), _mm512_set1_ps(inverse)), bits + i);
    const __m128i code = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(value));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), code);
  }
}
#endif  // HAVE_X86

// ----------------------------------------------------------------------------------------------------- dispatch

int detected() {
#if HAVE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

#if HAVE_X86
#define DISPATCH(name, ...)                                    \
  (p.level == 2   ? name##_avx512(__VA_ARGS__)                 \
   : p.level == 1 ? name##_avx2(__VA_ARGS__)                   \
                  : name##_plain(__VA_ARGS__))
#else
#define DISPATCH(name, ...) name##_plain(__VA_ARGS__)
#endif

inline void words(const Problem& p, uint32_t* out, int64_t count, uint32_t step, uint32_t stream) {
  if (!p.draws) {
    for (int64_t j = 0; j < count; ++j) out[j] = 0x80000000u;
    return;
  }
  DISPATCH(philox, out, count, step, stream, p.seed);
}

// `factor` times the change of the derivatives of rows from `begin` on, when their margins move by `change`.
void respond(const Problem& p, int64_t begin, int64_t rows, const float* change, float factor, float* out) {
  if (p.loss == 0) {
    for (int64_t i = 0; i < rows; ++i) out[i] = factor * change[i];
    return;
  }
  DISPATCH(respond, p.y + begin, p.odds + begin, change, factor, rows, out);
}

// Rows that are read twice, once for the dot products and once for the sums, in pieces of about an eighth of a megabyte,
// so that they and the piece fetched meanwhile stay in the second-level cache: `rows` in as few of equal size, of a
// multiple of 4 rows.
inline int64_t piece_rows(int64_t rows, int64_t row_bytes) {
  const int64_t most = std::max<int64_t>(4, (int64_t(1) << 17) / row_bytes), pieces = (rows + most - 1) / most;
  return ((rows + pieces - 1) / pieces + 3) / 4 * 4;
}

template <class Body>
void parallel(int threads, Body body) {
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(body, t);
  body(0);
  for (auto& thread : pool) thread.join();
}

// ------------------------------------------------------------------------------------------------- mini-batches

// What a thread keeps of a piece of rows.
struct Scratch {
  Buffer<int32_t> dots, sums;
  Buffer<float> floats, weights;
  Buffer<int8_t> codes;
  Buffer<uint32_t> bits;
  Scratch(int64_t rows, int64_t d)
      : dots(rows + 16), sums(d), floats(rows + 16), weights(rows + 16), codes(rows + 64), bits(rows + 63) {}
};

// Rows [begin, begin + rows) of mini-batch `block` in the order, which ends with them where `last`.
struct Piece {
  int64_t block, begin, rows;
  bool first, last;
};

// One thread's pieces of an epoch, one after another: of each mini-batch about equal shares, in multiples of 4 rows.
class Pieces {
 public:
  Pieces(const Problem& p, int t, int64_t most) : p_(&p), t_(t), most_(most) { enter(0); }
  bool done() const { return here_.block >= p_->blocks; }
  const Piece& here() const { return here_; }
  void advance() {
    if (here_.last) return enter(here_.block + 1);
    place(here_.begin + here_.rows, false);
  }

 private:
  void enter(int64_t block) {
    here_.block = block;
    if (done()) return;
    const int64_t first = int64_t(p_->order[block]) * p_->batch, last = std::min(p_->n, first + p_->batch);
    const int64_t part = ((last - first + p_->threads - 1) / p_->threads + 3) / 4 * 4;
    const int64_t begin = std::min(last, first + t_ * part);
    end_ = std::min(last, begin + part);
    place(begin, true);
  }
  void place(int64_t begin, bool first) {
    const int64_t rows = std::min(most_, end_ - begin);
    here_ = {here_.block, begin, rows, first, begin + rows >= end_};
  }
  const Problem* p_;
  int t_;
  int64_t most_, end_ = 0;
  Piece here_{};
};

template <class Code>
Ahead rows_of(const Problem& p, const Pieces& pieces) {
  if (pieces.done()) return {};
  return Ahead::of(static_cast<const Code*>(p.x) + pieces.here().begin * p.d, pieces.here().rows * p.d);
}

// partial (where it is the first piece) = or += sum over its rows of response_i x_ij, times `factor`; responses are
// rounded to 8 bits.
void add_piece(const Problem& p, Scratch& s, const int8_t* z, const Piece& piece, float factor, float* partial, Ahead ahead) {
  const int8_t* x = static_cast<const int8_t*>(p.x) + piece.begin * p.d;
  const uint32_t step = uint32_t(p.first_step + piece.block);
  DISPATCH(dots_int8, x, piece.rows, p.d, z, s.dots.data(), ahead);
  const float unit = float(p.unit * p.gap);
  for (int64_t i = 0; i < piece.rows; ++i) s.floats[i] = unit * s.dots[i];
  respond(p, piece.begin, piece.rows, s.floats.data(), 1.0f, s.weights.data());
  float largest = 0;
  for (int64_t i = 0; i < piece.rows; ++i) largest = std::max(largest, std::fabs(s.weights[i]));
  if (piece.first && largest == 0) std::fill_n(partial, p.d, 0.0f);
  if (largest == 0) return;
  words(p, s.bits.data(), (piece.rows + 63) / 64 * 64, step, uint32_t(piece.begin) | 0x80000000u);
  DISPATCH(code_weights, s.weights.data(), 127.0f / largest, s.bits.data(), piece.rows, s.codes.data());
  DISPATCH(sums_int8, x, piece.rows, p.d, s.codes.data(), s.sums.data(), ahead);
  const float scale = factor * float(p.unit / p.gap) * largest / 127.0f;
  if (piece.first) std::transform(s.sums.data(), s.sums.data() + p.d, partial, [=](int32_t sum) { return scale * sum; });
  else for (int64_t j = 0; j < p.d; ++j) partial[j] += scale * s.sums[j];
}

void add_piece(const Problem& p, Scratch& s, const float* z, const Piece& piece, float factor, float* partial, Ahead ahead) {
  const float* x = static_cast<const float*>(p.x) + piece.begin * p.d;
  if (piece.first) std::fill_n(partial, p.d, 0.0f);
  DISPATCH(dots_float, x, piece.rows, p.d, z, s.floats.data(), ahead);
  respond(p, piece.begin, piece.rows, s.floats.data(), factor, s.weights.data());
  DISPATCH(sums_float, x, piece.rows, p.d, s.weights.data(), partial, ahead);
}

// z <- Q((z - lr g / gap - drift) * shrink): the step and the implicit penalty, in units of the gap. Returns how many
// offsets left the range.
int64_t move(const Problem& p, int8_t* z, const float* g, const uint32_t* bits) {
  return DISPATCH(move_low, z, g, p.drift, p.shrink, bits, p.d);
}

int64_t move(const Problem& p, float* z, const float* g, const uint32_t*) {
  for (int64_t j = 0; j < p.d; ++j) z[j] = (z[j] - g[j] - p.drift[j]) * p.shrink[j];
  return 0;
}

// The sums of all threads, in the order of the threads.
const float* total(const Problem& p, const float* partial, float* g) {
  if (p.threads == 1) return partial;
  for (int64_t j = 0; j < p.d; ++j) g[j] = partial[j] + partial[p.d + j];
  for (int other = 2; other < p.threads; ++other)
    for (int64_t j = 0; j < p.d; ++j) g[j] += partial[other * p.d + j];
  return g;
}

// One thread's epoch. Every thread keeps its own copy of the offset and moves all of it, by the same sums and the same
// draws: one meeting per mini-batch is enough, as the sums of two of them in turn are kept apart.
template <class Code>
int64_t walk_epoch(const Problem& p, int t, int64_t rows, Meeting& meeting, const Buffer<float>& partial) {
  Scratch s(rows, p.d);
  Buffer<Code> z(p.d);
  Buffer<float> sum(p.d);
  Buffer<uint32_t> bits(p.d);
  std::copy_n(static_cast<const Code*>(p.offset), p.d, z.data());
  int64_t outside = 0;
  for (Pieces pieces(p, t, rows), next = pieces; !pieces.done(); pieces = next) {
    next.advance();
    const Piece& piece = pieces.here();
    const int64_t k = piece.block, count = std::min(p.batch, p.n - int64_t(p.order[k]) * p.batch);
    float* sums = partial.data() + k % 2 * p.threads * p.d;
    add_piece(p, s, z.data(), piece, float(p.lr) / float(count), sums + t * p.d, rows_of<Code>(p, next));
    if (!piece.last) continue;
    meeting.arrive(t, k + 1);
    if constexpr (sizeof(Code) == 1) words(p, bits.data(), p.d, uint32_t(p.first_step + k), 0);
    meeting.wait(k + 1);
    outside += move(p, z.data(), total(p, sums, sum.data()), bits.data());
  }
  if (t == 0) std::copy_n(z.data(), p.d, static_cast<Code*>(p.offset));
  return outside;
}

// Mini-batches of one epoch; returns the number of offsets that left the range.
template <class Code>
int64_t walk(const Problem& p) {
  Meeting meeting(p.threads);
  const Buffer<float> partial(2 * p.threads * p.d);
  const int64_t rows = piece_rows((p.batch + p.threads - 1) / p.threads, p.d * sizeof(Code));
  int64_t outside = 0;
  parallel(p.threads, [&](int t) {
    const int64_t found = walk_epoch<Code>(p, t, rows, meeting, partial);
    if (t == 0) outside = found;
  });
  return outside;
}

// ------------------------------------------------------------------------------------------------ full gradients

// What a thread of the outer pass keeps.
struct Sweep {
  Buffer<int32_t> dots, counts;
  Buffer<float> floats, weights, partial;
  Buffer<int8_t> codes;
  Buffer<double> missing, sum;
  double loss = 0;
  Sweep(int64_t rows, int64_t d)
      : dots(rows + 16), counts(d), floats(rows + 16), weights(rows + 16), partial(d), codes(rows + 64), missing(rows),
        sum(d) {}
};

// Margins, losses and missing derivatives of a chunk after its margins moved; returns the largest magnitude of the
// latter. Logistic losses of a chunk are one logarithm of a product, whose factors are at most 2.
double missing_derivatives(const Problem& p, Sweep& s, bool low, int64_t begin, int64_t rows) {
  double largest = 0, total = 0, product = 1;
  for (int64_t i = 0; i < rows; ++i) {
    double& m = p.margin[begin + i];
    m += low ? p.unit * p.gap * s.dots[i] : double(s.floats[i]);
    const double y = p.y[begin + i];
    double slope = m - y;
    if (p.loss == 1) {
      const double odds = std::exp(std::max(-40.0, std::min(40.0, y * m)));
      p.odds[begin + i] = float(odds);
      slope = -y / (1.0 + odds);
      product *= 1.0 + std::min(odds, 1.0 / odds);
      total += std::max(0.0, -y * m);
      if (i % 512 == 511) total += std::log(product), product = 1;
    } else {
      total += 0.5 * slope * slope;
    }
    s.missing[i] = slope - p.residual[begin + i];
    largest = std::max(largest, std::fabs(s.missing[i]));
  }
  s.loss += total + std::log(product);
  return largest;
}

// sum[j] += what `full` lacks of the rows of a chunk, rounded to 8 bits; what was added is in `residual`.
void add_missing(const Problem& p, Sweep& s, double largest, const int8_t* x, int64_t begin, int64_t rows, Ahead& ahead) {
  const double scale = largest / 127.0, inverse = 127.0 / largest, value = scale * p.unit;
  for (int64_t i = 0; i < rows; ++i) {
    const double code = std::rint(s.missing[i] * inverse);
    s.codes[i] = int8_t(code);
    p.residual[begin + i] += code * scale;
  }
  DISPATCH(sums_int8, x, rows, p.d, s.codes.data(), s.counts.data(), ahead);
  for (int64_t j = 0; j < p.d; ++j) s.sum[j] += value * s.counts[j];
}

void add_missing(const Problem& p, Sweep& s, double, const float* x, int64_t begin, int64_t rows, Ahead& ahead) {
  for (int64_t i = 0; i < rows; ++i) p.residual[begin + i] += (s.weights[i] = float(s.missing[i]));
  std::fill_n(s.partial.data(), p.d, 0.0f);
  DISPATCH(sums_float, x, rows, p.d, s.weights.data(), s.partial.data(), ahead);
  for (int64_t j = 0; j < p.d; ++j) s.sum[j] += s.partial[j];
}

void margin_changes(const Problem& p, Sweep& s, const int8_t* x, int64_t rows, Ahead& ahead) {
  DISPATCH(dots_int8, x, rows, p.d, static_cast<const int8_t*>(p.offset), s.dots.data(), ahead);
}

void margin_changes(const Problem& p, Sweep& s, const float* x, int64_t rows, Ahead& ahead) {
  DISPATCH(dots_float, x, rows, p.d, static_cast<const float*>(p.offset), s.floats.data(), ahead);
}

// What belongs to rows beside their columns.
void fetch_margins(const Problem& p, int64_t begin, int64_t rows) {
  const auto all = [](Ahead bytes) { bytes.fetch(int((bytes.end - bytes.at + 63) / 64)); };
  all(Ahead::of(p.margin + begin, rows)), all(Ahead::of(p.residual + begin, rows)), all(Ahead::of(p.y + begin, rows));
}

// One thread's share of the blocks, every `threads`-th, each in chunks.
template <class Code>
void sweep(const Problem& p, int t, int64_t chunk, Sweep& s) {
  const Code* x = static_cast<const Code*>(p.x);
  for (int64_t k = t; k < p.blocks; k += p.threads) {
    const int64_t begin = int64_t(p.order[k]) * p.batch, end = std::min(p.n, begin + p.batch);
    const int64_t after = int64_t(p.order[k + p.threads < p.blocks ? k + p.threads : k]) * p.batch;
    for (int64_t at = begin; at < end; at += chunk) {
      const int64_t rows = std::min(chunk, end - at), next = at + chunk < end ? at + chunk : after;
      const Code* here = x + at * p.d;
      Ahead ahead = Ahead::of(x + next * p.d, std::min(chunk, p.n - next) * p.d);
      margin_changes(p, s, here, rows, ahead);
      const double largest = missing_derivatives(p, s, sizeof(Code) == 1, at, rows);
      fetch_margins(p, next, std::min(chunk, p.n - next));
      if (largest > 0) add_missing(p, s, largest, here, at, rows, ahead);
    }
  }
}

template <class Code>
double sweep(const Problem& p) {
  const int64_t chunk = piece_rows(p.batch, p.d * sizeof(Code));
  std::vector<std::unique_ptr<Sweep>> shares;
  for (int t = 0; t < p.threads; ++t) shares.push_back(std::make_unique<Sweep>(chunk, p.d));
  parallel(p.threads, [&](int t) { sweep<Code>(p, t, chunk, *shares[t]); });
  double loss = 0;
  for (const auto& share : shares) {
    for (int64_t j = 0; j < p.d; ++j) p.full[j] += share->sum[j];
    loss += share->loss;
  }
  return loss;
}

}  // namespace

EXPORT int32_t lpsgld_linear_level() { return detected(); }

// The words of one step, for tests and for timing the draws alone; `count` is a multiple of 64.
EXPORT void lpsgld_linear_words(uint32_t* out, int64_t count, uint32_t step, uint32_t stream, uint64_t seed, int32_t level) {
  Problem p{};
  p.draws = 1, p.seed = seed, p.level = level;
  words(p, out, count, step, stream);
}

// out = X^T X v for float32 rows, on one thread; for the step size.
EXPORT void lpsgld_linear_normal(const float* x, int64_t rows, int64_t d, const float* v, float* out, int32_t level) {
  Problem p{};
  p.level = level;
  const int64_t chunk = 64;
  float dots[chunk];
  Ahead none;
  std::fill(out, out + d, 0.0f);
  for (int64_t i = 0; i < rows; i += chunk) {
    const int64_t count = std::min(chunk, rows - i);
    DISPATCH(dots_float, x + i * d, count, d, v, dots, none);
    DISPATCH(sums_float, x + i * d, count, d, dots, out, none);
  }
}

// Mini-batches of one epoch. Returns the number of offsets that left the range (low precision only).
EXPORT int64_t lpsgld_linear_inner(const Problem* problem, int32_t low) {
  return low ? walk<int8_t>(*problem) : walk<float>(*problem);
}

// Move the margins by the offset and bring `full` up to date. Low precision: what is missing in `full`, the difference
// of each derivative and what of it was added so far, is rounded to 8 bits by the largest of a chunk, and *what was
// added* is kept: the error shrinks with the differences, so `full` converges to the exact sum though no float touches
// the data. Returns the sum of the losses.
EXPORT double lpsgld_linear_outer(const Problem* problem, int32_t low) {
  return low ? sweep<int8_t>(*problem) : sweep<float>(*problem);
}
