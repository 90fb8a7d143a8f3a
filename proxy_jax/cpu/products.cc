// Products of activations x[rows, in] and a weight w[outs, in] for CPUs with AVX-512. Every result
// is the dot product of a row of x and one of w, both read as they lie, and is summed in one order,
// whatever the other rows are: register after register into the lanes of one, then the lanes in a
// tree, then chunk after chunk of the inputs. What an adapter adds, low[rows, rank] times
// b[outs, rank], counts as more inputs of the last chunk. Gated layers and attention are made of such
// products, whose sums stay in cache.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kVector = 64;             // bytes of a register
constexpr int64_t kChunk = 48 * kVector;    // bytes of a row: those that a tile reads stay in L1
constexpr int kRows = 3, kOuts = 8;         // of a tile: 24 sums, each in a register
constexpr int64_t kBlock = 8 * kOuts;       // outputs a thread takes at a time: a chunk stays in L2
constexpr int64_t kStripe = 128;            // rows whose chunk stays in L2
constexpr int64_t kSlab = 256;              // rows whose sums of a block stay there
constexpr int64_t kTokens = 8 * kRows;      // of one head, whose scores stay in L1
constexpr int64_t kAhead = 1024;            // bytes of a row, fetched while others come
constexpr int64_t kWorthAThread = 1 << 17;  // multiplications

// What differs between types: the sums that a register holds, and one step of them.
struct Float {
  using Out = float;
  using Register = __m512;
  static __m512 Floats(__m512 sum) { return sum; }
  static __m512 Sum(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m256 Sum(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m512i Weights(__m512i w) { return w; }
};

struct Float32 : Float {
  using Number = float;
  static constexpr int64_t kBytes = 4;
  static __m512 Rounded(__m512 v) { return v; }
  static void Store(char* at, __mmask16 which, __m512 v) { _mm512_mask_storeu_ps(at, which, v); }
  static __m512 Step(__m512 sum, __m512i x, __m512i w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
  }
};

struct BFloat16 : Float {
  using Number = uint16_t;
  static constexpr int64_t kBytes = 2;
  static __m512 Rounded(__m512 v) { return _mm512_cvtpbh_ps(_mm512_cvtneps_pbh(v)); }
  static void Store(char* at, __mmask16 which, __m512 v) {
    _mm256_mask_storeu_epi16(at, which, (__m256i)_mm512_cvtneps_pbh(v));
  }
  static __m512 Step(__m512 sum, __m512i x, __m512i w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
  }
};

// The instruction multiplies unsigned with signed numbers: 128 is added to the weights, and
// 128 times the sum of the activations taken off the result.
struct Int8 {
  using Out = int32_t;
  using Register = __m512i;
  static constexpr int64_t kBytes = 1;
  static __m512 Floats(__m512i sum) { return _mm512_castsi512_ps(sum); }
  static __m512 Sum(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static __m256 Sum(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  static __m512i Weights(__m512i w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
  static __m512i Step(__m512i sum, __m512i x, __m512i w) {
    // The intrinsic makes GCC 12 copy the sums before and after.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};

// Sums over the lanes of each of 8 registers, shuffled as floats whatever they hold.
template <class T>
inline __m256 Lanes(const __m512 (&v)[8]) {
  __m512 two[4], four[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    two[i] = T::Sum(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                    _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    four[i] = T::Sum(_mm512_shuffle_ps(two[2 * i], two[2 * i + 1], 0x44),
                     _mm512_shuffle_ps(two[2 * i], two[2 * i + 1], 0xEE));
  }
  const __m512 half = T::Sum(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                             _mm512_shuffle_f32x4(four[0], four[1], 0xDD));
  const __m512 whole = T::Sum(half, _mm512_shuffle_f32x4(half, half, 0xB1));
  return _mm512_castps512_ps256(_mm512_shuffle_f32x4(whole, whole, 0x08));
}

// Rows of x and of w, `bytes` of each; how far apart they are.
struct Operands {
  const char *x, *w;
  int64_t x_stride, w_stride, bytes;
};

// A chunk of the inputs: whole registers, and in the last chunk what is left of them and an
// adapter's.
struct Inputs {
  Operands whole, ends[2];
};

// R rows from `row` on times O outputs from `out` on over one chunk; adds to y, or begins it. The
// loops over both are unrolled, or the sums would not be in registers. Fetches what P outputs from
// `ahead` on have in its place.
template <class T, int R, int O, int P>
void Tile(const Inputs& inputs, int64_t row, int64_t out, const char* ahead, typename T::Out* y,
          int64_t pitch, bool first) {
  typename T::Register sums[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) sums[r][o] = typename T::Register{};
  const auto add = [&](const Operands& from, int64_t i, auto load) {
    const char* const x = from.x + row * from.x_stride + i;
    const char* const w = from.w + out * from.w_stride + i;
    __m512i activations[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) activations[r] = load(x + r * from.x_stride);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      __m512i weights = T::Weights(load(w + o * from.w_stride));
      asm("" : "+v"(weights));  // or GCC would load them for each row
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][o] = T::Step(sums[r][o], activations[r], weights);
    }
  };
  const Operands whole = inputs.whole;
  for (int64_t i = 0; i < whole.bytes; i += kVector) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) _mm_prefetch(ahead + p * whole.w_stride + i, _MM_HINT_T1);
    add(whole, i, [](const char* p) { return _mm512_loadu_si512(p); });
  }
  for (const Operands& end : inputs.ends) {
    for (int64_t i = 0; i < end.bytes; i += kVector) {
      const auto which = _cvtu64_mask64(~uint64_t{0} >> (kVector - std::min(kVector, end.bytes - i)));
      add(end, i, [which](const char* p) { return _mm512_maskz_loadu_epi8(which, p); });
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    __m512 v[8];
#pragma GCC unroll 8
    for (int o = 0; o < 8; ++o) v[o] = o < O ? T::Floats(sums[r][o]) : _mm512_setzero_ps();
    __m256 made = Lanes<T>(v);
    float* const at = reinterpret_cast<float*>(y + (row + r) * pitch + out);
    constexpr __mmask8 kWhich = (1 << O) - 1;
    if (!first) made = T::Sum(made, _mm256_maskz_loadu_ps(kWhich, at));
    _mm256_mask_storeu_ps(at, kWhich, made);
  }
}

// The rows [from, to) times O outputs over one chunk. Of few rows the only tile waits for the
// memory, and fetches a little ahead. Of more the others, which find the weights in L1, fetch
// meanwhile those of the next outputs, each a share of them.
template <class T, int O>
void Column(const Inputs& inputs, int64_t from, int64_t to, int64_t out, const char* next,
            typename T::Out* y, int64_t pitch, bool first) {
  const auto run = [&](auto tile, int64_t row, const char* ahead) {
    tile(inputs, row, out, ahead, y, pitch, first);
  };
  const int64_t stride = inputs.whole.w_stride;
  const int64_t others = (to - from) / kRows - 1;
  const int64_t share = others < 3 ? 4 : others < O ? 2 : 1;
  int64_t row = from, fetched = next == nullptr ? O : 0;
  for (; row + kRows <= to; row += kRows) {
    if (others == 0) {
      run(Tile<T, kRows, O, O>, row, inputs.whole.w + out * stride + kAhead);
    } else if (row == from || fetched + share > O) {
      run(Tile<T, kRows, O, 0>, row, nullptr);
    } else {
      const auto tile = share == 4   ? Tile<T, kRows, O, 4>
                        : share == 2 ? Tile<T, kRows, O, 2>
                                     : Tile<T, kRows, O, 1>;
      run(tile, row, next + fetched * stride);
      fetched += share;
    }
  }
  if (to - row == 1) run(Tile<T, 1, O, 0>, row, nullptr);
  if (to - row == 2) run(Tile<T, 2, O, 0>, row, nullptr);
}

// All rows times `outs` outputs over one chunk; `next` is where the next one lies, or none.
template <class T>
void Chunk(const Inputs& inputs, int64_t rows, int64_t outs, const char* next, typename T::Out* y,
           int64_t pitch, bool first) {
  const Operands& whole = inputs.whole;
  for (int64_t row = 0; row < rows; row += kStripe) {
    const int64_t to = std::min(row + kStripe, rows);
    int64_t out = 0;
    for (; out + kOuts <= outs; out += kOuts) {
      const bool last = out + 2 * kOuts > outs;
      const char* const after = last ? next : whole.w + (out + kOuts) * whole.w_stride;
      Column<T, kOuts>(inputs, row, to, out, after, y, pitch, first);
    }
    for (; out < outs; ++out) Column<T, 1>(inputs, row, to, out, nullptr, y, pitch, first);
  }
}

// A weight w[outs, in] and what it is multiplied with, x[rows, in]; b[outs, rank] of an adapter and
// low[rows, rank].
struct Product {
  Operands inputs, adapter;

  // Those at two places of a call's arguments, or none.
  template <class T>
  static Operands Of(const ffi::RemainingArgs& given, size_t at_x, size_t at_w) {
    if (at_w >= given.size()) return {};
    const auto x = *given.get<ffi::AnyBuffer>(at_x), w = *given.get<ffi::AnyBuffer>(at_w);
    const int64_t stride = x.dimensions()[1] * T::kBytes;
    return {static_cast<const char*>(x.untyped_data()), static_cast<const char*>(w.untyped_data()),
            stride, stride, stride};
  }

  const char* Weights(int64_t out) const { return inputs.w + out * inputs.w_stride; }

  // The rows [row, row + rows) times the outputs [out, out + outs), to y, whose rows are `pitch`
  // apart; `next` is where the weights lie that the thread reads after these, or none.
  template <class T>
  void Sums(int64_t row, int64_t rows, int64_t out, int64_t outs, const char* next,
            typename T::Out* y, int64_t pitch) const {
    const auto here = [&](const Operands& all, int64_t from, int64_t to) -> Operands {
      return {all.x + row * all.x_stride + from, all.w + out * all.w_stride + from, all.x_stride,
              all.w_stride, to - from};
    };
    const int64_t whole = inputs.bytes / kVector * kVector;
    for (int64_t at = 0; at == 0 || at < whole; at += kChunk) {
      const int64_t to = std::min(at + kChunk, whole);
      Inputs chunk{here(inputs, at, to)};
      if (to == whole) {
        chunk.ends[0] = here(inputs, whole, inputs.bytes);
        chunk.ends[1] = here(adapter, 0, adapter.bytes);
      }
      const char* const after = to < whole ? Weights(out) + to : next;
      Chunk<T>(chunk, rows, outs, after, y, pitch, at == 0);
    }
  }
};

// 128 times the sum of each row.
std::vector<int32_t> Shifts(const int8_t* x, int64_t rows, int64_t in) {
  std::vector<int32_t> shifts(rows);
  for (int64_t r = 0; r < rows; ++r) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < in; i += kVector) {
      const auto which = _cvtu64_mask64(~uint64_t{0} >> (kVector - std::min(kVector, in - i)));
      const __m512i numbers = _mm512_maskz_loadu_epi8(which, x + r * in + i);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), numbers);
    }
    shifts[r] = 128 * _mm512_reduce_add_epi32(sum);
  }
  return shifts;
}

// Calls work(task, threads) for all tasks, on as many threads as `multiplications` are worth.
template <class Work>
ffi::Future Share(ffi::ThreadPool pool, int64_t tasks, int64_t multiplications, Work work) {
  const int64_t useful = std::min(tasks, multiplications / kWorthAThread);
  const int64_t threads = std::max<int64_t>(1, std::min(pool.num_threads(), useful));
  const auto next = std::make_shared<std::atomic<int64_t>>(0);
  const auto of_thread = [=] {
    for (int64_t task; (task = next->fetch_add(1)) < tasks;) work(task, threads);
  };
  ffi::CountDownPromise done(threads);
  ffi::Future future(done);
  for (int64_t t = 1; t < threads; ++t) {
    pool.Schedule([of_thread, done]() mutable {
      of_thread();
      done.CountDown();
    });
  }
  of_thread();
  done.CountDown();
  return future;
}

// Calls work(from, to, after) for all blocks of outputs; `after` is where the thread's next block is
// expected to begin, beyond `outs` if nowhere.
template <class Work>
ffi::Future ShareOutputs(ffi::ThreadPool pool, int64_t outs, int64_t multiplications, Work work) {
  const int64_t blocks = (outs + kBlock - 1) / kBlock;
  return Share(pool, blocks, multiplications, [=](int64_t block, int64_t threads) {
    work(block * kBlock, std::min(outs, (block + 1) * kBlock), (block + threads) * kBlock);
  });
}

// `given` are x and w, and the low and b of an adapter, if there is one.
template <class T, ffi::DataType kOut>
ffi::Future Multiply(ffi::ThreadPool pool, ffi::RemainingArgs given,
                     ffi::Result<ffi::Buffer<kOut, 2>> y) {
  const auto x = *given.get<ffi::AnyBuffer>(0), w = *given.get<ffi::AnyBuffer>(1);
  const int64_t rows = x.dimensions()[0], in = x.dimensions()[1], outs = w.dimensions()[0];
  const Product product{Product::Of<T>(given, 0, 1), Product::Of<T>(given, 2, 3)};
  std::vector<int32_t> shifts;
  if constexpr (std::is_same_v<T, Int8>) shifts = Shifts(x.typed_data<int8_t>(), rows, in);
  return ShareOutputs(
      pool, outs, rows * in * outs,
      [=, shifts = std::make_shared<const std::vector<int32_t>>(std::move(shifts)),
       y = static_cast<typename T::Out*>(y->untyped_data())](int64_t from, int64_t to,
                                                             int64_t after) {
        const char* const next = after + to - from <= outs ? product.Weights(after) : nullptr;
        product.Sums<T>(0, rows, from, to - from, next, y + from, outs);
        if constexpr (std::is_same_v<T, Int8>) {
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t o = from; o < to; ++o) y[r * outs + o] -= (*shifts)[r];
          }
        }
      });
}

// exp(t) = 2^n exp(t - n log(2)), the latter by Cephes' polynomial. What is not a number passes.
inline __m512 Exp(__m512 t) {
  const auto all = [](float v) { return _mm512_set1_ps(v); };
  t = _mm512_min_ps(all(104), _mm512_max_ps(all(-104), t));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(t, all(1.44269504f)), 0);
  const __m512 high = _mm512_fnmadd_ps(n, all(0.693359375f), t);
  const __m512 r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), high);
  __m512 p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f, 1.0f, 1.0f}) {
    p = _mm512_fmadd_ps(p, r, all(c));
  }
  return _mm512_scalef_ps(p, n);
}

// x / (1 + exp(-s)), where s is x for SiLU, and 2 sqrt(2 / pi) (x + 0.044715 x^3) for GELU by tanh.
inline __m512 Activated(__m512 x, bool gelu) {
  const auto all = [](float v) { return _mm512_set1_ps(v); };
  __m512 s = x;
  if (gelu) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, all(0.044715f)));
    s = _mm512_mul_ps(_mm512_add_ps(x, cube), all(1.5957691216f));
  }
  return _mm512_div_ps(x, _mm512_add_ps(all(1), Exp(_mm512_sub_ps(all(0), s))));
}

// The first n of 16 lanes.
inline __mmask16 First(int64_t n) { return 0xFFFF >> (16 - std::min<int64_t>(16, n)); }

// act(gate(x)) * up(x), each step rounded to the type of x. `given` are x and both weights, and the
// low and b of gate's adapter and of up's, if they have any.
template <class T, ffi::DataType kIn>
ffi::Future Gated(ffi::ThreadPool pool, ffi::RemainingArgs given,
                  ffi::Result<ffi::Buffer<kIn, 2>> y, bool gelu) {
  const auto x = *given.get<ffi::AnyBuffer>(0);
  const int64_t rows = x.dimensions()[0], in = x.dimensions()[1], outs = y->dimensions()[1];
  const Product gate{Product::Of<T>(given, 0, 1), Product::Of<T>(given, 3, 4)};
  const Product up{Product::Of<T>(given, 0, 2), Product::Of<T>(given, 5, 6)};
  return ShareOutputs(
      pool, outs, 2 * rows * in * outs,
      [=, y = static_cast<char*>(y->untyped_data())](int64_t from, int64_t to, int64_t after) {
        alignas(kVector) static thread_local float gates[kSlab * kBlock], ups[kSlab * kBlock];
        const int64_t count = to - from;
        const char* const next = after + count <= outs ? gate.Weights(after) : nullptr;
        for (int64_t row = 0; row < rows; row += kSlab) {
          const int64_t slab = std::min(kSlab, rows - row);
          gate.Sums<T>(row, slab, from, count, up.Weights(from), gates, kBlock);
          up.Sums<T>(row, slab, from, count, next, ups, kBlock);
          for (int64_t r = 0; r < slab; ++r) {
            for (int64_t o = 0; o < count; o += 16) {
              const __mmask16 which = First(count - o);
              const __m512 g = T::Rounded(_mm512_load_ps(gates + r * kBlock + o));
              const __m512 u = T::Rounded(_mm512_load_ps(ups + r * kBlock + o));
              const __m512 made = _mm512_mul_ps(T::Rounded(Activated(g, gelu)), u);
              T::Store(y + ((row + r) * outs + from + o) * T::kBytes, which, made);
            }
          }
        }
      });
}

// So many numbers, up to a whole register of them.
template <class T>
int64_t Padded(int64_t count) {
  const int64_t held = kVector / T::kBytes;
  return (count + held - 1) / held * held;
}

// v[rows, width] as [width, rows], its rows `pitch` apart, with zeros behind.
template <class T>
std::vector<typename T::Number> Turned(const char* v, int64_t rows, int64_t width, int64_t pitch) {
  const auto from = reinterpret_cast<const typename T::Number*>(v);
  std::vector<typename T::Number> turned(width * pitch);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i) turned[i * pitch + r] = from[r * width + i];
  }
  return turned;
}

// softmax(scale * scores) of one row: to `shares`, in T, 0 where masked and from `slots` up to the
// next whole register.
template <class T>
void Softmax(float* scores, const bool* mask, int64_t slots, float scale, char* shares) {
  const __m512 none = _mm512_set1_ps(-INFINITY), by = _mm512_set1_ps(scale);
  __m512 top = none;
  for (int64_t s = 0; s < slots; s += 16) {
    const __m128i seen = _mm_maskz_loadu_epi8(First(slots - s), mask + s);
    const __mmask16 which = _mm_test_epi8_mask(seen, seen);
    const __m512 v = _mm512_mask_mul_ps(none, which, _mm512_loadu_ps(scores + s), by);
    _mm512_storeu_ps(scores + s, v);
    top = _mm512_max_ps(top, v);
  }
  top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < slots; s += 16) {
    const __m512 v = _mm512_loadu_ps(scores + s);
    const __mmask16 which = _mm512_cmp_ps_mask(v, none, _CMP_NEQ_UQ);
    const __m512 share = _mm512_maskz_mov_ps(which, Exp(_mm512_sub_ps(v, top)));
    _mm512_storeu_ps(scores + s, share);
    sum = _mm512_add_ps(sum, share);
  }
  const __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
  const int64_t whole = Padded<T>(slots);
  for (int64_t s = 0; s < whole; s += 16) {
    const __m512 share = s < slots ? _mm512_loadu_ps(scores + s) : _mm512_setzero_ps();
    T::Store(shares + s * T::kBytes, 0xFFFF, _mm512_div_ps(share, total));
  }
}

// Grouped-query attention: q[B, T, N, H], keys and values[B, K, S, H], mask[B, T, S], true where
// visible. Slots past the last that any of some tokens sees are not read for them.
template <class T, ffi::DataType kIn>
ffi::Future Attend(ffi::ThreadPool pool, ffi::Buffer<kIn, 4> q, ffi::Buffer<kIn, 4> keys,
                   ffi::Buffer<kIn, 4> values, ffi::Buffer<ffi::PRED, 3> mask,
                   ffi::Result<ffi::Buffer<kIn, 4>> out, float scale) {
  const auto sizes = q.dimensions(), cached = keys.dimensions();
  const int64_t batch = sizes[0], tokens = sizes[1], heads = sizes[2], width = sizes[3];
  const int64_t kv_heads = cached[1], slots = cached[2], group = heads / kv_heads;
  const auto work = [=, q = static_cast<const char*>(q.untyped_data()),
                     keys = static_cast<const char*>(keys.untyped_data()),
                     values = static_cast<const char*>(values.untyped_data()),
                     mask = mask.typed_data(),
                     out = static_cast<char*>(out->untyped_data())](int64_t task, int64_t) {
    const int64_t b = task / kv_heads, head = task % kv_heads * group;
    // One register more, or the rows would share their places in L1 where slots are a power of 2.
    const int64_t row = width * T::kBytes, pitch = Padded<T>(slots) + kVector / T::kBytes;
    const char* const keys_here = keys + task * slots * row;
    const auto turned = Turned<T>(values + task * slots * row, slots, width, pitch);
    std::vector<float> scores(kTokens * pitch), sums(kTokens * width + 16);
    std::vector<char> shares(kTokens * pitch * T::kBytes);
    for (int64_t t = 0; t < tokens; t += kTokens) {
      const int64_t count = std::min(kTokens, tokens - t);
      const bool* const masks = mask + (b * tokens + t) * slots;
      int64_t seen = slots;
      const auto sees = [&](int64_t i) { return masks[i * slots + seen - 1]; };
      const auto anyone = [&] {
        for (int64_t i = 0; i < count; ++i) {
          if (sees(i)) return true;
        }
        return false;
      };
      while (seen > 1 && !anyone()) --seen;
      seen = std::min(slots, (seen + kOuts - 1) / kOuts * kOuts);
      for (int64_t n = head; n < head + group; ++n) {
        const int64_t at = (((b * tokens + t) * heads) + n) * row;
        const Product score{{q + at, keys_here, heads * row, row, row}};
        score.Sums<T>(0, count, 0, seen, nullptr, scores.data(), pitch);
        for (int64_t i = 0; i < count; ++i) {
          Softmax<T>(scores.data() + i * pitch, masks + i * slots, seen, scale,
                     shares.data() + i * pitch * T::kBytes);
        }
        const int64_t bytes = pitch * T::kBytes;
        const char* const w = reinterpret_cast<const char*>(turned.data());
        const Product mix{{shares.data(), w, bytes, bytes, Padded<T>(seen) * T::kBytes}};
        mix.Sums<T>(0, count, 0, width, nullptr, sums.data(), width);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t h = 0; h < width; h += 16) {
            T::Store(out + at + i * heads * row + h * T::kBytes, First(width - h),
                     _mm512_loadu_ps(sums.data() + i * width + h));
          }
        }
      }
    }
  };
  return Share(pool, batch * kv_heads, 2 * batch * heads * tokens * slots * width, work);
}

template <ffi::DataType kOut>
auto Binding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().template Ret<ffi::Buffer<kOut, 2>>();
}

template <ffi::DataType kIn>
auto AttendBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .template Arg<ffi::Buffer<kIn, 4>>()
      .template Arg<ffi::Buffer<kIn, 4>>()
      .template Arg<ffi::Buffer<kIn, 4>>()
      .template Arg<ffi::Buffer<ffi::PRED, 3>>()
      .template Ret<ffi::Buffer<kIn, 4>>()
      .template Attr<float>("scale");
}

constexpr auto kProductFloat32 = Multiply<Float32, ffi::F32>;
constexpr auto kProductBFloat16 = Multiply<BFloat16, ffi::F32>;
constexpr auto kProductInt8 = Multiply<Int8, ffi::S32>;
constexpr auto kGatedFloat32 = Gated<Float32, ffi::F32>;
constexpr auto kGatedBFloat16 = Gated<BFloat16, ffi::BF16>;
constexpr auto kAttendFloat32 = Attend<Float32, ffi::F32>;
constexpr auto kAttendBFloat16 = Attend<BFloat16, ffi::BF16>;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(product_float32, kProductFloat32, Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_bfloat16, kProductBFloat16, Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(product_int8, kProductInt8, Binding<ffi::S32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gated_float32, kGatedFloat32, Binding<ffi::F32>().Attr<bool>("gelu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(gated_bfloat16, kGatedBFloat16, Binding<ffi::BF16>().Attr<bool>("gelu"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(attend_float32, kAttendFloat32, AttendBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attend_bfloat16, kAttendBFloat16, AttendBinding<ffi::BF16>());
