// Steps with a second tensor beside the weight, once per instruction set: SGHMC's velocity, the preconditioner's second
// moment. Included by cpu.cpp within its vector code, whose roundings these are; samplers/underdamped.py and
// samplers/preconditioned.py are the definition, and names are theirs.
//
// A *run* is a stretch of whole blocks of all formats, small enough for the second-level cache (the whole tensor where
// the velocity gets a scale). What is one variance for all is rounded by `rows`; Q^vc with a variance an element by
// `round_each`.

INLINE void as_task(Task &q, const MotionTensor &t, const float *x, float *out, int64_t inner, const Key &key) {
  q.x = x, q.out = out, q.numel = t.numel, q.inner = inner, q.channels = t.channels, q.pixels = t.pixels, q.last = t.last,
  q.key = key;
}
// Elements of a block; `len` where nothing is shared.
INLINE int64_t block_of(const Format &f, int64_t inner, int64_t len) { return f.kind == FIXED ? len : inner ? inner : 1; }

// x += root(variance) z, one variance an element (`each`) or `one` for all. `added`: what was added, if wanted.
static void add_noise(float *x, float *added, const double *each, double one, const Task &q, const Key &key, int64_t start,
                      int64_t len) {
  Draws normal;
  normal.init(q, key, true);
  const double root = std::sqrt(one);
  tiles(q, start, start + len, start + len, [&](int64_t i, int64_t n) {
    const float *z = reinterpret_cast<const float *>(normal.at(q, i, start + len));
    float *to = x + (i - start);
    for (int64_t j = 0; j < n; j++) {
      const float here = float((each ? std::sqrt(each[i - start + j]) : root) * double(z[j]));
      to[j] += here;
      if (added) added[i - start + j] = here;
    }
  });
}

// Exponent of the gap of a float whose noise needs room; see gap_exponents of floats.
INLINE int gap_with_noise(const Format &f, int shift, double size, double sigma) {
  const int low = f.low + shift, high = f.high + shift;
  const double reach = size + NOISE_REACH * sigma;
  int own = log2_of(size), wanted = log2_of(reach), top = wanted + f.offset;
  own = own < low ? low : own > high ? high : own;
  wanted += reach > double(f.code_max) * power_of(top < -1022 ? -1022 : top);
  const int free = log2_of(2.0 * sigma) - f.offset, raised = wanted < free ? wanted : free;
  const int e = own > raised ? own : raised;
  return (e > high ? high : e) + f.offset;
}
INLINE double finite_size(float x) { return std::fabs(x) <= FLT_MAX ? std::fabs(double(x)) : 0.0; }

// Shifts of runs whose noise differs between elements, at every element; zeros for floats that share nothing.
static void shifts_for_each(const Format &f, int64_t last, const float *mean, const double *variance, int64_t start,
                            int64_t len, int32_t *shifts) {
  if (f.kind == FLOAT) {
    for (int64_t i = 0; i < len; i++) shifts[i] = 0;
    return;
  }
  runs_of(f, last, start, len, [&](int64_t at, int64_t n) {
    const float *x = mean + (at - start);
    const double *v = variance + (at - start);
    double reach = 0, smallest = INFINITY;
    for (int64_t j = 0; j < n; j++) {
      const double sigma = std::sqrt(v[j]), here = finite_size(x[j]) + NOISE_REACH * sigma;
      reach = here > reach ? here : reach, smallest = sigma < smallest ? sigma : smallest;
    }
    const uint32_t peak = slow_peak(x, n);
    int e = shift_of(nullptr, f, peak);
    if (peak != 1) {
      const int free = log2_of(2.0 * smallest) - f.low - f.offset, fit = scale_of(reach, f, true);
      const int wanted = fit < free ? fit : free;
      e = held_scale(e > wanted ? e : wanted, f);
    }
    for (int64_t j = 0; j < n; j++) shifts[at - start + j] = e;
  });
}

// round_each where gaps differ between elements.
static int64_t round_lanes(const Format &f, const Task &q, Room &room, const float *mean, const double *variance,
                           int64_t start, int64_t len, float *out) {
  Draws uniforms, normals;
  uniforms.init(q, q.key, false), normals.init(q, q.key, true);
  int32_t *shifts = room.shifts.data(), *gaps = room.gaps.data();
  float *target = room.target.data();
  shifts_for_each(f, q.last, mean, variance, start, len, shifts);
  for (int64_t i = 0; i < len; i++) {
    gaps[i] = gap_with_noise(f, shifts[i], finite_size(mean[i]), std::sqrt(variance[i]));
    const double inverse = power_of(-gaps[i]);
    target[i] = float(variance[i] * inverse * inverse);
  }
  room.over.clear();
  const Job none{};
  int64_t count = 0;
  const int64_t end = start + len;
  tiles(q, start, end, end, [&](int64_t i, int64_t n) {
    const int64_t at = i - start;
    const float *z = reinterpret_cast<const float *>(normals.at(q, i, end));
    const Lanes own{shifts + at, gaps + at, target + at, &room.over};
    count += finish_lanes<VC, VALUES, true, true, true>(none, q, f, mean + at, uniforms.at(q, i, end), z, n, out + at, i,
                                                        nullptr, own);
  });
  if (f.kind == SCALED) settle(f, q, out, start, len, shifts, room.over);
  return count;
}

// Exponent of a block of means whose noise differs between elements; see exponents_with_noise of block formats.
static int exponent_for_each(const Format &f, const float *mean, const double *variance, int64_t n, uint32_t peak) {
  double reach = 0, smallest = INFINITY;
  for (int64_t i = 0; i < n; i++) {
    const double sigma = std::sqrt(variance[i]), size = std::fabs(double(mean[i]));
    const double here = (size < INFINITY ? size : 0.0) + NOISE_REACH * sigma;
    reach = here > reach ? here : reach, smallest = sigma < smallest ? sigma : smallest;
  }
  Job job{};
  job.format = f, job.free_exponent = floor_log2(2.0 * smallest) - f.offset;
  return with_headroom(exponent_of_peak(peak, f), reach, job);
}

// Unclamped codes of Q^vc with a variance an element, for a stretch with one gap.
static void codes_for_each(const Scale &s, Room &room, const float *mean, const double *variance, const uint32_t *words,
                           const float *z, int64_t n, float *codes) {
  const double inverse = double(s.up1) * double(s.up2);
  float *target = room.target.data(), *spread = room.spread.data();
  for (int64_t i = 0; i < n; i++) {
    const double v = variance[i] * inverse * inverse;
    target[i] = float(v), spread[i] = v > 0.25 ? float(std::sqrt(v - 0.25)) : -1.0f;
  }
  for (int64_t i = 0; i < n; i += L) {
    const int m = n - i < L ? int(n - i) : L;
    const vf scaled = max_of(min_of(load_part(mean + i, m) * s.up1 * s.up2, splat(0x1p24f)), splat(-0x1p24f));
    const vf u = uniform(load<vu>(words + i)), far = load_part(spread + i, m);
    const vf low = vc_low(scaled, load_part(target + i, m), u);
    store_part(codes + i, far >= 0.0f ? vc_high<false>(scaled, far, load<vf>(z + i), u) : low, m);
  }
}

// Values of codes that stay on their grid; no infinity is moved by noise.
static void values_of(const Format &f, float gap, const float *mean, const float *codes, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i++) {
    const float v = mean[i], held = codes[i] < f.code_min ? f.code_min : codes[i] > f.code_max ? f.code_max : codes[i];
    out[i] = v != v ? v : (std::isinf(v) ? (v < 0 ? f.code_min : f.code_max) : held) * gap + 0.0f;
  }
}

// Q^vc of `mean` with a variance an element, block by block; `out` is that of element `start`. Returns how many means are
// outside of the range of their grid.
static int64_t round_each(const Format &f, const Task &q, Room &room, const float *mean, const double *variance,
                          int64_t start, int64_t len, float *out) {
  if (f.kind >= FLOAT) return round_lanes(f, q, room, mean, variance, start, len, out);
  Draws uniforms, normals, coins;
  Key carry = q.key;
  carry.seed = q.key.carry;
  uniforms.init(q, q.key, false), normals.init(q, q.key, true), coins.init(q, carry, false);
  const int64_t end = start + len, block = block_of(f, q.inner, len);
  float *codes = room.codes.data();
  int64_t count = 0;
  for (int64_t b = 0; b < len; b += block) {
    const uint32_t peak = f.kind == BLOCK ? peak_of(mean + b, block) : 0;
    const int own = f.kind == BLOCK ? exponent_of_peak(peak, f) : 0;
    const int e = f.kind == BLOCK ? exponent_for_each(f, mean + b, variance + b, block, peak) : 0;
    Scale limits = scale_at(f, own + f.offset), s = scale_at(f, e + f.offset);
    if (f.carry && own < f.high) limits.below = -FLT_MAX, limits.above = FLT_MAX;
    tiles(q, start + b, start + b + block, end, [&](int64_t i, int64_t n) {
      const float *z = reinterpret_cast<const float *>(normals.at(q, i, end));
      const int64_t at = i - start;
      codes_for_each(s, room, mean + at, variance + at, uniforms.at(q, i, end), z, n, codes + at);
    });
    const int roof = f.carry ? f.high - e : 0;
    for (int64_t i = b; i < b + block; i++) {
      count += mean[i] < limits.below || mean[i] > limits.above;
      if (roof <= 0 || !(std::fabs(codes[i]) > f.code_max) || std::isinf(mean[i])) continue;
      int64_t k = int64_t(codes[i]);
      const int here = carry_code(k, q, q.key, start + i, f, roof);
      s.level = here > s.level ? here : s.level;
    }
    if (!s.level) {
      values_of(f, s.gap, mean + b, codes + b, block, out + b);
      continue;
    }
    tiles(q, start + b, start + b + block, end, [&](int64_t i, int64_t n) {
      const int64_t at = i - start;
      carry_tile<VALUES>(f, s, mean + at, codes + at, coins.at(q, i, end), n, out + at, 0);
    });
  }
  return count;
}

// What the velocity answers to the error of one position, by the variance that Q^vc gave it at this gap; codes end at
// `low` and `high`. The mean becomes beta (fresh - mean), the variance what is left of the velocity's.
INLINE void answer(const Motion &m, float &mean, double &variance, float fresh, int gap_exponent, double low, double high) {
  const double gap = power_of(gap_exponent), inverse = power_of(-gap_exponent);
  const double target = m.var_x * inverse * inverse;
  const double scaled = double(mean) * inverse, part = scaled - std::floor(scaled);
  double rounding = part * (1.0 - part);
  rounding = rounding >= 0.0 ? rounding : 0.0;  // of an infinity
  const double achieved = (target > 0.25 || target > rounding ? target : rounding) * (gap * gap);
  const double held = scaled < low ? low : scaled > high ? high : scaled, slope = m.cov / achieved;
  const double left = m.var_v - m.cov * slope;
  mean = float(slope * double(fresh - float(held * gap)));
  variance = left > 0.0 ? left : 0.0;
}

// For a run: room.mean and room.variance. `fresh`: the positions that were drawn.
static void given_position(const Motion &m, const Job &job, const Task &q, const float *fresh, int64_t start, int64_t len,
                           Room &room) {
  const Format &f = job.format;
  float *mean = room.mean.data();
  double *variance = room.variance.data();
  if (f.kind >= FLOAT) {
    int32_t *shifts = room.shifts.data();
    for (int64_t i = 0; i < len; i++) variance[i] = m.var_x;
    shifts_for_each(f, q.last, mean, variance, start, len, shifts);
    for (int64_t i = 0; i < len; i++) {
      const int gap = gap_with_noise(f, shifts[i], finite_size(mean[i]), job.sigma);
      const bool open = f.fits && shifts[i] < f.scale_high;
      const double top = open ? DBL_MAX : double(f.value_max) * power_of(shifts[i] - gap);
      answer(m, mean[i], variance[i], fresh[i], gap, -top, top);
    }
    return;
  }
  const int64_t block = block_of(f, q.inner, len);
  for (int64_t b = 0; b < len; b += block) {
    const Scale s = scale_for(job, f, f.kind == BLOCK ? peak_of(mean + b, block) : 0);
    const bool open = f.carry && s.exponent < f.high;
    const double low = open ? -DBL_MAX : double(f.code_min), high = open ? DBL_MAX : double(f.code_max);
    for (int64_t i = b; i < b + block; i++)
      answer(m, mean[i], variance[i], fresh[i], s.exponent + f.offset, low, high);
  }
}

// Smallest power of two at which neither mean nor noise leaves the range of the velocity's grid.
static double velocity_scale(const Motion &m, const float *mean, const double *each, double one, int64_t n) {
  double largest = 0, spread = each ? 0.0 : one;
  for (int64_t i = 0; i < n; i++) {
    const double size = std::fabs(double(mean[i]));
    largest = size > largest ? size : largest;
    if (each) spread = each[i] > spread ? each[i] : spread;
  }
  const double ratio = (largest + NOISE_REACH * std::sqrt(spread)) / m.velocity_max;
  int e = floor_log2(ratio);
  e += ratio > std::ldexp(1.0, e < -1022 ? -1022 : e);
  return std::ldexp(1.0, e < m.scale_low ? m.scale_low : e > m.scale_high ? m.scale_high : e);
}

// Rounds the velocity, in place: its mean `v`, its variance `each` (room.variance) or `one` for all.
static void round_velocity(const MotionJobs &jobs, MotionTensor &t, float *v, double *each, double one, int64_t start,
                           int64_t len, Room &room) {
  const Motion &m = *t.motion;
  Task q{};
  as_task(q, t, v - start, v - start, t.velocity_inner, t.velocity_key);
  if (!m.has_velocity_format || m.mode != VC) {
    if (each || one > 0) add_noise(v, nullptr, each, one, q, t.velocity_key, start, len);
    if (!m.has_velocity_format) return;
    each = nullptr, one = 0;
  }
  double scale = 1;
  if (m.rescale) {
    scale = t.scale = velocity_scale(m, v, each, one, len);
    for (int64_t i = 0; i < len; i++) v[i] = v[i] / float(scale);
  }
  if (m.mode != VC) {
    rows(jobs.velocity, q, start, len);
  } else {
    double *variance = room.variance.data();
    for (int64_t i = 0; i < len; i++) variance[i] = (each ? each[i] : one) / (scale * scale);
    memcpy(room.mean.data(), v, size_t(len) * 4);
    round_each(m.velocity, q, room, room.mean.data(), variance, start, len, v);
  }
  if (m.rescale)
    for (int64_t i = 0; i < len; i++) v[i] *= float(scale);
}

// The new value in room.mean, noise included: kept in the accumulator, if there is one, and rounded in the weight.
static int64_t put(const MotionJobs &jobs, MotionTensor &t, int64_t start, int64_t len, Room &room) {
  if (t.accumulator) memcpy(t.accumulator + start, room.mean.data(), size_t(len) * 4);
  if (t.motion->mode == NONE) {
    memcpy(t.param + start, room.mean.data(), size_t(len) * 4);
    return 0;
  }
  Task q{};
  as_task(q, t, room.mean.data() - start, t.param, t.weight_inner, t.weight_key);
  rows(jobs.position, q, start, len);
  return q.count.load();
}

static int64_t move_underdamped(const MotionJobs &jobs, MotionTensor &t, const float *grad, int64_t start, int64_t len,
                                Room &room) {
  const Motion &m = *t.motion;
  const float *x = (t.accumulator ? t.accumulator : t.param) + start;
  float *v = t.state + start, *force = room.force.data(), *mean = room.mean.data();
  for (int64_t i = 0; i < len; i++) {
    force[i] = grad[i] + m.weight_decay * x[i];
    mean[i] = (x[i] + m.carry * v[i]) - m.shift * force[i];
    v[i] = m.keep * v[i] - m.kick * force[i];
  }
  if (m.mode == VC) {
    const int64_t count = put(jobs, t, start, len, room);  // drawn on the grid
    if (m.cov != 0) {
      Task q{};
      as_task(q, t, mean - start, t.param, t.weight_inner, t.weight_key);
      given_position(m, jobs.position, q, t.param + start, start, len, room);
      for (int64_t i = 0; i < len; i++) v[i] += mean[i];
    }
    round_velocity(jobs, t, v, m.cov != 0 ? room.variance.data() : nullptr, m.var_v, start, len, room);
    return count;
  }
  double left = m.var_v;
  if (m.var_x > 0) {
    Task q{};
    as_task(q, t, mean - start, t.param, t.weight_inner, t.weight_key);
    add_noise(mean, force, nullptr, m.var_x, q, t.weight_key, start, len);
    if (m.cov != 0) {
      left = m.var_v - m.cov * m.cov / m.var_x;
      for (int64_t i = 0; i < len; i++) v[i] += m.slope * force[i];
    }
  }
  const int64_t count = put(jobs, t, start, len, room);
  round_velocity(jobs, t, v, nullptr, left > 0 ? left : 0, start, len, room);
  return count;
}

static int64_t move_preconditioned(const MotionJobs &jobs, MotionTensor &t, const float *grad, int64_t start, int64_t len,
                                   Room &room) {
  const Motion &m = *t.motion;
  const float *x = (t.accumulator ? t.accumulator : t.param) + start;
  float *second = t.state + start, *mean = room.mean.data();
  double *variance = room.variance.data();
  for (int64_t i = 0; i < len; i++) {
    const float force = grad[i] / m.shrinkage + m.weight_decay * x[i];
    second[i] = second[i] * m.beta + m.rest * force * force;
    const float scale = 1.0f / (std::sqrt(second[i] / m.weight) + m.eps);
    mean[i] = x[i] - m.lr * scale * force;
    variance[i] = m.noise * double(scale);
  }
  Task q{};
  as_task(q, t, mean - start, t.param, t.weight_inner, t.weight_key);
  if (m.mode == VC) return round_each(m.position, q, room, mean, variance, start, len, t.param + start);
  if (m.noise > 0) add_noise(mean, nullptr, variance, 0, q, t.weight_key, start, len);
  return put(jobs, t, start, len, room);
}

static int64_t motion(const MotionJobs &jobs, MotionTensor &t, int64_t start, int64_t len, Room &room) {
  const float *grad = t.grad + start;
  if (t.motion->has_gradient_format) {
    Task q{};
    as_task(q, t, t.grad, room.force.data() - start, t.gradient_inner, t.gradient_key);
    rows(jobs.gradient, q, start, len);
    grad = room.force.data();
  }
  return t.motion->family == UNDERDAMPED ? move_underdamped(jobs, t, grad, start, len, room)
                                         : move_preconditioned(jobs, t, grad, start, len, room);
}
