// Copying one piece of host memory, optionally past the cache.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace kv::host {

constexpr int64_t kLine = 64;

// A shorter piece is mostly ends, and a line written in parts is slow to stream.
constexpr int64_t kStreamPiece = 2 * kLine;

#ifdef __AVX2__
// Whole lines from a line's boundary on with non-temporal stores, the ends with ordinary ones.
inline void stream_piece(uint8_t* to, const uint8_t* from, int64_t size) {
  const int64_t head = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  if (head != 0) std::memcpy(to, from, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + kLine <= size; at += kLine) {
    const auto low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at));
    const auto high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at + kLine / 2));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at + kLine / 2), high);
  }
  if (at != size) std::memcpy(to + at, from + at, static_cast<size_t>(size - at));
}

// Other processors see non-temporal stores in no order until here.
inline void end_of_stream() { _mm_sfence(); }
#else
inline void stream_piece(uint8_t* to, const uint8_t* from, int64_t size) {
  std::memcpy(to, from, static_cast<size_t>(size));
}
inline void end_of_stream() {}
#endif

template <bool kStream>
inline void copy_piece(uint8_t* to, const uint8_t* from, int64_t size) {
  if (kStream && size >= kStreamPiece) {
    stream_piece(to, from, size);
  } else if (size == 8) {  // scales: calling memcpy would be most of the work
    __builtin_memcpy(to, from, 8);
  } else {
    std::memcpy(to, from, static_cast<size_t>(size));
  }
}

}  // namespace kv::host
