// Copies of KV rows in host memory, over the pointer table of kv_copy.cuh.
//
// Rows that lie one behind the other on both sides are copied as one piece. Threads are few and
// live for one call: engines are forked, and a pool of threads would not survive that.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "kv_copy.cuh"
#include "stream_copy.h"

namespace kv::host {

// With less for each of them, a further thread costs more than it saves.
constexpr int64_t kBytesPerThread = int64_t{2} << 20;

// Runs in random order are beyond the processor's foresight: it is told of one so many ahead.
constexpr int kAhead = 16;
constexpr int64_t kPrefetched = 2 * kLine;

// Rows [first, first + count) of a job, at consecutive slots on either side.
struct Run {
  uint32_t first, count;
  int64_t from, to;
};

template <class From, class To>
std::vector<Run> runs_of(const From& from, const To& to, uint32_t rows) {
  std::vector<Run> runs;
  for (uint32_t i = 0; i < rows; ++i) {
    const int64_t source = from.row(i), target = to.row(i);
    if (!runs.empty()) {
      Run& last = runs.back();
      if (source == last.from + last.count && target == last.to + last.count) {
        ++last.count;
        continue;
      }
    }
    runs.push_back({i, 1, source, target});
  }
  return runs;
}

// Asks for the beginning of what a run reads; the processor guesses the rest by itself.
inline void prefetch(const Span& span, const Run& run) {
  const uint8_t* from = span.from + run.from * span.from_stride;
  const int64_t size = std::min<int64_t>(span.row_bytes, kPrefetched);
  for (int64_t at = 0; at < size; at += kLine) __builtin_prefetch(from + at);
}

// Rows [begin, end) of one buffer.
template <bool kStream>
void copy_rows(const Span& span, const std::vector<Run>& runs, uint32_t begin, uint32_t end) {
  const int64_t size = span.row_bytes;
  const bool dense = span.from_stride == size && span.to_stride == size;
  auto run = std::upper_bound(runs.begin(), runs.end(), begin,
                              [](uint32_t row, const Run& run) { return row < run.first; });
  for (--run; begin < end; ++run) {
    if (runs.end() - run > kAhead) prefetch(span, run[kAhead]);
    const uint32_t skipped = begin - run->first;
    const uint32_t count = std::min(run->count - skipped, end - begin);
    const uint8_t* from = span.from + (run->from + skipped) * span.from_stride;
    uint8_t* to = span.to + (run->to + skipped) * span.to_stride;
    if (dense || count == 1) {
      copy_piece<kStream>(to, from, count * size);
    } else {
      for (uint32_t i = 0; i < count; ++i) {
        copy_piece<kStream>(to + i * span.to_stride, from + i * span.from_stride, size);
      }
    }
    begin += count;
  }
}

// What of a job lies in bytes [begin, end) of its dense form, to whole rows: a row belongs to the
// part in which it begins, so that parts which meet share none and leave none out.
template <class From, class To>
void copy_part(const Job<From, To>& job, const std::vector<Run>& runs, int64_t begin, int64_t end,
               bool stream) {
  for (uint32_t i = 0; i < job.buffers; ++i) {
    const Span span = span_of(job, static_cast<int>(i));
    if (span.row_bytes == 0) continue;
    const int64_t start = int64_t{job.rows} * job.shape[i].before;
    const auto row_at = [&](int64_t byte) {
      const int64_t row = (std::max<int64_t>(byte - start, 0) + span.row_bytes - 1) / span.row_bytes;
      return static_cast<uint32_t>(std::min<int64_t>(row, job.rows));
    };
    const uint32_t first = row_at(begin), last = row_at(end);
    if (first >= last) continue;
    if (stream) {
      copy_rows<true>(span, runs, first, last);
    } else {
      copy_rows<false>(span, runs, first, last);
    }
  }
  if (stream) end_of_stream();
}

// The whole job, on at most `threads` threads, this one included. `stream_from`: bytes from which
// on stores pass the cache by.
template <class From, class To>
void copy(const Job<From, To>& job, int64_t threads, int64_t stream_from) {
  if (job.rows == 0 || job.buffers == 0) return;
  const Buffer& last = job.shape[job.buffers - 1];
  const int64_t total = int64_t{job.rows} * (last.before + last.row_bytes);
  const std::vector<Run> runs = runs_of(job.from, job.to, job.rows);
  const bool stream = total >= stream_from;
  const int64_t parts = std::clamp<int64_t>(total / kBytesPerThread, 1, std::max<int64_t>(threads, 1));
  const auto part = [&](int64_t i) {
    copy_part(job, runs, total * i / parts, total * (i + 1) / parts, stream);
  };
  std::vector<std::thread> others;
  int64_t mine = 1;  // parts from here on that have no thread
  try {
    others.reserve(static_cast<size_t>(parts - 1));
    for (; mine < parts; ++mine) others.emplace_back(part, mine);
  } catch (const std::system_error&) {
    // The machine gives no more threads: this one does what is left.
  }
  part(0);
  for (; mine < parts; ++mine) part(mine);
  for (std::thread& other : others) other.join();
}

}  // namespace kv::host
