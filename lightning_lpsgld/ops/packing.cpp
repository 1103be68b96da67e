// Codes of fewer than eight bits side by side: formats/packing.py is the definition, lowest bit first, code i from bit
// i * bits on.
//
// Eight codes, a byte each, are one word of 64 bits, and eight packed ones are `bits` bytes: three moves close the gaps
// between them (of two codes, of four, of eight), and three open them again.

#include <cstdint>
#include <cstring>

#if defined(_WIN32)
#define EXPORT extern "C" __attribute__((dllexport))
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Words are made of bytes as little-endian machines do."
#endif

namespace lpsgld {

void in_parallel(int threads, int64_t items, void (*work)(void *, int64_t), void *);  // cpu.cpp

namespace {

constexpr int64_t PIECE = 1 << 16;  // codes of a work item; whole words, so that items begin at bytes

// Masks of the three moves; `sign` is the top bit of each code, 0 where codes have no sign.
struct Moves {
  int bits;
  uint64_t code, low2, high2, low4, high4, low8, high8, sign;
  Moves(int b, bool has_sign) : bits(b) {
    const uint64_t bytes = ~uint64_t(0) / 0xff, one = (uint64_t(1) << b) - 1;
    const uint64_t two = (uint64_t(1) << 2 * b) - 1, four = (uint64_t(1) << 4 * b) - 1;
    code = bytes * one, sign = has_sign ? bytes << (b - 1) : 0;
    low2 = ~uint64_t(0) / 0xffff * one, high2 = low2 << b;
    low4 = ~uint64_t(0) / 0xffffffff * two, high4 = low4 << 2 * b;
    low8 = four, high8 = four << 4 * b;
  }
  uint64_t close(uint64_t w) const {
    w &= code;
    w = (w & low2) | (w >> (8 - bits) & high2);
    w = (w & low4) | (w >> (16 - 2 * bits) & high4);
    return (w & low8) | (w >> (32 - 4 * bits) & high8);
  }
  uint64_t open(uint64_t w) const {
    w = (w & low8) | (w & high8) << (32 - 4 * bits);
    w = (w & low4) | (w & high4) << (16 - 2 * bits);
    w = (w & low2) | (w & high2) << (8 - bits);
    const uint64_t tops = ~uint64_t(0) / 0xff << 7;  // no byte borrows from the next
    return (((w ^ sign) | tops) - sign) ^ tops;
  }
};

template <int BITS>
void pack_words(const Moves &m, const int8_t *codes, uint8_t *out, int64_t words) {
  for (int64_t i = 0; i < words; i++) {
    uint64_t w;
    memcpy(&w, codes + 8 * i, 8);
    w = m.close(w);
    memcpy(out + BITS * i, &w, BITS);
  }
}
template <int BITS>
void unpack_words(const Moves &m, const uint8_t *in, int8_t *codes, int64_t words) {
  const int64_t whole = words - 7 / BITS - 1;  // whose eight bytes are there: one load, and what is too much is masked
  for (int64_t i = 0; i < words; i++) {
    uint64_t w = 0;
    if (i < whole)
      memcpy(&w, in + BITS * i, 8);
    else
      memcpy(&w, in + BITS * i, BITS);
    w = m.open(w);
    memcpy(codes + 8 * i, &w, 8);
  }
}

using Pack = void (*)(const Moves &, const int8_t *, uint8_t *, int64_t);
using Unpack = void (*)(const Moves &, const uint8_t *, int8_t *, int64_t);
const Pack packs[] = {nullptr,       pack_words<1>, pack_words<2>, pack_words<3>,
                      pack_words<4>, pack_words<5>, pack_words<6>, pack_words<7>};
const Unpack unpacks[] = {nullptr,         unpack_words<1>, unpack_words<2>, unpack_words<3>,
                          unpack_words<4>, unpack_words<5>, unpack_words<6>, unpack_words<7>};

struct Packing {
  Moves moves;
  const void *from;
  void *to;
  int64_t count;
};

void pack_item(void *context, int64_t item) {
  const Packing &p = *static_cast<const Packing *>(context);
  const int64_t start = item * PIECE, n = start + PIECE < p.count ? PIECE : p.count - start, rest = n % 8;
  const int8_t *codes = static_cast<const int8_t *>(p.from) + start;
  uint8_t *out = static_cast<uint8_t *>(p.to) + start / 8 * p.moves.bits;
  packs[p.moves.bits](p.moves, codes, out, n / 8);
  if (rest == 0) return;
  uint64_t w = 0;
  memcpy(&w, codes + n - rest, size_t(rest));
  w = p.moves.close(w);
  memcpy(out + n / 8 * p.moves.bits, &w, size_t((rest * p.moves.bits + 7) / 8));
}

}  // namespace

// Codes [start, start + n) of packed ones, where `start` is a multiple of eight.
void unpack_codes(const void *packed, int bits, bool has_sign, int64_t start, int64_t n, int8_t *codes) {
  const Moves moves(bits, has_sign);
  const uint8_t *in = static_cast<const uint8_t *>(packed) + start / 8 * bits;
  const int64_t rest = n % 8;
  unpacks[bits](moves, in, codes, n / 8);
  if (rest == 0) return;
  uint64_t w = 0;
  memcpy(&w, in + n / 8 * bits, size_t((rest * bits + 7) / 8));
  w = moves.open(w);
  memcpy(codes + n - rest, &w, size_t(rest));
}

static void unpack_item(void *context, int64_t item) {
  const Packing &p = *static_cast<const Packing *>(context);
  const int64_t start = item * PIECE, n = start + PIECE < p.count ? PIECE : p.count - start;
  unpack_codes(p.from, p.moves.bits, p.moves.sign != 0, start, n, static_cast<int8_t *>(p.to) + start);
}

}  // namespace lpsgld

using namespace lpsgld;

EXPORT void lpsgld_pack(const int8_t *codes, int64_t count, int bits, uint8_t *packed, int threads) {
  Packing p{Moves(bits, false), codes, packed, count};
  in_parallel(count <= PIECE ? 1 : threads, (count + PIECE - 1) / PIECE, pack_item, &p);
}
EXPORT void lpsgld_unpack(const uint8_t *packed, int64_t count, int bits, int has_sign, int8_t *codes, int threads) {
  Packing p{Moves(bits, has_sign != 0), packed, codes, count};
  in_parallel(count <= PIECE ? 1 : threads, (count + PIECE - 1) / PIECE, unpack_item, &p);
}
