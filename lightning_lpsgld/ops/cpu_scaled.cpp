// Floats that share a scale in runs of a row (microscaling), once per instruction set. Included by cpu.cpp within its
// vector code; formats/microscaling.py is the definition, and names are its. A *shift* is the exponent of a scale: an
// element of a run is rounded as a float whose exponents are all raised by it.

INLINE uint64_t double_bits(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}
// floor(log2(x)), and 2^e for e in [-1022, 1023], by bits; less than every exponent of a format for zero.
INLINE int log2_of(double x) { return x > 0 ? int(double_bits(x) >> 52) - 1023 : -2000; }
INLINE double power_of(int e) {
  const uint64_t bits = uint64_t(e + 1023) << 52;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

// log2 of the smallest scale under which `size` does not saturate (`fits`), or of that of the conversion.
INLINE int scale_of(double size, const Format &f, bool fits) {
  constexpr uint64_t mantissa = (1ull << 52) - 1;
  const bool beyond = (double_bits(size) & mantissa) > (double_bits(double(f.value_max)) & mantissa);
  return log2_of(size) - f.high + (fits && beyond);
}
INLINE int held_scale(int e, const Format &f) { return e < f.scale_low ? f.scale_low : e > f.scale_high ? f.scale_high : e; }

// That of a run by its peak; `job`: raised for the noise.
INLINE int shift_of(const Job *job, const Format &f, uint32_t peak) {
  if (peak == 1) return f.scale_high;  // infinities and zeros
  const double size = magnitude_of_peak(peak);
  int e = scale_of(size, f, f.fits);
  if (job) {
    const int free = job->free_exponent - f.low;  // its smallest gap is at most 2 sigma
    if (e < free) {
      const int wanted = scale_of(size + NOISE_REACH * job->sigma, f, true), most = wanted < free ? wanted : free;
      e = e > most ? e : most;
    }
  }
  return held_scale(e, f);
}

// Calls with the first element and the size of every run of a stretch of whole runs.
template <class F> INLINE void runs_of(const Format &f, int64_t last, int64_t start, int64_t len, F call) {
  const int64_t run = f.run < last ? f.run : last;
  for (int64_t i = start, left = last - start % last; i < start + len;) {
    const int64_t n = run < left ? run : left;
    call(i, n);
    i += n, left -= n;
    if (!left) left = last;
  }
}

// Largest magnitudes (their bits) of the `run` elements from each one of x on, for n of them; x has 4 L more.
INLINE void sliding_peaks(const float *x, int64_t n, int64_t run, int32_t *peaks) {
  for (int64_t i = 0; i < n + 3 * L; i += L) store(peaks + i, load<vi>(x + i) & 0x7fffffff);
  int64_t width = 1;
  auto widen = [&](int64_t by) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n + 2 * L; i += L) store(peaks + i, max_of(load<vi>(peaks + i), load<vi>(peaks + i + by)));
    width += by;
  };
  while (2 * width <= run) widen(width);
  if (width < run) widen(run - width);
}

// Calls with stretches of short runs, and the peaks from each of their elements on. Returns where the last one ends: what
// is left is short.
constexpr int64_t STRETCH = 512;
template <class F> INLINE int64_t short_runs(const float *x, int64_t len, int64_t run, F call) {
  alignas(64) int32_t peaks[STRETCH + 6 * L];
  int64_t i = 0;
  for (const int64_t n = STRETCH / run * run; i + n + 4 * L <= len; i += n) {
    sliding_peaks(x + i, n, run, peaks);
    call(i, n, peaks);
  }
  return i;
}

// Shifts of peaks, in place, as shift_of; false where there are NaN or infinities. None of them is below `lowest` then.
INLINE bool shifts_from(const Job *job, const Format &f, int32_t *peaks, int64_t n, int &lowest) {
  const int beyond = 0x7fffff - int(bits_of(f.value_max) & 0x7fffff);  // carries from the mantissas that do not fit
  const int own = f.fits ? beyond : 0, bias = 127 + f.high, free = job ? job->free_exponent - f.low : 0;
  const vf reach = splat(job ? float(NOISE_REACH * job->sigma) : 0.0f);
  vi largest = {}, smallest = splat(lowest);
  for (int64_t i = 0; i < n; i += L) {
    const vi bits = load<vi>(peaks + i);
    largest = max_of(largest, bits);
    vi e = ((vi)((vu)bits + uint32_t(own)) >> 23) - bias;  // unsigned: NaN may be among them, which is found below
    if (job) {
      const vi with = (vi)((vu)(as_float(bits) + reach) + uint32_t(beyond));
      e = max_of(e, min_of((with >> 23) - bias, splat(free)));
      const vi close = (vi)(((vu)with + 4u) & 0x7fffffu) < 9;  // the sum in float32 may be on the other side
      if (any(close))
        for (int l = 0; l < L; l++)
          if (close[l]) e[l] = bits[l] < int(INF_BITS) ? shift_of(job, f, 2 * uint32_t(bits[l])) : 0;
    }
    e = min_of(max_of(e, splat(f.scale_low)), splat(f.scale_high));
    smallest = min_of(smallest, e);
    store(peaks + i, e);
  }
  for (int l = 0; l < L; l++) lowest = smallest[l] < lowest ? smallest[l] : lowest;
  return !any(largest >= int(INF_BITS));
}

// Shifts of the runs of x, which begins at element `start`, at every element. Returns the smallest.
static int shifts_of(const Job *job, const Format &f, int64_t last, const float *x, int64_t start, int64_t len,
                     std::vector<int32_t> &shifts) {
  if (shifts.size() < size_t(len + 2 * L)) shifts.resize(size_t(len + 2 * L));
  int lowest = f.scale_high;
  int32_t *to = shifts.data();
  auto one = [&](int64_t at, int64_t n) {
    const float *from = x + (at - start);
    const int e = shift_of(job, f, peak_of(from, n));
    lowest = e < lowest ? e : lowest;
    for (int64_t j = 0; j < n; j += L) store(to + (at - start) + j, splat(e));  // the next run is told after it
  };
  const int64_t run = f.run < last ? f.run : last;
  int64_t done = 0;
  if (run < 2 * L && last % run == 0)
    done = short_runs(x, len, run, [&](int64_t i, int64_t n, int32_t *peaks) __attribute__((always_inline)) {
      if (!shifts_from(job, f, peaks, n, lowest)) return runs_of(f, last, start + i, n, one);
      if (run <= 4)
        for (int64_t j = 0; j < n; j += run) store(to + i + j, v4{} + uint32_t(peaks[j]));
      else
        for (int64_t j = 0; j < n; j += run) store(to + i + j, splat(peaks[j])), store(to + i + j + L, splat(peaks[j]));
    });
  runs_of(f, last, start + done, len - done, one);
  return lowest;
}

static void begin_scaled(const Job &job, const Task &t, Scratch &s, int64_t start, int64_t len) {
  s.origin = start, s.over.clear();
  s.lowest = shifts_of(job.mode == VC ? &job : nullptr, job.format, t.last, static_cast<const float *>(t.x) + start,
                       start, len, s.shifts);
}

// One tile of scaled weights.
template <bool COUNT>
static int64_t finish_scaled(const Job &job, Task &t, Scratch &s, const float *x, const uint32_t *w, int64_t n,
                             int64_t limit, void *out, int64_t i) {
  const Format &f = job.format;
  const Lanes own{s.shifts.data() + (i - s.origin), nullptr, nullptr, &s.over};
  if (job.mode != VC)
    return finish_lanes<STOCHASTIC, VALUES, COUNT, true>(job, t, f, x, w, nullptr, n, out, i, nullptr, own);
  // The smallest gap decides whether any element can be in the large-variance regime.
  const bool reach = s.lowest + f.low + f.offset <= job.high_gap;
  const float *z = reinterpret_cast<const float *>(reach ? s.normal.at(t, i, limit) : w);
  return finish_lanes<VC, VALUES, COUNT, true>(job, t, f, x, w, z, n, out, i, nullptr, own);
}

// A run of draws of which some are beyond its scale takes the next one: what is next to zero is rounded again.
static void raise_run(const Format &f, const Key &key, float *out, int64_t at, int64_t n, int shift) {
  double largest = 0;
  for (int64_t j = 0; j < n; j++)
    if (std::fabs(out[j]) <= FLT_MAX && std::fabs(double(out[j])) > largest) largest = std::fabs(double(out[j]));
  const int fresh = held_scale(scale_of(largest, f, true), f), raised = fresh > shift ? fresh : shift;
  const float top = float(double(f.value_max) * std::ldexp(1.0, raised));
  for (int64_t j = 0; j < n; j++) {
    const double v = out[j];
    if (v != v) continue;
    double moved = v;
    if (raised > shift && std::fabs(v) <= FLT_MAX) {
      int own = floor_log2(std::fabs(v));
      own = own > raised + f.low ? own : raised + f.low;
      const double u = (double(philox_word(key, key.carry, key.offset + uint64_t(at + j))) + 0.5) * 0x1p-32;
      moved = std::ldexp(std::floor(std::ldexp(v, -own - f.offset) + u), own + f.offset);
    }
    out[j] = float(moved < -top ? -top : moved > top ? top : moved) + 0.0f;
  }
}

// A run whose largest magnitude would saturate when it is met again: that goes to the largest value of its scale, or to
// the next power of two.
static void leave_hole(const Format &f, const Key &key, float *out, int64_t at, int64_t n, uint32_t bits) {
  const int e = shift_of(nullptr, f, 2 * bits);
  const float top = float(double(f.value_max) * std::ldexp(1.0, e));
  if (!(float_of(bits) > top)) return;
  for (int64_t j = 0; j < n; j++) {
    if (!(std::fabs(out[j]) > top)) continue;
    const bool up = philox_word(key, key.hole, key.offset + uint64_t(at + j)) < 1u << 31;
    out[j] = std::copysign(up ? float(std::ldexp(1.0, e + f.high + 1)) : top, out[j]);
  }
}

static void leave_holes(const Format &f, const Task &t, float *out, int64_t start, int64_t len) {
  const int32_t mantissa = int32_t(bits_of(f.value_max) & 0x7fffffu);
  const int64_t run = f.run < t.last ? f.run : t.last;
  auto one = [&](int64_t at, int64_t n) {
    float *from = out + (at - start);
    const uint32_t bits = peak_of(from, n) >> 1;
    if (int32_t(bits & 0x7fffffu) > mantissa) leave_hole(f, t.key, from, at, n, bits);
  };
  int64_t done = 0;
  if (run < 2 * L && t.last % run == 0)
    done = short_runs(out, len, run, [&](int64_t i, int64_t n, int32_t *peaks) __attribute__((always_inline)) {
      for (int64_t j = 0; j < n; j += run)
        if ((peaks[j] & 0x7fffff) > mantissa) one(start + i + j, run);
    });
  runs_of(f, t.last, start + done, len - done, one);
}

// What draws of Q^vc leave to do, for a stretch of whole runs that begins at element `start`: `out`, whose scales were
// `shifts`; `over`: elements from which on there are draws beyond them, in order.
static void settle(const Format &f, const Task &t, float *out, int64_t start, int64_t len, const int32_t *shifts,
                   const std::vector<int64_t> &over) {
  if (f.hole) leave_holes(f, t, out, start, len);
  const int64_t size = f.run < t.last ? f.run : t.last;
  int64_t done = start;
  for (const int64_t found : over) {
    int64_t i = found > done ? found : done;
    i -= i % t.last % size;  // the run that it is in
    for (const int64_t end = found + L < start + len ? found + L : start + len; i < end;) {
      const int64_t left = t.last - i % t.last, n = size < left ? size : left;
      raise_run(f, t.key, out + (i - start), i, n, shifts[i - start]);
      i += n;
    }
    done = i > done ? i : done;
  }
}
