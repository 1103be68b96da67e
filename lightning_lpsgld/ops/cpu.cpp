// Fused CPU kernels: quantize, quantize_variance_corrected, encode, decode and the whole Langevin step.
//
// Plain C++17 behind a C interface (section 4), loaded with ctypes by cpu.py; ops/reference.py and samplers/updates.py
// are the definition. The vector code (section 2) uses the compilers' portable vector types and is compiled once per
// instruction set: the file includes itself. No contraction to FMA anywhere (-ffp-contract=off, and see PRAGMA below):
// results are the same on every instruction set.
//
// Words: a *block* shares one exponent; `inner` is its number of elements, contiguous in memory, or 0 where there is no
// shared exponent (fixed point: one constant gap; *lane* formats: a gap per element). E is the exponent of a block,
// `offset` what turns it into that of the gap. A *code* is an integer multiple of the gap, held exactly in a float.
// A *run* is a stretch of a row whose floats share a scale (microscaling); its *shift* is the scale's exponent.

#ifndef LPSGLD_LANES  // ======================= 1. Common to all instruction sets =======================

#if !defined(__GNUC__)
#error "The fused CPU kernels need GCC or Clang (vector types); without them the package runs on the reference ops."
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cfloat>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <numeric>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(_WIN32)
#define EXPORT extern "C" __attribute__((dllexport))
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are only passed between inlined functions

namespace lpsgld {

enum Kind : int32_t { FIXED = 0, BLOCK = 1, FLOAT = 2, SCALED = 3 };
enum Mode : int32_t { NEAREST = 0, STOCHASTIC = 1, VC = 2, NONE = 3 };
enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2, F64 = 3 };  // F64: of `finite` only
enum Sink : int32_t { VALUES = 0, CODES8 = 1, CODES16 = 2, CODES32 = 3 };

// Mirrors of the ctypes structures in cpu.py.
struct Format {
  int32_t kind, offset, low, high;    // gap = 2^(E + offset), E in [low, high]; fixed point: E = 0
  float code_min, code_max;           // floating point: +-2^(mantissa + 1), the largest code of any binade
  float value_min, value_max;         // fixed and floating point
  int32_t mantissa, bias, bits, nan;  // floating point: fields of the bit pattern
  int32_t carry;                      // blocks: 1 if one whose codes pass the top takes the next exponent
  int32_t run, scale_low, scale_high;  // scaled: elements of a run, exponents of scales; all else is of an element
  int32_t fits, hole;                  // scaled: scales are rounded up; a code is missing below the next power of two
};
struct Key {
  uint64_t seed, offset, carry, hole;  // carry, hole: seeds of the coins of carried blocks, and of scaled runs in a hole
  uint32_t step, stream;
};
struct Shape {
  int64_t numel, inner, channels, pixels;  // channels > 0: memory is (sample, pixel, channel), draws are not
};
struct Step {
  double variance;
  float lr, weight_decay, noise;  // noise: standard deviation of what is added before rounding
  int32_t mode;                   // of the weight's rounding; NONE: the weight is not rounded
  int32_t has_gradient_format;
  Format weight, gradient;
};
struct StepTensor {
  float *param, *accumulator;
  const float *grad;
  int64_t numel, weight_inner, gradient_inner, channels, pixels, last;  // last: size of the last dim
  Key weight_key, gradient_key;
  int64_t saturated;
};

enum Family : int32_t { UNDERDAMPED = 0, PRECONDITIONED = 1 };
// A step with a second tensor beside the weight: the velocity, or the running second moment (cpu_motion.cpp).
struct Motion {
  double var_x, var_v, cov, noise;        // variances of the noise; preconditioned: of a weight whose G is 1
  double velocity_max;                    // largest value of the velocity's grid, where it gets a scale
  float keep, carry, kick, shift, slope;  // slope: the velocity's answer to the position's noise, where that is known
  float lr, weight_decay, beta, rest, eps, weight, shrinkage;
  int32_t family, mode, has_gradient_format, has_velocity_format, rescale, scale_low, scale_high;
  Format position, velocity, gradient;
};
struct MotionTensor {
  const Motion *motion;
  float *param, *accumulator, *state;
  const float *grad;
  int64_t numel, weight_inner, velocity_inner, gradient_inner, channels, pixels, last;
  Key weight_key, velocity_key, gradient_key;
  int64_t saturated;
  double scale;  // of the velocity, if it got one
};

constexpr int SLACK = 192;         // words that a batch of draws may write beyond a tile
constexpr int PATCH = 8192;        // the same for channels-last samples, whose draws come transposed
constexpr int64_t ITEM = 16384;    // elements of a work item
constexpr int64_t ROW_MAX = 1 << 17;  // longer blocks are shared by several threads
constexpr uint32_t NORMAL_BIT = 1u << 31;
constexpr double NOISE_REACH = 6.77;
constexpr uint32_t INF_BITS = 0x7f800000u;

// One tensor of a job. A job rounds `x` to `out` (mode, sink); with `grad` it first makes x = x - lr (Q(grad) + wd x).
struct Task {
  const void *x;
  void *out;
  const float *grad;
  int64_t numel, inner, gradient_inner, channels, pixels, last;
  Key key, gradient_key;
  int8_t *exponents;
  std::atomic<int64_t> count;  // saturated (values) or NaN (codes)
  std::atomic<uint32_t> *peaks, *gradient_peaks;    // of blocks that several threads share
  std::atomic<uint32_t> *levels, *gradient_levels;  // how often their exponents are raised
};
struct Job {
  Format format, gradient;
  Mode mode, gradient_mode;
  Sink sink;
  Dtype dtype;
  bool descend, counting;
  float lr, weight_decay, noise;
  double variance, sigma;
  float variance_f;
  int free_exponent;        // floor(log2(2 sigma)) - offset: gaps up to 2 sigma keep every variance reachable
  const float *target, *spread;  // by gap exponent + 160: v / gap^2 and sqrt(v / gap^2 - 1/4)
  int high_gap;             // gap exponents up to this one take a Gaussian first
};

INLINE float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
INLINE uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
INLINE float power_of_two(int k) {  // k in [-149, 127]
  return k >= -126 ? float_of(uint32_t(k + 127) << 23) : float_of(1u << (k + 149));
}
INLINE int floor_log2(double x) { return x > 0 ? std::ilogb(x) : -2000; }

// Elements after which, from the start of a tensor, a run of a scaled format ends; 1 for other formats.
INLINE int64_t grain_of(const Format &f, int64_t last) {
  if (f.kind != SCALED || last < 1) return 1;
  return f.run >= last || last % f.run ? last : f.run;
}

// A peak of a block is 2 * (bits of the largest finite magnitude) + (has infinity): peaks merge by maximum.
INLINE int exponent_of_peak(uint32_t peak, const Format &f) {
  if (peak <= 1) return peak ? f.high : f.low;  // nothing but infinities / zeros
  uint32_t bits = peak >> 1;
  int e = bits >> 23 ? int(bits >> 23) - 127 : 31 - __builtin_clz(bits) - 149;
  return e < f.low ? f.low : e > f.high ? f.high : e;
}
INLINE double magnitude_of_peak(uint32_t peak) { return float_of(peak >> 1); }
INLINE double codes_of_peak(uint32_t peak, int gap) { return std::ldexp(magnitude_of_peak(peak), -gap); }

// Exponent of a block that is rounded to nearest: one more where its largest magnitude rounds to the next power of two.
INLINE int exponent_for_nearest(uint32_t peak, int e, const Format &f) {
  return e + (f.carry && e < f.high && codes_of_peak(peak, e + f.offset) >= f.code_max + 0.5);
}

// One word of Philox4x32-10, for the few elements that decide whether a block is carried.
static uint32_t philox_word(const Key &key, uint64_t seed, uint64_t index) {
  uint32_t c[4] = {uint32_t(index / 4), uint32_t(index / 4 >> 32), key.stream, key.step};
  uint32_t a = uint32_t(seed), b = uint32_t(seed >> 32);
  for (int r = 0; r < 10; r++, a += 0x9E3779B9u, b += 0xBB67AE85u) {
    uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
    c[0] = uint32_t(p1 >> 32) ^ c[1] ^ a, c[2] = uint32_t(p0 >> 32) ^ c[3] ^ b;
    c[1] = uint32_t(p1), c[3] = uint32_t(p0);
  }
  return c[index % 4];
}

// Rounds a code that passes the top onto doubled gaps until it fits (ops/carry.py); returns how often.
static int carry_code(int64_t &code, const Task &t, const Key &key, int64_t i, const Format &f, int room) {
  if (t.channels) {
    int64_t sample = t.channels * t.pixels, in = i % sample;
    i = i - in + in % t.channels * t.pixels + in / t.channels;
  }
  const uint32_t coins = philox_word(key, key.carry, key.offset + uint64_t(i));
  int level = 0;
  for (; level < room && (code < 0 ? -code : code) > int64_t(f.code_max); level++)
    code = (code + (coins >> level % 32 & 1)) >> 1;
  return level;
}

// Raised exponent of a block (or element) whose noise reaches `reach`; see _with_headroom in reference.py.
INLINE int with_headroom(int e, double reach, const Job &job) {
  const Format &f = job.format;
  int wanted = floor_log2(reach);
  int top = wanted + f.offset;
  wanted += reach > double(f.code_max) * std::ldexp(1.0, top < -1022 ? -1022 : top);
  int raised = wanted < job.free_exponent ? wanted : job.free_exponent;
  e = e > raised ? e : raised;
  return e < f.low ? f.low : e > f.high ? f.high : e;
}

// The parts of a motion that are plain roundings.
struct MotionJobs {
  Job gradient, position, velocity;
};
// What one thread needs for a run of a motion.
struct Room {
  std::vector<float> force, mean, codes, target, spread;
  std::vector<double> variance;
  std::vector<int32_t> shifts, gaps;  // of formats whose gaps differ between elements
  std::vector<int64_t> over;
  void grow(size_t n) {
    if (force.size() >= n) return;
    for (std::vector<float> *v : {&force, &mean, &codes, &target, &spread}) v->resize(n);
    variance.resize(n), shifts.resize(n), gaps.resize(n);
  }
};

// The vector code of one instruction set.
struct Kernels {
  const char *name;
  uint32_t (*scan)(const void *x, Dtype dtype, int64_t start, int64_t len);
  uint32_t (*drift)(const Job &, Task &, int64_t start, int64_t len, uint32_t gradient_peak, int gradient_level);
  int (*level)(const Job &, Task &, int64_t start, int64_t len, uint32_t peak, bool of_gradient);
  void (*finish)(const Job &, Task &, int64_t start, int64_t len, uint32_t peak, int level);
  void (*rows)(const Job &, Task &, int64_t start, int64_t len);
  void (*decode)(const void *codes, int width, float *out, int64_t n, float scale1, float scale2);
  void (*draws)(const Key &, bool normal, float *normals, uint32_t *words, int64_t n);
  bool (*finite)(const void *x, Dtype dtype, int64_t start, int64_t len);
  int64_t (*motion)(const MotionJobs &, MotionTensor &, int64_t start, int64_t len, Room &);
};

}  // namespace lpsgld

#define LPSGLD_LANES 4
#define LPSGLD_TARGET baseline
#include "cpu.cpp"
#undef LPSGLD_LANES
#undef LPSGLD_TARGET
#if defined(__x86_64__) && !defined(__clang__)
#define LPSGLD_X86_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2")
#define LPSGLD_LANES 8
#define LPSGLD_TARGET avx2
#include "cpu.cpp"
#undef LPSGLD_LANES
#undef LPSGLD_TARGET
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,prefer-vector-width=512")
#define LPSGLD_LANES 16
#define LPSGLD_TARGET avx512
#include "cpu.cpp"
#undef LPSGLD_LANES
#undef LPSGLD_TARGET
#pragma GCC pop_options
#endif

namespace lpsgld {  // ======================= 3. Threads and scheduling =======================

// torch's own team of threads (OpenMP's), where lpsgld_team was given it. OpenMP's threads go on spinning for a while after
// torch's operators; other threads would share the cores with them.
using Team = void (*)(void (*enter)(void *), void *data, unsigned threads, unsigned flags);
static std::atomic<Team> the_team{nullptr};

using Work = void (*)(void *context, int64_t item);

struct Round {  // a job that a team works on: every thread takes the next item until none is left
  Work work;
  void *context;
  int64_t items;
  std::atomic<int64_t> next{0};

  void drain() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(context, i);
  }
  static void enter(void *round) { static_cast<Round *>(round)->drain(); }
};

// A small pool that sleeps between jobs, for where there is no team. Workers that wake up late find the job
// done and go back to sleep; nobody waits for them.
class Pool {
 public:
  void run(int threads, int64_t items, Work work, void *context) {
    std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
    if (threads > items) threads = int(items);
    if (threads <= 1 || !owner.owns_lock() || !grow(threads - 1)) {
      for (int64_t i = 0; i < items; i++) work(context, i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work, context_ = context, items_ = items, places_ = threads - 1;
      next_.store(0, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    places_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  bool grow(int workers) {
    while (started_ < workers) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (...) {
        return started_ > 0;
      }
      started_++;
    }
    return true;
  }
  void drain() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) work_(context_, i);
  }
  void serve() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return places_ > 0 && generation_.load(std::memory_order_relaxed) != seen; });
      seen = generation_.load(std::memory_order_relaxed);
      places_--, active_++;
      lock.unlock();
      drain();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> generation_{0};
  Work work_ = nullptr;
  void *context_ = nullptr;
  int64_t items_ = 0;
  int places_ = 0, active_ = 0, started_ = 0;
};

static std::atomic<Pool *> the_pool{nullptr};

static Pool &pool() {
  Pool *existing = the_pool.load();
  if (existing) return *existing;
  Pool *fresh = new Pool;  // never destroyed: workers sleep in it until the process ends
  if (!the_pool.compare_exchange_strong(existing, fresh)) {
    delete fresh;
    return *existing;
  }
  return *fresh;
}

static void run(int threads, int64_t items, Work work, void *context) {
#if !defined(_WIN32)  // a forked child has no workers and no team: it starts with a new pool (the old one is left behind)
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr), the_team.store(nullptr); });
  });
#endif
  Team team = the_team.load(std::memory_order_acquire);
  if (!team || threads <= 1 || items <= 1) return pool().run(threads, items, work, context);
  Round round{work, context, items};
  team(Round::enter, &round, unsigned(threads), 0);  // always torch's number: a smaller team would end threads
}

// Gradual underflow in the calling thread, whatever torch.set_flush_denormal says.
struct Gradual {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  Gradual() { _mm_setcsr(0x1f80); }
  ~Gradual() { _mm_setcsr(saved); }
#endif
};

static int best_level() {
#if defined(LPSGLD_X86_TARGETS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2")) return 1;
#endif
  return 0;
}
static const Kernels *const all_kernels[] = {
    &baseline::kernels,
#if defined(LPSGLD_X86_TARGETS)
    &avx2::kernels, &avx512::kernels,
#endif
};
static std::atomic<int> level{-1};
static const Kernels &kernels() {
  int l = level.load(std::memory_order_relaxed);
  if (l < 0) level.store(l = best_level());
  return *all_kernels[l];
}

struct Item {
  int task;
  int64_t start, len;
};
enum Phase { SCAN, GRADIENT_LEVELS, MAIN, LEVELS, FINISH };

struct Plan {
  const Kernels *k;
  const Job *job;
  Task *tasks;
  std::vector<Item> whole, shared;  // runs of whole blocks; pieces of blocks that several threads share
  std::vector<std::atomic<uint32_t>> peaks, levels;
  const std::vector<Item> *items;
  Phase phase;
};

static void merge(std::atomic<uint32_t> &peak, uint32_t value) {
  uint32_t old = peak.load(std::memory_order_relaxed);
  while (old < value && !peak.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
}

static void run_item(void *context, int64_t i) {
  [[maybe_unused]] Gradual gradual;
  Plan &plan = *static_cast<Plan *>(context);
  const Job &job = *plan.job;
  const Item &item = (*plan.items)[size_t(i)];
  Task &t = plan.tasks[item.task];
  if (plan.items == &plan.whole) return plan.k->rows(job, t, item.start, item.len);
  const int64_t row = t.inner ? item.start / t.inner : 0, slope = t.gradient_inner ? item.start / t.gradient_inner : 0;
  std::atomic<uint32_t> *w = t.peaks ? t.peaks + row : nullptr, *wl = t.levels ? t.levels + row : nullptr;
  std::atomic<uint32_t> *g = t.gradient_peaks ? t.gradient_peaks + slope : nullptr;
  std::atomic<uint32_t> *gl = t.gradient_levels ? t.gradient_levels + slope : nullptr;
  if (plan.phase == SCAN) {
    if (job.descend && g) merge(*g, plan.k->scan(t.grad, F32, item.start, item.len));
    if (!job.descend && w) merge(*w, plan.k->scan(t.x, job.dtype, item.start, item.len));
  } else if (plan.phase == GRADIENT_LEVELS) {
    if (g) merge(*gl, uint32_t(plan.k->level(job, t, item.start, item.len, g->load(), true)));
  } else if (plan.phase == MAIN) {
    uint32_t peak = plan.k->drift(job, t, item.start, item.len, g ? g->load() : 0, gl ? int(gl->load()) : 0);
    if (w) merge(*w, peak);
  } else if (plan.phase == LEVELS) {
    if (w) merge(*wl, uint32_t(plan.k->level(job, t, item.start, item.len, w->load(), false)));
  } else {
    plan.k->finish(job, t, item.start, item.len, w ? w->load() : 0, wl ? int(wl->load()) : 0);
  }
}

// Cuts a task into items; returns the number of peaks that it needs (0 where no block is shared by threads).
static int64_t cut(Plan &plan, int index, int64_t threads) {
  const Task &t = plan.tasks[index];
  int64_t coarse = t.inner > t.gradient_inner ? t.inner : t.gradient_inner;
  int64_t fine = t.inner && t.gradient_inner ? (t.inner < t.gradient_inner ? t.inner : t.gradient_inner) : coarse;
  const int64_t grain = std::lcm(grain_of(plan.job->format, t.last), grain_of(plan.job->gradient, t.last));
  bool share = coarse && (fine != coarse || (coarse > ROW_MAX && t.numel / coarse < 4 * threads));
  if (!share || fine % grain) {
    int64_t unit = std::lcm(coarse ? coarse : 1, grain), run = ITEM / unit * unit;
    if (run == 0) run = unit;
    for (int64_t i = 0; i < t.numel; i += run)
      plan.whole.push_back({index, i, i + run < t.numel ? run : t.numel - i});
    return 0;
  }
  const int64_t piece = ITEM > grain ? ITEM / grain * grain : grain;
  for (int64_t row = 0; row < t.numel; row += fine)
    for (int64_t i = 0; i < fine; i += piece)
      plan.shared.push_back({index, row + i, i + piece < fine ? piece : fine - i});
  return (t.inner ? t.numel / t.inner : 0) + (t.gradient_inner ? t.numel / t.gradient_inner : 0);
}

static void execute(const Job &job, Task *tasks, int count, int threads) {
  Plan plan{&kernels(), &job, tasks, {}, {}, {}, {}, nullptr, MAIN};
  int64_t total = 0, peaks = 0;
  std::vector<int64_t> wanted(static_cast<size_t>(count));
  for (int i = 0; i < count; i++) {
    peaks += wanted[size_t(i)] = cut(plan, i, threads);
    total += tasks[i].numel;
  }
  plan.peaks = std::vector<std::atomic<uint32_t>>(size_t(peaks));
  plan.levels = std::vector<std::atomic<uint32_t>>(size_t(peaks));
  std::atomic<uint32_t> *next = plan.peaks.data(), *level = plan.levels.data();
  for (int i = 0; i < count; i++) {
    Task &t = tasks[i];
    if (!wanted[size_t(i)]) continue;
    const int64_t rows = t.inner ? t.numel / t.inner : 0, slopes = t.gradient_inner ? t.numel / t.gradient_inner : 0;
    if (rows) t.peaks = next, next += rows, t.levels = level, level += rows;
    if (slopes) t.gradient_peaks = next, next += slopes, t.gradient_levels = level, level += slopes;
  }
  if (total < ITEM) threads = 1;
  auto phase = [&](const std::vector<Item> &items, Phase which) {
    plan.items = &items, plan.phase = which;
    run(threads, int64_t(items.size()), run_item, &plan);
  };
  if (!plan.whole.empty()) phase(plan.whole, MAIN);
  if (plan.shared.empty()) return;
  phase(plan.shared, SCAN);
  if (job.descend && job.gradient.carry) phase(plan.shared, GRADIENT_LEVELS);
  if (job.descend) phase(plan.shared, MAIN);
  if (job.format.carry && (job.mode == STOCHASTIC || job.mode == VC)) phase(plan.shared, LEVELS);
  if (job.mode != NONE) phase(plan.shared, FINISH);
}

// What Q^vc needs to know of the variance: exact decisions in double, once.
struct VarianceTable {
  float target[320], spread[320];
  void fill(Job &job, double variance) {
    job.variance = variance, job.sigma = std::sqrt(variance), job.variance_f = float(variance);
    job.free_exponent = floor_log2(2.0 * job.sigma) - job.format.offset;
    job.high_gap = -1000;
    for (int i = 0; i < 320; i++) {
      double inverse = std::ldexp(1.0, 160 - i), t = variance * inverse * inverse;
      target[i] = float(t), spread[i] = float(std::sqrt(t > 0.25 ? t - 0.25 : 0.0));
      if (t > (job.format.kind >= FLOAT ? 1.0 : 0.25)) job.high_gap = i - 160;
    }
    job.target = target, job.spread = spread;
  }
};

// A large result is fresh memory: with ordinary pages its page faults cost several times what the kernel does.
static void expect_large(void *out, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  uintptr_t first = (reinterpret_cast<uintptr_t>(out) + page - 1) / page * page;
  uintptr_t last = (reinterpret_cast<uintptr_t>(out) + uintptr_t(bytes)) / page * page;
  if (last > first + page) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
  (void)out, (void)bytes;
#endif
}

static void fill_task(Task &t, const void *x, void *out, const Shape &shape, const Key &key) {
  t.x = x, t.out = out, t.numel = shape.numel, t.inner = shape.inner;
  t.channels = shape.channels, t.pixels = shape.pixels, t.key = key;
}

void unpack_codes(const void *packed, int bits, bool has_sign, int64_t start, int64_t n, int8_t *codes);  // packing.cpp

// For the other files of the library.
int vector_level() {
  kernels();
  return level.load(std::memory_order_relaxed);
}
void in_parallel(int threads, int64_t items, void (*work)(void *, int64_t), void *context) {
  run(threads, items, work, context);
}

}  // namespace lpsgld

// ======================= 4. The C interface =======================
using namespace lpsgld;

EXPORT int lpsgld_version() { return 5; }
EXPORT int lpsgld_sizes(int which) {
  const int sizes[] = {sizeof(Format), sizeof(Key), sizeof(Shape), sizeof(Step), sizeof(StepTensor),
                       sizeof(Motion), sizeof(MotionTensor)};
  return sizes[which];
}
EXPORT int lpsgld_level(int wanted) {  // -1: best; returns the level in use
  int best = best_level();
  level.store(wanted < 0 || wanted > best ? best : wanted);
  return level.load();
}
EXPORT void lpsgld_team(void *parallel) { the_team.store(reinterpret_cast<Team>(parallel), std::memory_order_release); }
EXPORT const char *lpsgld_target() { return kernels().name; }

EXPORT void lpsgld_quantize(const Format *format, const Shape *shape, int dtype, const void *x, void *out, int mode,
                            double variance, const Key *key, int threads) {
  [[maybe_unused]] Gradual gradual;
  Job job{};
  VarianceTable table;
  job.format = *format, job.mode = Mode(mode), job.sink = VALUES, job.dtype = Dtype(dtype);
  if (mode == VC) table.fill(job, variance);
  expect_large(out, shape->numel * (dtype == F32 ? 4 : 2));
  Task task{};
  fill_task(task, x, out, *shape, *key);
  execute(job, &task, 1, threads);
}

// Returns the number of NaN; their codes are 0 (fixed, block) or the NaN pattern (floating point).
EXPORT int64_t lpsgld_encode(const Format *format, const Shape *shape, int dtype, const void *x, void *codes, int width,
                             int8_t *exponents, int mode, const Key *key, int threads) {
  [[maybe_unused]] Gradual gradual;
  Job job{};
  job.format = *format, job.mode = Mode(mode), job.dtype = Dtype(dtype);
  job.sink = width == 1 ? CODES8 : width == 2 ? CODES16 : CODES32;
  expect_large(codes, shape->numel * width);
  Task task{};
  fill_task(task, x, codes, *shape, *key);
  task.exponents = exponents;
  execute(job, &task, 1, threads);
  return task.count.load();
}

struct Decoding {
  const char *codes;
  const int8_t *exponents;
  const float *table;
  float *out;
  int64_t numel, inner;
  int width, offset;
};
// Elements [start, end), whose codes begin at `codes`.
static void decode_run(const Decoding &d, const char *codes, int width, int64_t start, int64_t end) {
  for (int64_t first = start; start < end;) {
    int64_t stop = d.inner && (start / d.inner + 1) * d.inner < end ? (start / d.inner + 1) * d.inner : end;
    const char *from = codes + (start - first) * width;
    if (d.table) {
      for (int64_t i = 0; i < stop - start; i++)
        d.out[start + i] =
            width == 1 ? d.table[uint8_t(from[i])] : d.table[reinterpret_cast<const uint16_t *>(from)[i]];
      start = stop;
      continue;
    }
    if (!d.inner && d.exponents) stop = start + 1;  // an exponent per element
    int gap = d.offset + (d.exponents ? d.exponents[d.inner ? start / d.inner : start] : 0);
    kernels().decode(from, width, d.out + start, stop - start, power_of_two(gap >> 1), power_of_two(gap - (gap >> 1)));
    start = stop;
  }
}
static void decode_item(void *context, int64_t item) {
  [[maybe_unused]] Gradual gradual;
  const Decoding &d = *static_cast<Decoding *>(context);
  const int64_t start = item * ITEM, end = start + ITEM < d.numel ? start + ITEM : d.numel;
  if (d.width > 0) return decode_run(d, d.codes + start * d.width, d.width, start, end);
  int8_t codes[ITEM];
  unpack_codes(d.codes, -d.width, !d.table, start, end - start, codes);
  decode_run(d, reinterpret_cast<const char *>(codes), 1, start, end);
}
// width: bytes of a code, or minus its bits where codes are packed (packing.cpp).
// table: value of every pattern of floating point (codes of 1 or 2 bytes), else null.
EXPORT void lpsgld_decode(const void *codes, int width, const int8_t *exponents, int offset, const float *table,
                          float *out, int64_t numel, int64_t inner, int threads) {
  expect_large(out, numel * 4);
  Decoding d{static_cast<const char *>(codes), exponents, table, out, numel, inner, width, offset};
  run(numel < ITEM ? 1 : threads, (numel + ITEM - 1) / ITEM, decode_item, &d);
}

EXPORT void lpsgld_step(const Step *step, StepTensor *tensors, int count, int threads) {
  [[maybe_unused]] Gradual gradual;
  Job job{};
  VarianceTable table;
  job.format = step->weight, job.gradient = step->gradient;
  job.mode = Mode(step->mode), job.gradient_mode = step->has_gradient_format ? STOCHASTIC : NONE;
  job.sink = VALUES, job.dtype = F32, job.counting = true;
  job.descend = count == 0 || tensors[0].grad;  // without gradients the weights are rounded from their sums, which stay
  job.lr = step->lr, job.weight_decay = step->weight_decay, job.noise = step->noise;
  if (job.mode == VC) table.fill(job, step->variance);
  std::vector<Task> tasks(static_cast<size_t>(count));
  for (int i = 0; i < count; i++) {
    StepTensor &s = tensors[i];
    Task &t = tasks[size_t(i)];
    fill_task(t, s.accumulator ? s.accumulator : s.param, s.param,
              {s.numel, job.mode == NONE ? 0 : s.weight_inner, s.channels, s.pixels}, s.weight_key);
    t.grad = s.grad, t.gradient_key = s.gradient_key, t.last = s.last;
    t.gradient_inner = job.gradient_mode == NONE ? 0 : s.gradient_inner;
  }
  execute(job, tasks.data(), count, threads);
  for (int i = 0; i < count; i++) tensors[i].saturated = tasks[size_t(i)].count.load();
}

struct Motions {
  MotionTensor *tensors;
  std::vector<MotionJobs> jobs;  // of each tensor
  std::vector<VarianceTable> tables;
  std::vector<std::atomic<int64_t>> counts;
  std::vector<Item> items;
  Motions(MotionTensor *t, size_t n) : tensors(t), jobs(n), tables(n), counts(n) {}

  // Runs of whole blocks of all formats; one where the velocity gets a scale.
  void cut(int i) {
    const MotionTensor &t = tensors[i];
    const int64_t inners[] = {t.weight_inner, t.velocity_inner, t.gradient_inner};
    int64_t unit = 1, run = ITEM / 2;
    for (int64_t inner : inners) unit = inner > unit ? inner : unit;
    for (int64_t inner : inners) unit = inner && unit % inner ? t.numel : unit;
    const Motion &m = *t.motion;
    for (const Format *f : {&m.position, &m.velocity, &m.gradient}) unit = std::lcm(unit, grain_of(*f, t.last));
    run = t.motion->rescale ? t.numel : unit > run ? unit : run / unit * unit;
    for (int64_t at = 0; at < t.numel; at += run) items.push_back({i, at, at + run < t.numel ? run : t.numel - at});
  }
  void prepare(int i) {
    const Motion &m = *tensors[i].motion;
    MotionJobs &j = jobs[size_t(i)];
    j.gradient.format = m.gradient, j.position.format = m.position, j.velocity.format = m.velocity;
    j.gradient.mode = j.velocity.mode = STOCHASTIC, j.position.mode = Mode(m.mode), j.position.counting = true;
    if (m.family == UNDERDAMPED && m.mode == VC) tables[size_t(i)].fill(j.position, m.var_x);
    cut(i);
  }
};
static void motion_item(void *context, int64_t i) {
  [[maybe_unused]] Gradual gradual;
  static thread_local Room room;
  Motions &all = *static_cast<Motions *>(context);
  const Item &item = all.items[size_t(i)];
  const size_t which = size_t(item.task);
  room.grow(size_t(item.len) + SLACK);
  const int64_t found = kernels().motion(all.jobs[which], all.tensors[which], item.start, item.len, room);
  all.counts[which].fetch_add(found, std::memory_order_relaxed);
}

// Steps with a velocity or a preconditioner.
EXPORT void lpsgld_motions(MotionTensor *tensors, int count, int threads) {
  [[maybe_unused]] Gradual gradual;
  Motions all(tensors, size_t(count));
  int64_t total = 0;
  for (int i = 0; i < count; i++) all.prepare(i), total += tensors[i].numel;
  run(total < ITEM / 2 ? 1 : threads, int64_t(all.items.size()), motion_item, &all);
  for (int i = 0; i < count; i++) tensors[i].saturated = all.counts[size_t(i)].load();
}

struct Search {  // for NaN and infinities
  const void *const *tensors;
  const int32_t *dtypes;
  std::vector<std::atomic<uint8_t>> bad;
  std::vector<Item> items;
};
static void search_item(void *context, int64_t i) {
  Search &s = *static_cast<Search *>(context);
  const Item &item = s.items[size_t(i)];
  const size_t which = size_t(item.task);
  if (!kernels().finite(s.tensors[which], Dtype(s.dtypes[which]), item.start, item.len)) s.bad[which].store(1);
}

// finite[i]: whether tensor i, which lies in memory in one piece, has neither NaN nor infinities.
EXPORT void lpsgld_finite(const void *const *tensors, const int64_t *numels, const int32_t *dtypes, uint8_t *finite,
                          int count, int threads) {
  Search s{tensors, dtypes, std::vector<std::atomic<uint8_t>>(size_t(count)), {}};
  int64_t total = 0;
  for (int i = 0; i < count; i++) {
    total += numels[i];
    for (int64_t at = 0; at < numels[i]; at += ITEM) s.items.push_back({i, at, std::min(ITEM, numels[i] - at)});
  }
  run(total < ITEM ? 1 : threads, int64_t(s.items.size()), search_item, &s);
  for (int i = 0; i < count; i++) finite[i] = !s.bad[size_t(i)].load();
}

// The draws themselves, for tests: n normals, or n words (the other pointer is null).
EXPORT void lpsgld_draws(const Key *key, float *normals, uint32_t *words, int64_t n) {
  [[maybe_unused]] Gradual gradual;
  kernels().draws(*key, normals != nullptr, normals, words, n);
}

#if defined(_WIN32)
extern "C" __declspec(dllexport) void *PyInit__cpu() { return nullptr; }  // setuptools exports it; nobody imports it
#endif

#else  // ======================= 2. Vector code, once per instruction set =======================

namespace lpsgld {
namespace LPSGLD_TARGET {

constexpr int L = LPSGLD_LANES, Q = L / 2;
constexpr int GROUPS = L == 16 ? 4 : L == 8 ? 3 : 2;  // independent Philox chains in flight
constexpr int BATCH = GROUPS * Q;                     // Philox blocks of a batch; 4 words each
constexpr int TILE = L == 8 ? 576 : 512;              // elements that are rounded while their draws are in the L1 cache
typedef float vf __attribute__((vector_size(L * 4)));
typedef int32_t vi __attribute__((vector_size(L * 4)));
typedef uint32_t vu __attribute__((vector_size(L * 4)));
typedef uint64_t vq __attribute__((vector_size(L * 4)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, type, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

INLINE vf splat(float x) { return vf{} + x; }
INLINE vi splat(int x) { return vi{} + x; }
INLINE vf as_float(vi x) { return (vf)x; }
INLINE vi as_int(vf x) { return (vi)x; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }
template <class T> INLINE T min_of(T a, T b) { return a < b ? a : b; }  // b where a is NaN
template <class T> INLINE T max_of(T a, T b) { return a > b ? a : b; }
#if LPSGLD_LANES == 16
INLINE vf min_of(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vf max_of(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif LPSGLD_LANES == 8
INLINE vf min_of(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vf max_of(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#elif defined(__x86_64__)
INLINE vf min_of(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
INLINE vf max_of(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
#endif
INLINE vf one_more(vf code, vi where) { return where ? code + 1.0f : code; }
INLINE vf magnitude(vf x) { return as_float(as_int(x) & 0x7fffffff); }
INLINE vf power(vi k) { return as_float((k + 127) << 23); }  // 2^k, k in [-126, 127]
INLINE bool any(vi mask) {
#if LPSGLD_LANES == 16
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif LPSGLD_LANES == 8
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  vq m = (vq)mask;
  uint64_t all = 0;
  for (int i = 0; i < Q; i++) all |= m[i];
  return all != 0;
#endif
}
INLINE int64_t total(vi x) {
  int64_t sum = 0;
  for (int i = 0; i < L; i++) sum += x[i];
  return sum;
}
INLINE vf root(vf x) {
#if LPSGLD_LANES == 16
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif LPSGLD_LANES == 8
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (vf)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (vf)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < L; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
template <class V, class P> INLINE V load(const P *p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class P> INLINE void store(P *p, V v) { memcpy(p, &v, sizeof v); }
INLINE vf load_part(const float *p, int m) {  // m <= L elements, zeros after them
  if (m == L) return load<vf>(p);
  float part[L] = {};
  memcpy(part, p, size_t(m) * 4);
  return load<vf>(part);
}
template <class V, class P> INLINE void store_part(P *p, V v, int m) {
  if (m == L) return store(p, v);
  P part[L];
  store(part, v);
  memcpy(p, part, size_t(m) * sizeof(P));
}

// ---- Draws ----

INLINE vq times(vq a, vq m) {  // products of the low words
#if LPSGLD_LANES == 16
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)m);
#elif LPSGLD_LANES == 8
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)m);
#elif defined(__x86_64__)
  return (vq)_mm_mul_epu32((__m128i)a, (__m128i)m);
#else
  return (a & 0xffffffffull) * m;
#endif
}
INLINE vq xor3(vq late, vq b, vq c) {
#if LPSGLD_LANES == 16
  return (vq)_mm512_ternarylogic_epi64((__m512i)late, (__m512i)b, (__m512i)c, 0x96);
#else
  return late ^ (b ^ c);
#endif
}

// Words 0 and 2 (1 and 3) of each 16 bytes of a, then of b. (As generic shuffles they cost three instructions each.)
#if LPSGLD_LANES == 16
INLINE vu even_of(vu a, vu b) { return (vu)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88); }
INLINE vu odd_of(vu a, vu b) { return (vu)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xdd); }
#elif LPSGLD_LANES == 8
INLINE vu even_of(vu a, vu b) { return (vu)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88); }
INLINE vu odd_of(vu a, vu b) { return (vu)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd); }
#elif defined(__x86_64__)
INLINE vu even_of(vu a, vu b) { return (vu)_mm_shuffle_ps((__m128)a, (__m128)b, 0x88); }
INLINE vu odd_of(vu a, vu b) { return (vu)_mm_shuffle_ps((__m128)a, (__m128)b, 0xdd); }
#else
INLINE vu even_of(vu a, vu b) { return SHUFFLE(a, b, vu, 0, 2, 4, 6); }
INLINE vu odd_of(vu a, vu b) { return SHUFFLE(a, b, vu, 1, 3, 5, 7); }
#endif

constexpr uint64_t MULTIPLIER0 = 0xD2511F53ull, MULTIPLIER1 = 0xCD9E8D57ull;

struct Philox {
  vq k0[10], k1[10];
  uint64_t stream, step;
  void init(const Key &key, uint32_t stream_bits) {
    uint32_t a = uint32_t(key.seed), b = uint32_t(key.seed >> 32);
    for (int r = 0; r < 10; r++, a += 0x9E3779B9u, b += 0xBB67AE85u) k0[r] = vq{} + a, k1[r] = vq{} + b;
    stream = key.stream | stream_bits, step = key.step;
  }
};

// Of the counter's four words only one differs between blocks whose indices have the same high word, and the first rounds
// mix slowly: two products and five words of the first three rounds are the same for all, and are taken once.
struct Opening {
  uint64_t high;
  vq c2_first, c0_second, c2_second, c2_third;  // what is xored where a round's other half is the same for all
  Opening(const Philox &p, uint64_t index) {
    high = index >> 32;
    const uint64_t p1 = p.stream * MULTIPLIER1, p0 = ((p1 >> 32) ^ high ^ p.k0[0][0]) * MULTIPLIER0;
    c2_first = p.k1[0] ^ p.step, c0_second = p.k0[1] ^ uint64_t(uint32_t(p1));
    c2_second = p.k1[1] ^ (p0 >> 32), c2_third = p.k1[2] ^ uint64_t(uint32_t(p0));
  }
};

// Words live in the low halves of 64-bit lanes, where the multiplier wants them; what is above them is never read.
// `block`: indices in lane order (block_lanes), GROUPS vectors of them, high words as in `o`. Writes BATCH blocks of
// four words in order.
INLINE void philox(const Philox &p, const Opening &o, const vq *block, uint32_t *out) {
  const vq m0 = vq{} + MULTIPLIER0, m1 = vq{} + MULTIPLIER1;
  vq c0[GROUPS], c1[GROUPS], c2[GROUPS], c3[GROUPS];
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS; g++) {
    const vq first = times(block[g], m0), second = times((first >> 32) ^ o.c2_first, m1);
    c0[g] = (second >> 32) ^ o.c0_second, c2[g] = first ^ o.c2_second;
    const vq p0 = times(c0[g], m0), p1 = times(c2[g], m1);
    c0[g] = xor3(p1 >> 32, second, p.k0[2]), c2[g] = (p0 >> 32) ^ o.c2_third;
    c1[g] = p1, c3[g] = p0;
  }
#pragma GCC unroll 7
  for (int r = 3; r < 10; r++) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      const vq p0 = times(c0[g], m0), p1 = times(c2[g], m1);
      c0[g] = xor3(p1 >> 32, c1[g], p.k0[r]), c2[g] = xor3(p0 >> 32, c3[g], p.k1[r]);
      c1[g] = p1, c3[g] = p0;
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS; g++) {
    vu a = even_of((vu)c0[g], (vu)c1[g]), b = even_of((vu)c2[g], (vu)c3[g]);
    store(out + g * 2 * L, even_of(a, b)), store(out + g * 2 * L + L, odd_of(a, b));
  }
}

INLINE int block_lane(int j) {  // lane that holds block j of a group: the shuffles above then need no permutation
  return j < Q / 2 ? 2 * j : 2 * (j - Q / 2) + 1;
}

// A batch of blocks in any order, block j of it in lane block_lane(j % Q) of vector j / Q; high words may differ.
__attribute__((noinline)) static void philox_mixed(const Philox &p, const uint64_t *index, uint32_t *out) {
  alignas(64) uint32_t words[4 * BATCH];
  for (int j = 0; j < BATCH; j++) {
    const uint64_t own = index[j / Q * Q + block_lane(j % Q)];
    const vq block[GROUPS] = {vq{} + own};
    philox(p, Opening(p, own), block, words);
    memcpy(out + 4 * j, words, 16);
  }
}

// n words from global element `first` on; out[0] is element 4 * (first / 4). Writes up to SLACK words too many.
static void words_from(const Philox &p, uint64_t first, int64_t n, uint32_t *out) {
  uint64_t lanes[Q];
  for (int j = 0; j < Q; j++) lanes[block_lane(j)] = uint64_t(j);
  vq block[GROUPS];
  for (int g = 0; g < GROUPS; g++) block[g] = load<vq>(lanes) + first / 4 + uint64_t(g * Q);
  const int64_t end = int64_t(first % 4) + n;
  const Opening opening(p, first / 4);
  if ((first / 4 + uint64_t(end / 4 + BATCH)) >> 32 == opening.high) {
    for (int64_t i = 0; i < end; i += 4 * BATCH) {
      philox(p, opening, block, out + i);
      for (int g = 0; g < GROUPS; g++) block[g] += uint64_t(BATCH);
    }
    return;
  }
  for (int64_t i = 0; i < end; i += 4 * BATCH) {
    alignas(64) uint64_t index[BATCH];
    for (int g = 0; g < GROUPS; g++) store(index + g * Q, block[g]), block[g] += uint64_t(BATCH);
    philox_mixed(p, index, out + i);
  }
}

// -2 ln((w + 1/2) 2^-32), accurate relatively at both ends: it is taken of the nearer of u and 1 - u.
INLINE vf minus_two_log(vu word) {
  vi upper = (vi)word >> 31;
  vf u = (to_float((vi)word ^ upper) + 0.5f) * 0x1p-32f;  // in (0, 1/2]
  vi bits = as_int(u) - 0x3f3504f3;                         // sqrt(1/2): mantissa in [sqrt(1/2), sqrt(2))
  vi exponent = bits >> 23;
  vf y = as_float((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  vi half = u > 0.29289323f;
  y = upper ? (half ? 1.0f - 2.0f * u : -u) : y;
  vf e = to_float(upper ? (half ? splat(-1) : splat(0)) : exponent);
  vf z = y * y;
  vf q = y * -0.0763449302f + 0.1276157564f;
  q = q * y - 0.1316018306f, q = q * y + 0.1420175823f, q = q * y - 0.1662335730f;
  q = q * y + 0.2000122687f, q = q * y - 0.2500082104f, q = q * y + 0.3333333171f;
  vf tail = y * z * q + e * -2.12194440e-4f;
  vf log = ((tail - 0.5f * z) + y) + e * 0.693359375f;
  return -2.0f * log;
}

// Cosine and sine of 2 pi (w + 1/2) 2^-32; the quarter turn nearest to the angle is taken off exactly.
INLINE void turn(vu word, vf &cosine, vf &sine) {
  vi quarter = (vi)((word + 0x20000000u) >> 30);
  vf x = (to_float((vi)(word - ((vu)quarter << 30))) + 0.5f) * 1.4629180792671596e-9f;  // 2 pi 2^-32
  vf z = x * x;
  vf s = x + x * z * ((z * -0.000195173f + 0.0083321781f) * z - 0.1666665494f);
  vf c = (z * z * ((z * 2.4438451419e-05f - 1.3887367514e-03f) * z + 4.1666646866e-02f) - 0.5f * z) + 1.0f;
  vi swap = -(quarter & 1), sign_c = ((quarter + 1) & 2) << 30, sign_s = (quarter & 2) << 30;
  cosine = as_float(as_int(swap ? s : c) ^ sign_c), sine = as_float(as_int(swap ? c : s) ^ sign_s);
}

// Box-Muller in place: pairs of words to pairs of normals. Writes whole vectors: n rounded up to 2 L.
static void normals_of(uint32_t *words, int64_t n) {
  for (int64_t i = 0; i < n; i += 2 * L) {
    vu a = load<vu>(words + i), b = load<vu>(words + i + L);
    const vu even = even_of(a, b), odd = odd_of(a, b);
    vf radius = root(minus_two_log(even)), c, s;
    turn(odd, c, s);
    c *= radius, s *= radius;
#if LPSGLD_LANES == 16
    vf first = SHUFFLE(c, s, vi, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    vf second = SHUFFLE(c, s, vi, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif LPSGLD_LANES == 8
    vf first = SHUFFLE(c, s, vi, 0, 8, 1, 9, 4, 12, 5, 13), second = SHUFFLE(c, s, vi, 2, 10, 3, 11, 6, 14, 7, 15);
#else
    vf first = SHUFFLE(c, s, vi, 0, 4, 1, 5), second = SHUFFLE(c, s, vi, 2, 6, 3, 7);
#endif
    store(words + i, first), store(words + i + L, second);
  }
}

// The draws of one stream for elements in memory order, made a window at a time. Windows of all streams of a task
// have the same ends, so a tile is what is left of the window.
struct Draws {
  Philox p;
  bool normal;
  uint64_t offset;
  int64_t lo = 0, hi = 0, channels, pixels;
  const uint32_t *base = nullptr;
  uint32_t *patch = nullptr;
  alignas(64) uint32_t words[TILE + SLACK];

  void init(const Task &t, const Key &key, bool is_normal) {
    p.init(key, is_normal ? NORMAL_BIT : 0);
    normal = is_normal, offset = key.offset, channels = t.channels, pixels = t.pixels;
  }
  ~Draws() { free(patch); }

  // Elements of the window around i; the window's end if that is before `limit`.
  static int64_t window_end(const Task &t, int64_t i, int64_t limit) {
    int64_t end;
    if (t.channels) {
      int64_t sample = t.channels * t.pixels, rows = PATCH / t.channels * t.channels, in = i % sample;
      end = i - in + (in / rows + 1) * rows;
      if (end > i - in + sample) end = i - in + sample;
    } else {
      end = (i / TILE + 1) * TILE;
    }
    return end < limit ? end : limit;
  }
  const uint32_t *at(const Task &t, int64_t i, int64_t limit) {  // valid up to window_end(t, i, limit)
    if (i < lo || i >= hi) {
      lo = i, hi = window_end(t, i, limit);
      if (channels) {
        fill_patch();
      } else {
        uint64_t first = offset + uint64_t(i);
        words_from(p, first, hi - lo, words);
        if (normal) normals_of(words, int64_t(first % 4) + hi - lo);
        base = words + first % 4;
      }
    }
    return base + (i - lo);
  }
  void fill_patch();
};

typedef uint32_t v4 __attribute__((vector_size(16)));

// 4 x 4 words: to[i * step + j] = from_j[i].
INLINE void transpose4(const uint32_t *f0, const uint32_t *f1, const uint32_t *f2, const uint32_t *f3, uint32_t *to,
                       int64_t step) {
  v4 a = load<v4>(f0), b = load<v4>(f1), c = load<v4>(f2), d = load<v4>(f3);
  v4 ac0 = SHUFFLE(a, c, v4, 0, 4, 1, 5), ac1 = SHUFFLE(a, c, v4, 2, 6, 3, 7);
  v4 bd0 = SHUFFLE(b, d, v4, 0, 4, 1, 5), bd1 = SHUFFLE(b, d, v4, 2, 6, 3, 7);
  store(to, SHUFFLE(ac0, bd0, v4, 0, 4, 1, 5)), store(to + step, SHUFFLE(ac0, bd0, v4, 2, 6, 3, 7));
  store(to + 2 * step, SHUFFLE(ac1, bd1, v4, 0, 4, 1, 5)), store(to + 3 * step, SHUFFLE(ac1, bd1, v4, 2, 6, 3, 7));
}

// Channels-last: the window is a run of whole pixels of one sample. The draws of a channel are a run of the logical
// order: they are made channel by channel from the blocks that cover them, then transposed.
__attribute__((noinline)) void Draws::fill_patch() {
  const int64_t sample = channels * pixels, in = lo % sample, pixel = in / channels;
  lo -= in % channels;
  const int64_t run = (hi - lo + channels - 1) / channels, room = PATCH / channels + 8;  // words of a channel
  if (!patch) patch = static_cast<uint32_t *>(malloc(size_t(PATCH + channels * (room + 1)) * 4));
  uint32_t *rows = patch + PATCH + channels;
  const uint64_t origin = offset + uint64_t(lo - pixel * channels + pixel);  // of channel 0, at the first pixel
  alignas(64) uint64_t index[BATCH];
  alignas(64) uint32_t out[4 * BATCH];
  uint32_t *to[BATCH];
  int filled = 0;
  auto flush = [&] {
    vq block[GROUPS];
    for (int j = filled; j < BATCH; j++) index[j / Q * Q + block_lane(j % Q)] = index[0];
    uint64_t other = 0;
    for (int j = 0; j < BATCH; j++) other |= (index[j] ^ index[0]) >> 32;
    for (int g = 0; g < GROUPS; g++) block[g] = load<vq>(index + g * Q);
    if (other)
      philox_mixed(p, index, out);
    else
      philox(p, Opening(p, index[0]), block, out);
    if (normal) normals_of(out, 4 * BATCH);
    for (int j = 0; j < filled; j++) memcpy(to[j], out + 4 * j, 16);
    filled = 0;
  };
  for (int64_t c = 0; c < channels; c++) {
    const uint64_t first = origin + uint64_t(c * pixels);
    const int64_t blocks = (int64_t(first % 4) + run + 3) / 4;
    for (int64_t b = 0; b < blocks; b++) {
      index[filled / Q * Q + block_lane(filled % Q)] = first / 4 + uint64_t(b);
      to[filled] = rows + c * room + 4 * b;
      if (++filled == BATCH) flush();
    }
  }
  if (filled) flush();
  auto row = [&](int64_t c) { return rows + c * room + (origin + uint64_t(c * pixels)) % 4; };
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) {
    const uint32_t *r0 = row(c), *r1 = row(c + 1), *r2 = row(c + 2), *r3 = row(c + 3);
    int64_t x = 0;
    for (; x + 4 <= run; x += 4) transpose4(r0 + x, r1 + x, r2 + x, r3 + x, patch + x * channels + c, channels);
    for (; x < run; x++) {
      uint32_t *at = patch + x * channels + c;
      at[0] = r0[x], at[1] = r1[x], at[2] = r2[x], at[3] = r3[x];
    }
  }
  for (; c < channels; c++)
    for (int64_t x = 0; x < run; x++) patch[x * channels + c] = row(c)[x];
  base = patch;
}

// (w >> 9 + 1/2) 2^-23, exact: 1 + k 2^-23 by its bits, less 1 - 2^-24.
INLINE vf uniform(vu word) { return as_float((vi)(word >> 9) | 0x3f800000) - (1.0f - 0x1p-24f); }

// ---- 16-bit dtypes: tiles of them are widened, results are exact in them ----

static void widen(const void *from, Dtype dtype, int64_t start, int64_t n, float *to) {
  const uint16_t *p = static_cast<const uint16_t *>(from) + start;
  if (dtype == BF16) {
    for (int64_t i = 0; i < n; i++) to[i] = float_of(uint32_t(load<uint16_t>(p + i)) << 16);
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    uint32_t h = load<uint16_t>(p + i), bits = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
    float finite = float_of(bits) * 0x1p112f;
    to[i] = float_of(sign | ((h & 0x7c00u) == 0x7c00u ? bits | 0x7f800000u : bits_of(finite)));
  }
}
static void narrow(const float *from, int64_t n, Dtype dtype, void *to, int64_t start) {
  uint16_t *p = static_cast<uint16_t *>(to) + start;
  if (dtype == BF16) {
    for (int64_t i = 0; i < n; i++) store(p + i, uint16_t(bits_of(from[i]) >> 16));
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = bits_of(from[i]), sign = bits >> 16 & 0x8000u;
    uint32_t finite = bits_of(float_of(bits & 0x7fffffffu) * 0x1p-112f) >> 13;
    bool special = (bits & 0x7f800000u) == 0x7f800000u;
    store(p + i, uint16_t(sign | (special ? 0x7c00u | (bits >> 13 & 0x3ffu) : finite)));
  }
}
INLINE const float *tile_of(const void *x, Dtype dtype, int64_t start, int64_t n, float *buffer) {
  if (dtype == F32) return static_cast<const float *>(x) + start;
  widen(x, dtype, start, n, buffer);
  return buffer;
}

// ---- Peaks ----

static uint32_t slow_peak(const float *x, int64_t n) {
  uint32_t peak = 0, infinite = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = load<uint32_t>(x + i) & 0x7fffffffu;
    if (bits == INF_BITS) infinite = 1;
    if (bits < INF_BITS && bits > peak) peak = bits;
  }
  return 2 * peak + infinite;
}
INLINE uint32_t largest(vi m) {
  int32_t peak = 0;
  for (int i = 0; i < L; i++) peak = m[i] > peak ? m[i] : peak;
  return uint32_t(peak);
}
static uint32_t largest_bits(const float *x, int64_t n) {  // of a magnitude; NaN above infinity
  vi a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    a = max_of(a, as_int(load<vf>(x + i)) & 0x7fffffff);
    b = max_of(b, as_int(load<vf>(x + i + L)) & 0x7fffffff);
    c = max_of(c, as_int(load<vf>(x + i + 2 * L)) & 0x7fffffff);
    d = max_of(d, as_int(load<vf>(x + i + 3 * L)) & 0x7fffffff);
  }
  for (; i < n; i += L) a = max_of(a, as_int(load_part(x + i, n - i < L ? int(n - i) : L)) & 0x7fffffff);
  return largest(max_of(max_of(a, b), max_of(c, d)));
}
INLINE uint32_t peak_from(uint32_t bits, const float *x, int64_t n) { return bits < INF_BITS ? 2 * bits : slow_peak(x, n); }
static uint32_t peak_of(const float *x, int64_t n) { return peak_from(largest_bits(x, n), x, n); }
static uint32_t scan(const void *x, Dtype dtype, int64_t start, int64_t len) {
  if (dtype == F32) return peak_of(static_cast<const float *>(x) + start, len);
  float buffer[TILE];
  uint32_t peak = 0;
  for (int64_t i = 0; i < len; i += TILE) {
    int64_t n = len - i < TILE ? len - i : TILE;
    widen(x, dtype, start + i, n, buffer);
    uint32_t here = peak_of(buffer, n);
    peak = here > peak ? here : peak;
  }
  return peak;
}

// ---- NaN and infinities ----

// Whether no number has all bits of its exponent set. Integers: one comparison a vector, whatever the type.
template <class U> INLINE bool none_special(const void *x, int64_t start, int64_t len, U special) {
  const U *p = static_cast<const U *>(x) + start;
  U found = 0;
  for (int64_t i = 0; i < len; i++) found |= (load<U>(p + i) & special) == special ? U(~U(0)) : U(0);
  return !found;
}
static bool finite(const void *x, Dtype dtype, int64_t start, int64_t len) {
  if (dtype == F32) return none_special<uint32_t>(x, start, len, INF_BITS);
  if (dtype == F64) return none_special<uint64_t>(x, start, len, 0x7ff0000000000000ull);
  return none_special<uint16_t>(x, start, len, dtype == BF16 ? 0x7f80 : 0x7c00);
}

// ---- Rounding ----

struct Scale {
  float up1, up2, gap;        // x / gap = x * up1 * up2 (2^-gap exponent may be out of float's range)
  float up, tame;             // 1 / gap where it is in that range; tame: see `tame_below`
  float negative, positive;   // largest magnitudes of a code
  float below, above;         // values beyond these saturate
  float target, spread;       // Q^vc, in units of the gap
  bool high;
  int exponent, level;        // E, and how often it is raised because codes pass the top
};

INLINE Scale scale_at(const Format &f, int gap) {
  Scale s;
  int half = -gap / 2;
  s.up1 = power_of_two(half), s.up2 = power_of_two(-gap - half), s.gap = power_of_two(gap);
  const bool direct = gap >= -126 && gap <= 106;
  s.up = direct ? power_of_two(-gap) : 0, s.tame = -1;
  s.negative = -f.code_min, s.positive = f.code_max;
  s.below = f.code_min * s.gap, s.above = f.code_max * s.gap;
  s.target = s.spread = 0, s.high = false, s.exponent = gap - f.offset, s.level = 0;
  return s;
}

// Codes up to this one stay in their range whatever the draw.
INLINE float safe_code(const Scale &s, Mode mode) {
  return s.positive - (mode != VC ? 0.0f : s.high ? 6.8f * s.spread + 2.0f : 2.0f);
}

// Magnitudes up to `tame` are scaled in one multiplication, and neither they nor their roundings need any care.
INLINE void tame_below(Scale &s, Mode mode) {
  const float safe = safe_code(s, mode);
  s.tame = s.up > 0 ? (safe < 0x1p20f ? safe : 0x1p20f) * s.gap : -1;
}

INLINE Scale scale_for(const Job &job, const Format &f, uint32_t peak) {
  int e = f.kind == BLOCK ? exponent_of_peak(peak, f) : 0;
  Scale s = scale_at(f, e + f.offset);
  const bool open = f.carry && e < f.high;  // only infinities are out of range
  if (job.mode == NEAREST && exponent_for_nearest(peak, e, f) != e) s = scale_at(f, e + 1 + f.offset);
  if (open) s.below = -FLT_MAX, s.above = FLT_MAX;
  if (job.mode == VC) {
    float below = s.below, above = s.above;  // saturation is counted on the mean's own grid
    if (f.kind == BLOCK) e = with_headroom(e, magnitude_of_peak(peak) + NOISE_REACH * job.sigma, job);
    int gap = e + f.offset;
    s = scale_at(f, gap);
    s.below = below, s.above = above;
    s.target = job.target[gap + 160], s.spread = job.spread[gap + 160], s.high = gap <= job.high_gap;
  }
  tame_below(s, job.mode);
  return s;
}

// Whole numbers of |x| < 2^24, below and nearest (ties to even; |x| < 2^22), in one instruction where there is one.
#if LPSGLD_LANES == 16
INLINE vf floor_of(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE vf even_integer(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif LPSGLD_LANES == 8
INLINE vf floor_of(vf x) { return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE vf even_integer(vf x) { return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
INLINE vf floor_of(vf x) {
  vf whole = to_float(to_int(x));
  return x < whole ? whole - 1.0f : whole;
}
INLINE vf even_integer(vf x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
#endif

// Rounds a >= 0, at most 2^24. A negative number rounds away from zero where u >= 1 - frac(a): where frac(a) >= 1 - u,
// which is the uniform of the inverted word. A positive one does where frac(a) > u; so a negative one where frac(a) > the
// float before. (Floats that are not negative compare like their bits.)
template <int M> INLINE vf round_magnitude(vf a, vi sign, vu word) {
  if (M == NEAREST) return a < 0x1p23f ? (a + 0x1p23f) - 0x1p23f : a;
  vf whole = floor_of(a);
  vi threshold = as_int(uniform(word ^ (vu)sign)) + sign;
  return one_more(whole, as_int(a - whole) > threshold);
}

template <bool SMALL> INLINE vf nearest_integer(vf x) {  // SMALL: |x| < 2^22 for certain
  vf rounded = even_integer(x);
  return SMALL ? rounded : magnitude(x) < 0x1p22f ? rounded : x;
}

// Signed code of Q^vc, not saturated; s = mean / gap.
template <bool SMALL> INLINE vf vc_high(vf s, vf spread, vf z, vf u) {
  vf whole = nearest_integer<SMALL>(s);
  vf y = (s - whole) + spread * z;
  vf nearest = nearest_integer<SMALL>(y);
  vf r = y - nearest;
  vf down = (0.5f - r) * (0.5f - r) * 0.5f, up = (0.5f + r) * (0.5f + r) * 0.5f;
  return ((whole + nearest) - 1.0f) - to_float((u >= down) + (u >= 1.0f - up));
}
INLINE vf vc_low(vf s, vf target, vf u) {
  vf whole = floor_of(s);
  vf p = s - whole, q = 1.0f - p;
  vf side = max_of(target - p * q, splat(0.0f)) * 0.5f;
  vf minus = q * side, upper = q + side * (p - q), plus = 1.0f - p * side;
  return (whole - 1.0f) - to_float((u >= minus) + (u >= upper) + (u >= plus));
}

// The same where codes of more than `edge`, a float's next power of two, are even: from it one down with 1/3 and two up
// with 1/6 of the jump's variance, which keeps both moments.
INLINE vf vc_low_float(vf s, vf target, vf u, float edge) {
  const float third = 1.0f / 3.0f;
  vf whole = floor_of(s);
  vf p = s - whole, q = 1.0f - p, one = splat(1.0f), two = splat(2.0f);
  vf side = max_of(target - p * q, splat(0.0f)) * 0.5f;
  vi above = whole == edge - 1.0f, below = whole == -edge;
  vf minus = q * side * (below ? splat(third) : one), plus = 1.0f - p * side * (above ? splat(third) : one);
  vf upper = q + side * (p * (above ? splat(2.0f * third) : one) - q * (below ? splat(2.0f * third) : one));
  vf code = one_more(whole, u >= upper);
  code = u < minus ? code - (below ? two : one) : code;
  return u >= plus ? code + (above ? two : one) : code;
}

INLINE void put_codes(void *out, int64_t i, vi codes, int sink, int m) {
  if (sink == CODES8) {
    typedef int8_t v8 __attribute__((vector_size(L)));
    store_part(static_cast<int8_t *>(out) + i, __builtin_convertvector(codes, v8), m);
  } else if (sink == CODES16) {
    typedef int16_t v16 __attribute__((vector_size(L * 2)));
    store_part(static_cast<int16_t *>(out) + i, __builtin_convertvector(codes, v16), m);
  } else {
    store_part(static_cast<int32_t *>(out) + i, codes, m);
  }
}

// Stochastic rounding of tame values, as finish_uniform does it.
INLINE vf tame_rounding(vf v, const Scale &s, vu word) {
  vi sign = as_int(v) >> 31;
  vf code = round_magnitude<STOCHASTIC>(magnitude(v * s.up), sign, word);
  return as_float(as_int(code) | (sign & (int)0x80000000)) * s.gap + 0.0f;
}

// One tile with one gap. M: NEAREST, STOCHASTIC, VC (small variance), VC + 1 (large), VC + 2 (large, codes below 2^20).
// CALM: all magnitudes are known to be at most `tame`.
// Returns the number of saturated (or, for codes, NaN) elements.
template <int M, int S, bool COUNT, bool CALM>
static int64_t finish_uniform(const Scale &s, const float *x, const uint32_t *words, const float *z, int64_t n,
                              void *out, int64_t at) {
  const vf negative = splat(s.negative), positive = splat(s.positive), gap = splat(s.gap);
  const vf target = splat(s.target), spread = splat(s.spread);
  vi count = {};
  auto body = [&](int64_t i, int m) __attribute__((always_inline)) {
    vf v = load_part(x + i, m), code, scaled = CALM ? v * s.up : v * s.up1 * s.up2;
    vi sign = as_int(v) >> 31, good = CALM ? vi{} - 1 : v == v;
    if (CALM && M == STOCHASTIC) {
      code = vf{};
    } else if (M <= STOCHASTIC) {
      vf a = magnitude(scaled);
      if (!CALM) a = min_of(a, s.negative == s.positive ? positive : (sign ? negative : positive));
      vu w = M == STOCHASTIC ? load<vu>(words + i) : vu{};
      code = as_float(as_int(round_magnitude<M>(a, sign, w)) | (sign & (int)0x80000000));
    } else {
      const vf far = splat(M == VC + 2 ? 0x1p21f : 0x1p24f);  // beyond what noise brings back
      if (!CALM) scaled = max_of(min_of(scaled, far), -far);
      vf u = uniform(load<vu>(words + i));
      code = M == VC ? vc_low(scaled, target, u) : vc_high<M == VC + 2>(scaled, spread, load<vf>(z + i), u);
      if (!CALM) code = max_of(min_of(code, positive), -negative);
      if (!CALM) code = magnitude(v) < __builtin_inff() ? code : (sign ? -negative : positive);  // noise moves no infinity
    }
    if (CALM && M == STOCHASTIC) {
      store_part(static_cast<float *>(out) + i, tame_rounding(v, s, load<vu>(words + i)), m);
    } else if (CALM) {
      store_part(static_cast<float *>(out) + i, M == NEAREST ? code * gap + 0.0f : code * gap, m);
    } else if (S == VALUES) {
      if (COUNT) count = ((v < s.below) | (v > s.above)) ? count + 1 : count;  // zeros after the end never count
      store_part(static_cast<float *>(out) + i, good ? (M <= STOCHASTIC ? code * gap + 0.0f : code * gap) : v + v, m);
    } else {
      count -= ~good;
      put_codes(out, at + i, to_int(as_float(as_int(code) & good)), S, m);
    }
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) body(i, L);
  if (i < n) body(i, int(n - i));
  return total(count);
}

// floor(log2(a)) of a >= 0, clamped; zero gives the lowest, infinity the highest.
INLINE vi exponent_of(vf a, vi low, vi high) {
  vi tiny = as_int(a) < 0x00800000;
  vf normal = tiny ? a * 0x1p32f : a;
  vi e = ((as_int(normal) >> 23) - 127) + (tiny & -32);
  return min_of(max_of(e, low), high);
}

// Raised exponents where the noise needs room, as with_headroom but for a vector; `a` finite.
INLINE vi raised(vi e, vf a, const Job &job, vi low, vi high) {
  typedef float half_f __attribute__((vector_size(Q * 4)));
  typedef int32_t half_i __attribute__((vector_size(Q * 4)));
  typedef double half_d __attribute__((vector_size(Q * 8)));
  typedef int64_t half_l __attribute__((vector_size(Q * 8)));
  const Format &f = job.format;
  if (!any(e < job.free_exponent)) return e;
  if (f.kind >= FLOAT) {  // the next power of two is no code of theirs: no reach is beyond its own exponent
    const vi reach = as_int(a + float(NOISE_REACH * job.sigma));
    if (!any(((reach + 4) & 0x7fffff) < 9)) {  // the sum in float32 may be on the other side
      e = max_of(e, min_of((reach >> 23) - 127, splat(job.free_exponent)));
      return min_of(max_of(e, low), high);
    }
  }
  half_f magnitudes[2];
  half_i wanted[2];
  memcpy(magnitudes, &a, sizeof a);
  for (int h = 0; h < 2; h++) {
    half_d reach = __builtin_convertvector(magnitudes[h], half_d) + NOISE_REACH * job.sigma;
    half_l exponent = ((half_l)reach >> 52) - 1023, top = exponent + f.offset;  // (a reach of 0 raises nothing)
    top = top > -1022 ? top : half_l{} - 1022;
    half_d edge = (half_d)((top + 1023) << 52) * double(f.code_max);
    exponent -= (half_l)(reach > edge);
    wanted[h] = __builtin_convertvector(exponent, half_i);
  }
  vi w = load<vi>(wanted);
  e = max_of(e, min_of(w, splat(job.free_exponent)));
  return min_of(max_of(e, low), high);
}

// A Gaussian step that left its binade, 6.7 standard deviations away, still ends on the grid: on an even code.
INLINE vf held_in_binade(vf code, const Format &f) {
  return magnitude(code) > f.code_max ? nearest_integer<false>(code * 0.5f) * 2.0f : code;
}

INLINE vi pattern_of(vf code, vi e, vi sign, vi good, const Format &f) {
  vi ulps = to_int(code), hidden = splat(1 << f.mantissa);
  vi normal = ((e + f.bias) << f.mantissa) + (ulps - hidden);
  vi pattern = ulps >= hidden ? normal : ulps;
  pattern |= sign & (ulps > 0) & int(1u << (f.bits - 1));
  return good ? pattern : splat(f.nan);
}

// Blocks of one element that pass the top: their codes, still in units of the old gap.
__attribute__((noinline)) static void carry_lanes(float *code, const int32_t *over, const int32_t *e, const Task &t,
                                                  const Format &f, int64_t at) {
  for (int l = 0; l < L; l++) {
    if (!over[l]) continue;
    int64_t k = int64_t(code[l]), top = int64_t(f.code_max);
    int level = carry_code(k, t, t.key, at + l, f, f.high - e[l]);
    code[l] = std::ldexp(float(k > top ? top : k < -top ? -top : k), level);
  }
}
INLINE vf carried_lanes(vf code, vi over, vi e, const Task &t, const Format &f, int64_t at) {
  float codes[L];
  int32_t which[L], exponents[L];
  store(codes, code), store(which, over), store(exponents, e);
  carry_lanes(codes, which, exponents, t, f, at);
  return load<vf>(codes);
}

// Of elements whose gaps differ, beside their values.
struct Lanes {
  const int32_t *shift = nullptr;     // scaled: exponent of the run's scale, at every element
  const int32_t *gap = nullptr;       // where variances differ: exponents of the gaps,
  const float *target = nullptr;      // and v / gap^2
  std::vector<int64_t> *over = nullptr;  // gets where there are draws beyond a scale that is rounded up
};

// One tile with a gap per element: floating point (SHARE: with shared scales), or blocks of one element.
// EACH: a variance an element.
template <int M, int S, bool COUNT, bool SHARE = false, bool EACH = false>
static int64_t finish_lanes(const Job &job, const Task &t, const Format &f, const float *x, const uint32_t *words,
                            const float *z, int64_t n, void *out, int64_t at, int8_t *exponents, Lanes lanes = {}) {
  const bool floating = SHARE || f.kind == FLOAT;
  vi count = {};
  auto body = [&](int64_t i, int m) __attribute__((always_inline)) {
    vf v = load_part(x + i, m), a = magnitude(v), code;
    vi sign = as_int(v) >> 31, good = v == v;
    const vi shift = SHARE ? load<vi>(lanes.shift + i) : vi{}, low = f.low + shift, high_e = f.high + shift;
    const vf top = SHARE ? power(shift >> 1) * f.value_max * power(shift - (shift >> 1)) : splat(f.value_max);
    if (COUNT && SHARE) {
      const vi open = f.fits ? shift < f.scale_high : vi{};
      count = a > (open ? splat(FLT_MAX) : top) ? count + 1 : count;
    } else if (COUNT && floating) {
      count = a > f.value_max ? count + 1 : count;
    }
    if (floating) a = M == VC ? a : min_of(a, top);
    vi finite = a < __builtin_inff();
    vf base = floating ? as_float(as_int(a) & finite) : a;
    vi e = exponent_of(as_float(as_int(base) & good), low, high_e);
    if (COUNT && !floating) {  // on the mean's own grid
      vi own = e + f.offset, part = own >> 1;
      vi here = a > power(part) * f.code_max * power(own - part);
      count -= f.carry ? here & (e >= f.high) : here;
    }
    if (M == VC && !EACH) e = raised(e, as_float(as_int(a) & finite), job, low, high_e);
    vi gap = EACH ? load<vi>(lanes.gap + i) : e + f.offset, up = -gap, half = up >> 1;
    vf scaled = a * power(half) * power(up - half);
    if (M != VC) {
      vu w = M == STOCHASTIC ? load<vu>(words + i) : vu{};
      const vf top = splat(f.code_max);
      const vi open = f.carry ? e < f.high : vi{};
      code = round_magnitude<M>(min_of(scaled, open ? top + 1.0f : top), sign, w);
      if (S != VALUES) {
        const vi over = open & (code > top);  // the next power of two, by which only the exponent changes
        code = over ? code * 0.5f : code, e -= over;
        vi codes = to_int(as_float(as_int(code) & good));
        count -= ~good;
        put_codes(out, at + i, floating ? pattern_of(code, e, sign, good, f) : (codes ^ sign) - sign, S, m);
        if (exponents)
          for (int l = 0; l < m; l++) exponents[at + i + l] = int8_t(e[l]);
        return;
      }
      code = as_float(as_int(code) | (sign & (int)0x80000000));
    } else {
      vf unit = power(half), rest = power(up - half);
      // v / gap^2, exact but for v's own rounding
      vf target = EACH ? load_part(lanes.target + i, m) : splat(job.variance_f) * unit * unit * rest * rest;
      vf spread = root(max_of(target - 0.25f, splat(0.0f)));
      scaled = min_of(scaled, splat(0x1p25f));
      scaled = as_float(as_int(scaled) | (sign & (int)0x80000000));
      vu w = load<vu>(words + i);
      vf u = uniform(w);
      vi high = EACH ? target > 1.0f : gap <= job.high_gap;
      code = floating ? vc_low_float(scaled, target, u, f.code_max) : vc_low(scaled, target, u);
      if (any(high)) {
        vf far = vc_high<false>(scaled, spread, load<vf>(z + i), u);
        code = high ? (floating ? held_in_binade(far, f) : far) : code;
      }
      vf limit = splat(f.code_max);
      if (!floating) {
        const vi over = f.carry ? finite & (magnitude(code) > limit) & (e < f.high) : vi{};
        vf held = max_of(min_of(code, limit), -limit);
        code = any(over) ? (over ? carried_lanes(code, over, e, t, f, at + i) : held) : held;
        code = finite ? code : (sign ? -limit : limit);
      }
    }
    half = gap >> 1;
    vf value = code * power(half) * power(gap - half) + 0.0f;
    if (M == VC && SHARE && f.fits) {
      value = (finite | ~good) ? value : v;
      if (any(magnitude(value) > top)) lanes.over->push_back(at + i);
    } else if (M == VC && SHARE) {
      value = (finite | ~good) ? value : (sign ? -top : top);
      value = max_of(min_of(value, top), -top);
    } else if (M == VC && floating) {
      value = (finite | ~good) ? value : (sign ? splat(f.value_min) : splat(f.value_max));
      value = max_of(min_of(value, splat(f.value_max)), splat(f.value_min));
    }
    store_part(static_cast<float *>(out) + i, good ? value : v + v, m);
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) body(i, L);
  if (i < n) body(i, int(n - i));
  return total(count);
}

// What a run of elements needs beside its data; one per item, on the stack.
struct Scratch {
  Draws gradient, weight, normal, coins;
  std::vector<int32_t> shifts, gradient_shifts;  // of the run of elements that begins at `origin`, `gradient_origin`
  std::vector<int64_t> over;
  int64_t origin = 0, gradient_origin = 0;
  int lowest = 0;  // shift
  float in[PATCH], out[PATCH];
  Scratch(const Job &job, const Task &t) {
    if (job.descend) gradient.init(t, t.gradient_key, false);
    weight.init(t, t.key, false), normal.init(t, t.key, true);
  }
  Draws &coins_of(const Task &t, const Key &key) {  // of the few tiles that are carried
    Key other = key;
    other.seed = key.carry;
    coins.init(t, other, false), coins.lo = coins.hi = 0;
    return coins;
  }
};

INLINE bool lanes(const Format &f, int64_t inner) { return f.kind >= FLOAT || (f.kind == BLOCK && inner == 0); }

#include "cpu_scaled.cpp"

template <int S, bool COUNT, bool CALM = false>
static int64_t finish_block(Mode mode, const Scale &scale, const float *x, const uint32_t *w, const float *z, int64_t n,
                            void *out, int64_t at) {
  if (mode == NEAREST) return finish_uniform<NEAREST, S, COUNT, CALM>(scale, x, w, nullptr, n, out, at);
  if (mode == STOCHASTIC) return finish_uniform<STOCHASTIC, S, COUNT, CALM>(scale, x, w, nullptr, n, out, at);
  if (!scale.high) return finish_uniform<VC, VALUES, COUNT, CALM>(scale, x, w, nullptr, n, out, at);
  const bool small = scale.negative <= 0x1p20f && scale.spread <= 0x1p17f;
  return small ? finish_uniform<VC + 2, VALUES, COUNT, CALM>(scale, x, w, z, n, out, at)
               : finish_uniform<VC + 1, VALUES, COUNT, false>(scale, x, w, z, n, out, at);
}

template <int S, bool COUNT>
static int64_t finish_tile(const Job &job, Task &t, Scratch &s, int64_t i, int64_t n, int64_t limit, const Scale &scale,
                           void *out, bool calm = false) {
  const float *x = tile_of(t.x, job.dtype, i, n, s.in);
  const uint32_t *w = job.mode == NEAREST ? nullptr : s.weight.at(t, i, limit);
  const Format &f = job.format;
  if (!lanes(f, t.inner)) {
    const bool far = job.mode == VC && scale.high;
    const float *z = far ? reinterpret_cast<const float *>(s.normal.at(t, i, limit)) : nullptr;
    if (S == VALUES && !COUNT && calm) return finish_block<VALUES, false, true>(job.mode, scale, x, w, z, n, out, i);
    return finish_block<S, COUNT>(job.mode, scale, x, w, z, n, out, i);
  }
  if (f.kind == SCALED) return finish_scaled<COUNT>(job, t, s, x, w, n, limit, out, i);
  if (job.mode == NEAREST) return finish_lanes<NEAREST, S, COUNT>(job, t, f, x, w, nullptr, n, out, i, t.exponents);
  if (job.mode == STOCHASTIC)
    return finish_lanes<STOCHASTIC, S, COUNT>(job, t, f, x, w, nullptr, n, out, i, t.exponents);
  // The finest gap decides whether any element can be in the large-variance regime.
  const bool reach = f.low + f.offset <= job.high_gap;
  const float *z = reinterpret_cast<const float *>(reach ? s.normal.at(t, i, limit) : w);
  return finish_lanes<VC, VALUES, COUNT>(job, t, f, x, w, z, n, out, i, nullptr);
}

// ---- Blocks that pass the top (ops/carry.py) ----

template <class F> INLINE void tiles(const Task &t, int64_t start, int64_t end, int64_t limit, F f) {
  for (int64_t i = start; i < end;) {
    int64_t stop = Draws::window_end(t, i, limit);
    stop = stop < end ? stop : end;
    f(i, stop - i);
    i = stop;
  }
}

// The rounding of weights or of gradients, for what follows.
struct Source {
  const Format &f;
  Mode mode;
  const void *x;
  Dtype dtype;
  const Key &key;
  Draws &uniforms;
  Source(const Job &job, const Task &t, Scratch &s, bool of_gradient)
      : f(of_gradient ? job.gradient : job.format), mode(of_gradient ? job.gradient_mode : job.mode),
        x(of_gradient ? t.grad : t.x), dtype(of_gradient ? F32 : job.dtype), key(of_gradient ? t.gradient_key : t.key),
        uniforms(of_gradient ? s.gradient : s.weight) {}
};

// Codes beyond the top and the gap as the unit: what finish_block then gives are codes.
INLINE Scale opened(Scale s) {
  s.negative += 64.0f, s.positive += 64.0f, s.gap = 1.0f;
  return s;
}

// How often the exponent of a block is raised because codes in this run of it pass the top. A block that is not near it
// is not looked at, nor are elements that are not.
static int level_of(const Job &job, Task &t, Scratch &s, int64_t start, int64_t len, int64_t limit, const Scale &scale,
                    uint32_t peak, bool of_gradient) {
  const Source from(job, t, s, of_gradient);
  const Format &f = from.f;
  const int room = f.high - scale.exponent;
  if (!f.carry || room <= 0 || (from.mode != STOCHASTIC && from.mode != VC)) return 0;
  const bool far = from.mode == VC && scale.high;
  const float near = safe_code(scale, from.mode);
  if (codes_of_peak(peak, scale.exponent + f.offset) <= near) return 0;
  const Scale open = opened(scale);
  int level = 0;
  tiles(t, start, start + len, limit, [&](int64_t i, int64_t n) {
    const float *x = tile_of(from.x, from.dtype, i, n, s.in);
    for (int64_t j = 0; j < n; j += L) {
      const int m = n - j < L ? int(n - j) : L;
      vf v = load_part(x + j, m), a = magnitude(v * scale.up1 * scale.up2);
      if (!any((a > near) & (magnitude(v) < __builtin_inff()))) continue;
      const uint32_t *w = from.uniforms.at(t, i, limit) + j;
      const float *z = far ? reinterpret_cast<const float *>(s.normal.at(t, i, limit)) + j : nullptr;
      float codes[L];
      finish_block<VALUES, false>(from.mode, open, x + j, w, z, m, codes, 0);
      for (int l = 0; l < m; l++) {
        if (!(std::fabs(codes[l]) > f.code_max) || std::isinf(load<float>(x + j + l))) continue;
        int64_t k = int64_t(codes[l]);
        int here = carry_code(k, t, from.key, i + j + l, f, room);
        level = here > level ? here : level;
      }
    }
  });
  return level;
}

// Codes in units of the old gap to those of the raised exponent; as values, or (S) as integers. Returns the number of NaN.
template <int S>
static int64_t carry_tile(const Format &f, const Scale &scale, const float *x, const float *codes,
                          const uint32_t *coins, int64_t n, void *out, int64_t at) {
  const vf gap = splat(power_of_two(scale.exponent + scale.level + f.offset));
  const vi top = splat(int(f.code_max)), mask = splat((1 << scale.level) - 1);
  vi missing = {};
  for (int64_t i = 0; i < n; i += L) {
    const int m = n - i < L ? int(n - i) : L;
    vf v = load_part(x + i, m), c = load_part(codes + i, m);
    vi sign = as_int(v) >> 31, good = v == v;
    vi k = to_int(as_float(as_int(c) & good)) + ((vi)load<vu>(coins + i) & mask);
    k = max_of(min_of(k >> scale.level, top), -top);
    k = magnitude(v) < __builtin_inff() ? k : (top ^ sign) - sign;
    missing -= ~good;
    if (S == VALUES)
      store_part(static_cast<float *>(out) + i, good ? to_float(k) * gap : v + v, m);
    else
      put_codes(out, at + i, k & good, S, m);
  }
  return S == VALUES ? 0 : total(missing);
}

// A tile of a block whose exponent is raised: rounded on its own grid first, then onto the coarser one.
__attribute__((noinline)) static int64_t finish_carried(const Job &job, Task &t, Scratch &s, int64_t i, int64_t n,
                                                        int64_t limit, const Scale &scale) {
  const Scale open = opened(scale);
  const int64_t count = job.counting ? finish_tile<VALUES, true>(job, t, s, i, n, limit, open, s.out)
                                     : finish_tile<VALUES, false>(job, t, s, i, n, limit, open, s.out);
  const float *x = job.dtype == F32 ? static_cast<const float *>(t.x) + i : s.in;
  const uint32_t *coins = s.coins_of(t, t.key).at(t, i, limit);
  const Format &f = job.format;
  if (job.sink == CODES8) return carry_tile<CODES8>(f, scale, x, s.out, coins, n, t.out, i);
  if (job.sink == CODES16) return carry_tile<CODES16>(f, scale, x, s.out, coins, n, t.out, i);
  if (job.sink == CODES32) return carry_tile<CODES32>(f, scale, x, s.out, coins, n, t.out, i);
  float *out = job.dtype == F32 ? static_cast<float *>(t.out) + i : s.out;
  carry_tile<VALUES>(f, scale, x, s.out, coins, n, out, i);
  if (job.dtype != F32) narrow(out, n, job.dtype, t.out, i);
  return count;
}

INLINE bool may_saturate(const Job &job, const Task &t, const Scale &scale, uint32_t peak) {
  if (peak >= INF_BITS) return true;
  const Format &f = job.format;
  if (lanes(f, t.inner) && f.kind == BLOCK)
    return !f.carry || float_of(peak) > f.code_max * power_of_two(f.high + f.offset);
  if (f.kind == SCALED) return !f.fits || float_of(peak) > f.value_max * power_of_two(f.scale_high);
  if (lanes(f, t.inner)) return float_of(peak) > f.value_max;
  return float_of(peak) > scale.above;  // above <= |below|
}

// Rounds one tile of t.x to t.out.
// `peak`: bits of a magnitude that none of them exceeds (NaN and infinities above all).
INLINE void finish_one(const Job &job, Task &t, Scratch &s, int64_t i, int64_t n, int64_t limit, const Scale &scale,
                       uint32_t peak) {
  int64_t count = 0;
  if (scale.level) {
    count = finish_carried(job, t, s, i, n, limit, scale);
  } else if (job.sink == CODES8) {
    count = finish_tile<CODES8, false>(job, t, s, i, n, limit, scale, t.out);
  } else if (job.sink == CODES16) {
    count = finish_tile<CODES16, false>(job, t, s, i, n, limit, scale, t.out);
  } else if (job.sink == CODES32) {
    count = finish_tile<CODES32, false>(job, t, s, i, n, limit, scale, t.out);
  } else {
    float *out = job.dtype == F32 ? static_cast<float *>(t.out) + i : s.out;
    count = job.counting && may_saturate(job, t, scale, peak)
                ? finish_tile<VALUES, true>(job, t, s, i, n, limit, scale, out)
                : finish_tile<VALUES, false>(job, t, s, i, n, limit, scale, out, float_of(peak) <= scale.tame);
    if (job.dtype != F32) narrow(out, n, job.dtype, t.out, i);
  }
  if (count) t.count.fetch_add(count, std::memory_order_relaxed);
}

// x = x - lr (g + weight_decay x) + noise z. ROUND: g is the rounding of `grad` by `words`. Returns the bits of the
// largest magnitude.
template <bool ROUND>
static uint32_t move_tile(const Job &job, float *x, const float *grad, const Scale &scale, const uint32_t *words,
                          const float *z, int64_t n) {
  vi peak = {};
  auto body = [&](int64_t j, int m) __attribute__((always_inline)) {
    vf v = load_part(x + j, m), g = load_part(grad + j, m);
    if (ROUND) g = tame_rounding(g, scale, load<vu>(words + j));
    if (job.weight_decay != 0) g = g + v * job.weight_decay;
    v = v - g * job.lr;
    if (z) v = v + load_part(z + j, m) * job.noise;
    store_part(x + j, v, m);
    peak = max_of(peak, as_int(v) & 0x7fffffff);
  };
  int64_t j = 0;
  for (; j + L <= n; j += L) body(j, L);
  if (j < n) body(j, int(n - j));
  return largest(peak);
}

// One tile of x = x - lr (Q(grad) + weight_decay x) + noise. Returns the bits of the largest magnitude.
// `bound`: bits of a magnitude that no gradient exceeds (NaN and infinities above all).
static uint32_t drift_one(const Job &job, Task &t, Scratch &s, int64_t i, int64_t n, int64_t limit,
                          const Scale &scale, uint32_t bound) {
  const float *grad = t.grad + i;
  float *x = static_cast<float *>(const_cast<void *>(t.x)) + i;
  const float *z = job.noise != 0 ? reinterpret_cast<const float *>(s.normal.at(t, i, limit)) : nullptr;
  if (job.gradient_mode == NONE) return move_tile<false>(job, x, grad, scale, nullptr, z, n);
  const uint32_t *w = s.gradient.at(t, i, limit);
  if (job.gradient.kind == SCALED) {
    const Lanes own{s.gradient_shifts.data() + (i - s.gradient_origin)};
    finish_lanes<STOCHASTIC, VALUES, false, true>(job, t, job.gradient, grad, w, nullptr, n, s.in, i, nullptr, own);
  } else if (lanes(job.gradient, t.gradient_inner)) {
    finish_lanes<STOCHASTIC, VALUES, false>(job, t, job.gradient, grad, w, nullptr, n, s.in, i, nullptr);
  } else {
    if (!t.gradient_inner) bound = largest_bits(grad, n);
    if (!scale.level && float_of(bound) <= scale.tame) return move_tile<true>(job, x, grad, scale, w, z, n);
    finish_uniform<STOCHASTIC, VALUES, false, false>(scale.level ? opened(scale) : scale, grad, w, nullptr, n, s.in, i);
    if (scale.level) {
      const uint32_t *coins = s.coins_of(t, t.gradient_key).at(t, i, limit);
      carry_tile<VALUES>(job.gradient, scale, grad, s.in, coins, n, s.in, i);
    }
  }
  return move_tile<false>(job, x, s.in, scale, nullptr, z, n);
}

INLINE Scale gradient_scale(const Job &job, const Task &t, uint32_t peak) {
  const Format &f = job.gradient;
  if (job.gradient_mode == NONE || lanes(f, t.gradient_inner)) return Scale{};
  Scale s = scale_at(f, f.offset + (f.kind == BLOCK ? exponent_of_peak(peak, f) : 0));
  tame_below(s, STOCHASTIC);
  return s;
}

// Into the second-level cache: a run is computed on for longer than the next one takes to come.
INLINE void fetch(const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(x + i, 0, 2);
}

// Returns the bits of the largest magnitude after the move.
static uint32_t drift_run(const Job &job, Task &t, Scratch &s, int64_t start, int64_t len, int64_t limit,
                          const Scale &scale, uint32_t bound, const Scale *finish) {
  uint32_t bits = 0;
  if (job.gradient_mode != NONE && job.gradient.kind == SCALED) {
    s.gradient_origin = start;
    shifts_of(nullptr, job.gradient, t.last, t.grad + start, start, len, s.gradient_shifts);
  }
  tiles(t, start, start + len, limit, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    if (i + len + n <= t.numel) fetch(t.grad + i + len, n), fetch(static_cast<const float *>(t.x) + i + len, n);
    uint32_t here = drift_one(job, t, s, i, n, limit, scale, bound);
    bits = here > bits ? here : bits;
    if (finish) finish_one(job, t, s, i, n, limit, *finish, here);
  });
  return bits;
}

// `bound`: bits of a magnitude that no element exceeds (infinities above all; NaN, too, unless nothing is tame).
static void finish_run(const Job &job, Task &t, Scratch &s, int64_t start, int64_t len, int64_t limit, uint32_t bound,
                       const Scale &scale) {
  if (t.exponents && t.inner && start % t.inner == 0)
    t.exponents[start / t.inner] = int8_t(scale.exponent + scale.level);
  const bool scaled = job.format.kind == SCALED;
  if (scaled) begin_scaled(job, t, s, start, len);
  tiles(t, start, start + len, limit,
        [&](int64_t i, int64_t n) __attribute__((always_inline)) { finish_one(job, t, s, i, n, limit, scale, bound); });
  if (scaled && job.mode == VC)
    settle(job.format, t, static_cast<float *>(t.out) + start, start, len, s.shifts.data(), s.over);
}

INLINE Scale weight_scale(const Job &job, const Task &t, uint32_t peak) {
  return lanes(job.format, t.inner) ? Scale{} : scale_for(job, job.format, peak);
}

static int level(const Job &job, Task &t, int64_t start, int64_t len, uint32_t peak, bool of_gradient) {
  Scratch s(job, t);
  const Scale scale = of_gradient ? gradient_scale(job, t, peak) : weight_scale(job, t, peak);
  return level_of(job, t, s, start, len, start + len, scale, peak, of_gradient);
}
static uint32_t drift(const Job &job, Task &t, int64_t start, int64_t len, uint32_t gradient_peak, int gradient_level) {
  Scratch s(job, t);
  Scale scale = gradient_scale(job, t, gradient_peak);
  scale.level = gradient_level;
  const uint32_t bits = drift_run(job, t, s, start, len, start + len, scale, INF_BITS, nullptr);
  return peak_from(bits, static_cast<const float *>(t.x) + start, len);
}
static void finish(const Job &job, Task &t, int64_t start, int64_t len, uint32_t peak, int level) {
  Scratch s(job, t);
  Scale scale = weight_scale(job, t, peak);
  scale.level = level;
  scale.tame = -1;  // the peak knows nothing of NaN
  finish_run(job, t, s, start, len, start + len, t.inner && !(peak & 1) ? peak >> 1 : INF_BITS, scale);
}

// Moves a stretch that is whole blocks of the gradient. Returns the bits of the largest magnitude.
static uint32_t drift_blocks(const Job &job, Task &t, Scratch &s, int64_t start, int64_t len, int64_t end,
                             const Scale *finish) {
  uint32_t bits = 0;
  for (int64_t row = start, n = t.gradient_inner ? t.gradient_inner : len; row < start + len; row += n) {
    const float *grad = t.grad + row;
    const uint32_t bound = t.gradient_inner ? largest_bits(grad, n) : INF_BITS;
    const uint32_t peak = t.gradient_inner ? peak_from(bound, grad, n) : 0;
    Scale slope = gradient_scale(job, t, peak);
    if (t.gradient_inner) slope.level = level_of(job, t, s, row, n, end, slope, peak, true);
    const uint32_t here = drift_run(job, t, s, row, n, end, slope, bound, finish);
    bits = here > bits ? here : bits;
  }
  return bits;
}

// Whole blocks (or a run of elements where there are none): each stays in the cache from its first pass to its last.
static void rows(const Job &job, Task &t, int64_t start, int64_t len) {
  Scratch s(job, t);
  const int64_t end = start + len, grain = std::lcm(grain_of(job.format, t.last), grain_of(job.gradient, t.last));
  const int64_t coarse = t.inner > t.gradient_inner ? t.inner : t.gradient_inner;
  const bool at_once = job.descend && !t.inner && job.format.kind != SCALED;  // tiles are moved and rounded
  Scale constant{};
  if (job.mode != NONE && !t.inner && !lanes(job.format, 0)) constant = scale_for(job, job.format, 0);
  for (int64_t row = start, n = coarse ? std::lcm(coarse, grain) : len; row < end; row += n) {
    n = n < end - row ? n : end - row;
    uint32_t moved = INF_BITS;
    if (job.descend) moved = drift_blocks(job, t, s, row, n, end, job.mode == NONE || !at_once ? nullptr : &constant);
    if (job.mode == NONE || at_once) continue;
    for (int64_t i = row, m = t.inner ? t.inner : n; i < row + n; i += m) {
      const float *x = static_cast<const float *>(t.x) + i;
      uint32_t bits = moved, peak = 0;
      if (t.inner && job.dtype == F32) {
        if (!job.descend || m != n) bits = largest_bits(x, m);
        peak = peak_from(bits, x, m);
      } else if (t.inner) {
        peak = scan(t.x, job.dtype, i, m);
      }
      Scale scale = weight_scale(job, t, peak);
      if (t.inner) scale.level = level_of(job, t, s, i, m, end, scale, peak, false);
      finish_run(job, t, s, i, m, end, bits, scale);
    }
  }
}

static void decode(const void *codes, int width, float *out, int64_t n, float scale1, float scale2) {
  if (width == 1)
    for (int64_t i = 0; i < n; i++) out[i] = float(static_cast<const int8_t *>(codes)[i]) * scale1 * scale2;
  else if (width == 2)
    for (int64_t i = 0; i < n; i++) out[i] = float(static_cast<const int16_t *>(codes)[i]) * scale1 * scale2;
  else
    for (int64_t i = 0; i < n; i++) out[i] = float(static_cast<const int32_t *>(codes)[i]) * scale1 * scale2;
}

static void draws(const Key &key, bool normal, float *normals, uint32_t *words, int64_t n) {
  Task t{};
  t.numel = n;
  Draws d;
  d.init(t, key, normal);
  tiles(t, 0, n, n, [&](int64_t i, int64_t m) {
    const uint32_t *from = d.at(t, i, n);
    memcpy(normal ? static_cast<void *>(normals + i) : static_cast<void *>(words + i), from, size_t(m) * 4);
  });
}

#include "cpu_motion.cpp"

#define LPSGLD_TEXT(x) #x
#define LPSGLD_NAME(x) LPSGLD_TEXT(x)
static const Kernels kernels{LPSGLD_NAME(LPSGLD_TARGET), scan, drift, level, finish, rows, decode, draws, finite, motion};
#undef LPSGLD_TEXT
#undef LPSGLD_NAME
#undef SHUFFLE

}  // namespace LPSGLD_TARGET
}  // namespace lpsgld

#endif
