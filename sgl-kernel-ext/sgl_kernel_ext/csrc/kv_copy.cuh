// Copies of KV rows between pools and a dense area: the index arithmetic, and what one lane does.
//
// Nothing here needs a GPU. With nvcc these are `__host__ __device__` functions and one kernel;
// with a plain C++ compiler the same functions are walked over an emulated grid by the tests.
//
// A *row* is what lies in one piece in one buffer: a token, or a page. A job copies `rows` rows of
// every buffer of a pool in one launch. Its work is cut into tiles of kTile vectors; tiles of all
// buffers are dealt out to the warps of a grid of any size, and a warp is done with a tile before it
// takes the next one. Lanes share nothing, so that there is nothing to synchronise.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KV_FUNCTION __host__ __device__ __forceinline__
#else
#define KV_FUNCTION inline
#endif
#ifdef __CUDA_ARCH__
#define KV_UNROLL _Pragma("unroll")
#else
#define KV_UNROLL
#endif

namespace kv {

// One buffer of a pool; four int64 of the pointer table.
struct Buffer {
  int64_t address;    // of row 0
  int64_t stride;     // bytes from one row to the next
  int64_t row_bytes;  // bytes of a row that are copied, at most kMaxRowBytes
  int64_t before;     // row_bytes of all buffers before this one, summed
};

constexpr int kLanes = 32;
constexpr int kDepth = 8;  // vectors that a lane has in flight: all are loaded before one is stored
constexpr int kTile = kLanes * kDepth;
constexpr int64_t kMaxRowBytes = int64_t{1} << 30;

// One side of a copy: a dense area, filled buffer by buffer, each [rows, row_bytes] ...
struct Dense {
  uint8_t* base;

  KV_FUNCTION uint8_t* start(int, const Buffer& shape, uint32_t rows) const {
    return base + int64_t{rows} * shape.before;
  }
  KV_FUNCTION int64_t stride(int, const Buffer& shape) const { return shape.row_bytes; }
  KV_FUNCTION int64_t row(uint32_t index) const { return index; }
};

// ... or the rows of a pool that `slots` names, one slot per row, the same in every buffer.
template <class Slot>
struct Paged {
  const Buffer* table;
  const Slot* slots;

  KV_FUNCTION uint8_t* start(int buffer, const Buffer&, uint32_t) const {
    return reinterpret_cast<uint8_t*>(table[buffer].address);
  }
  KV_FUNCTION int64_t stride(int buffer, const Buffer&) const { return table[buffer].stride; }
  KV_FUNCTION int64_t row(uint32_t index) const { return static_cast<int64_t>(slots[index]); }
};

template <class From, class To>
struct Job {
  From from;
  To to;
  const Buffer* shape;  // row_bytes and before of every buffer
  uint32_t buffers, rows;
  int64_t tiles;  // of the buffer that has most
};

// What both sides of one buffer are, worked out once per tile.
struct Span {
  const uint8_t* from;
  uint8_t* to;
  int64_t from_stride, to_stride;
  uint32_t row_bytes, rows;

  // The widest access that every row of both sides is aligned to.
  KV_FUNCTION int width() const {
    const uint64_t all = reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to) |
                         static_cast<uint64_t>(from_stride) | static_cast<uint64_t>(to_stride) |
                         row_bytes;
    return all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : all % 4 == 0 ? 4 : 1;
  }
  KV_FUNCTION int64_t tiles() const {
    return (int64_t{rows} * (row_bytes / width()) + kTile - 1) / kTile;
  }
};

template <class From, class To>
KV_FUNCTION Span span_of(const Job<From, To>& job, int buffer) {
  const Buffer shape = job.shape[buffer];
  return {job.from.start(buffer, shape, job.rows), job.to.start(buffer, shape, job.rows),
          job.from.stride(buffer, shape),          job.to.stride(buffer, shape),
          static_cast<uint32_t>(shape.row_bytes),  job.rows};
}

// Tiles of the buffer that has most: what a launch has to know and only addresses tell. `job` may
// hold the tables' copies in host memory.
template <class From, class To>
KV_FUNCTION int64_t most_tiles(const Job<From, To>& job) {
  int64_t most = 0;
  for (uint32_t i = 0; i < job.buffers; ++i) {
    const Span span = span_of(job, static_cast<int>(i));
    if (span.row_bytes != 0 && span.tiles() > most) most = span.tiles();
  }
  return most;
}

// A GPU divides 32 bits several times faster than 64, and nearly every dividend fits.
KV_FUNCTION int64_t quotient(int64_t dividend, uint32_t divisor) {
  if (dividend >> 32 == 0) return static_cast<uint32_t>(dividend) / divisor;
  return dividend / divisor;
}

// Vectors tile * kTile + lane, + kLanes, ... of one buffer. Neighbouring lanes take neighbouring
// vectors, so that a warp's accesses within a row, and all of those to a dense area, coalesce.
//
// Loads have no condition, so that all of them are under way at once: past the end they repeat
// bytes of the last row, and what they got is not stored.
template <class Memory, int kWidth, class From, class To>
KV_FUNCTION void copy_tile(const From& from, const To& to, const Span& span, int64_t tile,
                           uint32_t lane) {
  using Vector = typename Memory::template Vector<kWidth>;
  const uint32_t per_row = span.row_bytes / kWidth;
  const uint32_t step_rows = kLanes / per_row, step_columns = kLanes % per_row;
  const int64_t first = tile * kTile + lane;
  const int64_t left = int64_t{span.rows} * per_row - first;
  uint32_t row = static_cast<uint32_t>(quotient(first, per_row));
  uint32_t column = static_cast<uint32_t>(first - int64_t{row} * per_row);

  int64_t source[kDepth], target[kDepth];
  KV_UNROLL
  for (int k = 0; k < kDepth; ++k) {
    const uint32_t inside = row < span.rows ? row : span.rows - 1;
    source[k] = from.row(inside) * span.from_stride + int64_t{column} * kWidth;
    target[k] = to.row(inside) * span.to_stride + int64_t{column} * kWidth;
    row += step_rows;
    column += step_columns;
    if (column >= per_row) {
      column -= per_row;
      ++row;
    }
  }
  Vector taken[kDepth];
  KV_UNROLL
  for (int k = 0; k < kDepth; ++k) taken[k] = Memory::template load<Vector>(span.from + source[k]);
  KV_UNROLL
  for (int k = 0; k < kDepth; ++k) {
    if (k * kLanes < left) Memory::template store<Vector>(span.to + target[k], taken[k]);
  }
}

// All that one lane of warp `worker` of `workers` does.
template <class Memory, class From, class To>
KV_FUNCTION void copy_share(const Job<From, To>& job, uint32_t worker, uint32_t workers,
                            uint32_t lane) {
  if (job.tiles == 0) return;
  uint32_t turn = worker % job.buffers;
  int64_t tile = worker / job.buffers;
  while (tile < job.tiles) {
    // Small buffers run out of tiles early; turning the order with each round keeps a warp from
    // meeting the same buffer again and again where their number divides that of the warps.
    uint32_t buffer = turn + static_cast<uint32_t>(tile) % job.buffers;
    if (buffer >= job.buffers) buffer -= job.buffers;
    const Span span = span_of(job, static_cast<int>(buffer));
    if (span.row_bytes != 0) {
      switch (span.width()) {
        case 16: copy_tile<Memory, 16>(job.from, job.to, span, tile, lane); break;
        case 8: copy_tile<Memory, 8>(job.from, job.to, span, tile, lane); break;
        case 4: copy_tile<Memory, 4>(job.from, job.to, span, tile, lane); break;
        default: copy_tile<Memory, 1>(job.from, job.to, span, tile, lane);
      }
    }
    turn += workers % job.buffers;
    tile += workers / job.buffers;
    if (turn >= job.buffers) {
      turn -= job.buffers;
      ++tile;
    }
  }
}

}  // namespace kv
