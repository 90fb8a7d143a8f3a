// Products of activations x[rows, in] and a weight w[outs, in] for CPUs with AVX-512. Every result
// is the dot product of a row of x and one of w, both read as they lie, and is summed in one order,
// whatever the other rows are: register after register into the lanes of one, then the lanes in a
// tree, then chunk after chunk of the inputs.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
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
  static constexpr int64_t kBytes = 4;
  static __m512 Step(__m512 sum, __m512i x, __m512i w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
  }
};

struct BFloat16 : Float {
  static constexpr int64_t kBytes = 2;
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

// R rows times O outputs over one chunk of the inputs; adds to y, or begins it. The loops over both
// are unrolled, or the sums would not be in registers. Fetches what P outputs from `ahead` on have
// in its place.
template <class T, int R, int O, int P>
void Tile(const char* x, const char* w, const char* ahead, typename T::Out* y, int64_t stride,
          int64_t bytes, int64_t outs, bool first) {
  typename T::Register sums[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) sums[r][o] = typename T::Register{};
  for (int64_t i = 0; i < bytes; i += kVector) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) _mm_prefetch(ahead + p * stride + i, _MM_HINT_T1);
    __m512i activations[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) activations[r] = _mm512_loadu_si512(x + r * stride + i);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      __m512i weights = T::Weights(_mm512_loadu_si512(w + o * stride + i));
      asm("" : "+v"(weights));  // or GCC would load them for each row
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][o] = T::Step(sums[r][o], activations[r], weights);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    __m512 v[8];
#pragma GCC unroll 8
    for (int o = 0; o < 8; ++o) v[o] = o < O ? T::Floats(sums[r][o]) : _mm512_setzero_ps();
    __m256 made = Lanes<T>(v);
    float* const at = reinterpret_cast<float*>(y + r * outs);
    constexpr __mmask8 kWhich = (1 << O) - 1;
    if (!first) made = T::Sum(made, _mm256_maskz_loadu_ps(kWhich, at));
    _mm256_mask_storeu_ps(at, kWhich, made);
  }
}

// All rows times O outputs over one chunk. Of few rows the only tile waits for the memory, and
// fetches a little ahead. Of more the others, which find the weights in L1, fetch meanwhile those of
// the next outputs, each a share of them.
template <class T, int O>
void Column(const char* x, const char* w, const char* next, typename T::Out* y, int64_t rows,
            int64_t stride, int64_t bytes, int64_t outs, bool first) {
  const auto run = [&](auto tile, int64_t r, const char* ahead) {
    tile(x + r * stride, w, ahead, y + r * outs, stride, bytes, outs, first);
  };
  const int64_t others = rows / kRows - 1;
  const int64_t share = others < 3 ? 4 : others < O ? 2 : 1;
  int64_t r = 0, from = next == nullptr ? O : 0;
  for (; r + kRows <= rows; r += kRows) {
    if (others == 0) {
      run(Tile<T, kRows, O, O>, r, w + kAhead);
    } else if (r == 0 || from + share > O) {
      run(Tile<T, kRows, O, 0>, r, w);
    } else {
      const auto tile = share == 4   ? Tile<T, kRows, O, 4>
                        : share == 2 ? Tile<T, kRows, O, 2>
                                     : Tile<T, kRows, O, 1>;
      run(tile, r, next + from * stride);
      from += share;
    }
  }
  if (rows - r == 1) run(Tile<T, 1, O, 0>, r, w);
  if (rows - r == 2) run(Tile<T, 2, O, 0>, r, w);
}

// All rows times all outputs of a block over one chunk; `next` is where the next one lies, or none.
template <class T>
void Chunk(const char* x, const char* w, const char* next, typename T::Out* y, int64_t rows,
           int64_t stride, int64_t bytes, int64_t outs, int64_t count, bool first) {
  for (int64_t r = 0; r < rows; r += kStripe) {
    const int64_t stripe = std::min(kStripe, rows - r);
    const char* const x_stripe = x + r * stride;
    const auto y_stripe = y + r * outs;
    int64_t o = 0;
    for (; o + kOuts <= count; o += kOuts) {
      const char* const after = o + 2 * kOuts <= count ? w + (o + kOuts) * stride : next;
      Column<T, kOuts>(x_stripe, w + o * stride, after, y_stripe + o, stripe, stride, bytes, outs,
                       first);
    }
    for (; o < count; ++o) {
      Column<T, 1>(x_stripe, w + o * stride, nullptr, y_stripe + o, stripe, stride, bytes, outs,
                   first);
    }
  }
}

// What rows have past their last whole register, with zeros behind it.
std::vector<char> Tails(const char* p, int64_t rows, int64_t stride, int64_t whole) {
  std::vector<char> tails(rows * kVector);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy(p + r * stride + whole, p + (r + 1) * stride, tails.data() + r * kVector);
  }
  return tails;
}

// All rows times the outputs [from, to); `after` is where the thread's next ones begin, or none.
template <class T>
void Block(const char* x, const char* w, typename T::Out* y, const int32_t* shifts, int64_t rows,
           int64_t stride, int64_t outs, int64_t from, int64_t to, int64_t after) {
  const int64_t count = to - from, whole = stride / kVector * kVector;
  const char* const next_block = after + count <= outs ? w + after * stride : nullptr;
  w += from * stride;
  y += from;
  for (int64_t at = 0; at < whole; at += kChunk) {
    const int64_t bytes = std::min(kChunk, whole - at);
    const char* const next = at + kChunk < whole ? w + at + kChunk : next_block;
    Chunk<T>(x + at, w + at, next, y, rows, stride, bytes, outs, count, at == 0);
  }
  if (whole < stride) {
    const auto x_tails = Tails(x, rows, stride, whole), w_tails = Tails(w, count, stride, whole);
    Chunk<T>(x_tails.data(), w_tails.data(), nullptr, y, rows, kVector, kVector, outs, count,
             whole == 0);
  }
  if constexpr (std::is_same_v<T, Int8>) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < count; ++o) y[r * outs + o] -= shifts[r];
    }
  }
}

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

template <class T, ffi::DataType kIn, ffi::DataType kOut>
ffi::Future Product(ffi::ThreadPool pool, ffi::Buffer<kIn, 2> x, ffi::Buffer<kIn, 2> w,
                    ffi::Result<ffi::Buffer<kOut, 2>> y) {
  const int64_t rows = x.dimensions()[0], in = x.dimensions()[1], outs = w.dimensions()[0];
  const int64_t blocks = (outs + kBlock - 1) / kBlock;
  const int64_t useful = std::min(blocks, rows * in * outs / kWorthAThread);
  const int64_t threads = std::max<int64_t>(1, std::min(pool.num_threads(), useful));
  std::vector<int32_t> shifts;
  if constexpr (std::is_same_v<T, Int8>) shifts = Shifts(x.typed_data(), rows, in);
  const auto next = std::make_shared<std::atomic<int64_t>>(0);
  const auto work = [=, shifts = std::make_shared<const std::vector<int32_t>>(std::move(shifts)),
                     x = static_cast<const char*>(x.untyped_data()),
                     w = static_cast<const char*>(w.untyped_data()),
                     y = static_cast<typename T::Out*>(y->untyped_data())] {
    for (int64_t b; (b = next->fetch_add(1)) < blocks;) {
      Block<T>(x, w, y, shifts->data(), rows, in * T::kBytes, outs, b * kBlock,
               std::min(outs, (b + 1) * kBlock), (b + threads) * kBlock);
    }
  };
  ffi::CountDownPromise done(threads);
  ffi::Future future(done);
  for (int64_t t = 1; t < threads; ++t) {
    pool.Schedule([work, done]() mutable {
      work();
      done.CountDown();
    });
  }
  work();
  done.CountDown();
  return future;
}

template <ffi::DataType kIn, ffi::DataType kOut>
auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .template Arg<ffi::Buffer<kIn, 2>>()
      .template Arg<ffi::Buffer<kIn, 2>>()
      .template Ret<ffi::Buffer<kOut, 2>>();
}

constexpr auto kProductFloat32 = Product<Float32, ffi::F32, ffi::F32>;
constexpr auto kProductBFloat16 = Product<BFloat16, ffi::BF16, ffi::F32>;
constexpr auto kProductInt8 = Product<Int8, ffi::S8, ffi::S32>;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(float32, kProductFloat32, (Binding<ffi::F32, ffi::F32>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(bfloat16, kProductBFloat16, (Binding<ffi::BF16, ffi::F32>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(int8, kProductInt8, (Binding<ffi::S8, ffi::S32>()));
