// What Python hands over, as jobs. Shapes, types and devices were checked there, in buffers.py.
#pragma once

#include <tvm/ffi/container/tensor.h>

#include "kv_copy.cuh"

namespace kv {

using tvm::ffi::TensorView;

inline const Buffer* buffers_of(const TensorView& table) {
  static_assert(sizeof(Buffer) == 4 * sizeof(int64_t));
  return static_cast<const Buffer*>(table.data_ptr());
}

inline uint8_t* bytes_of(const TensorView& dense) {
  return static_cast<uint8_t*>(dense.data_ptr());
}

// Calls `use` with the slots as const int32_t* or const int64_t*.
template <class Use>
void with_slots(const TensorView& slots, Use use) {
  if (slots.dtype().bits == 32) {
    use(static_cast<const int32_t*>(slots.data_ptr()));
  } else {
    use(static_cast<const int64_t*>(slots.data_ptr()));
  }
}

template <class Slot>
Paged<Slot> paged(const TensorView& table, const Slot* slots) {
  return {buffers_of(table), slots};
}

template <class From, class To>
Job<From, To> job_of(From from, To to, const TensorView& shape, const TensorView& slots) {
  return {from,
          to,
          buffers_of(shape),
          static_cast<uint32_t>(shape.size(0)),
          static_cast<uint32_t>(slots.size(0)),
          0};
}

}  // namespace kv
