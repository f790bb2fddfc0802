// Copying one piece of host memory, optionally past the cache.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kv::host {

constexpr int64_t kLine = 64;

// A shorter piece is mostly ends, and a line written in parts is slow to stream.
constexpr int64_t kStreamPiece = 2 * kLine;

#if defined(__x86_64__)
inline bool can_stream() {
  static const bool can = __builtin_cpu_supports("avx2");
  return can;
}

// Whole lines from a 64-byte boundary on with non-temporal stores, the ends with ordinary ones.
__attribute__((target("avx2"))) inline void stream_piece(uint8_t* to, const uint8_t* from,
                                                         int64_t size) {
  const int64_t head = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  if (head != 0) std::memcpy(to, from, static_cast<size_t>(head));
  const int64_t lines = head + (size - head) / kLine * kLine;
  int64_t at = head;
  for (; at < lines; at += kLine) {
    const auto low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at));
    const auto high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at + kLine / 2));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at + kLine / 2), high);
  }
  if (at != size) std::memcpy(to + at, from + at, static_cast<size_t>(size - at));
}

// Non-temporal stores are seen by other processors in no order until here.
inline void end_of_stream() { _mm_sfence(); }
#else
inline bool can_stream() { return false; }
inline void stream_piece(uint8_t*, const uint8_t*, int64_t) {}
inline void end_of_stream() {}
#endif

inline void copy_piece(uint8_t* to, const uint8_t* from, int64_t size, bool stream) {
  if (stream && size >= kStreamPiece && can_stream()) {
    stream_piece(to, from, size);
  } else if (size == 8) {  // scales; a call of memcpy would be most of the work
    std::memcpy(to, from, 8);
  } else {
    std::memcpy(to, from, static_cast<size_t>(size));
  }
}

}  // namespace kv::host
