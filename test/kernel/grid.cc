// The device's index arithmetic on the host: every lane of every warp of a grid, one after another.
//
// Memory counts what a GPU would do: accesses by width, and those that it would refuse.
#include <tvm/ffi/function.h>

#include "arguments.h"

namespace {

using kv::Dense;
using kv::TensorView;

struct Counts {
  int64_t stored[4];  // of 1, 4, 8, 16 bytes
  int64_t misaligned;
};
Counts* counts;

template <int kWidth>
struct alignas(1) Bytes {
  uint8_t at[kWidth];
};

struct Memory {
  template <int kWidth>
  using Vector = Bytes<kWidth>;

  template <class V>
  static V load(const uint8_t* at) {
    check<V>(at);
    return *reinterpret_cast<const V*>(at);
  }
  template <class V>
  static void store(uint8_t* at, V value) {
    check<V>(at);
    counts->stored[sizeof(V) == 1 ? 0 : sizeof(V) == 4 ? 1 : sizeof(V) == 8 ? 2 : 3] += 1;
    *reinterpret_cast<V*>(at) = value;
  }
  template <class V>
  static void check(const uint8_t* at) {
    if (reinterpret_cast<uintptr_t>(at) % sizeof(V) != 0) counts->misaligned += 1;
  }
};

// Warps in reverse where `workers` is negative: no warp may depend on another.
template <class From, class To>
void walk(kv::Job<From, To> job, int64_t workers, const TensorView& counted) {
  counts = static_cast<Counts*>(counted.data_ptr());
  job.tiles = kv::most_tiles(job);
  const auto all = static_cast<uint32_t>(workers < 0 ? -workers : workers);
  for (uint32_t i = 0; i < all; ++i) {
    const uint32_t worker = workers < 0 ? all - 1 - i : i;
    for (uint32_t lane = 0; lane < kv::kLanes; ++lane) {
      kv::copy_share<Memory>(job, worker, all, lane);
    }
  }
}

void gather(TensorView table, TensorView slots, TensorView out, int64_t workers, TensorView n) {
  kv::with_slots(slots, [&](auto* at) {
    walk(kv::job_of(kv::paged(table, at), Dense{kv::bytes_of(out)}, table, slots), workers, n);
  });
}

void scatter(TensorView table, TensorView slots, TensorView from, int64_t workers, TensorView n) {
  kv::with_slots(slots, [&](auto* at) {
    walk(kv::job_of(Dense{kv::bytes_of(from)}, kv::paged(table, at), table, slots), workers, n);
  });
}

void transfer(TensorView table, TensorView slots, TensorView to, TensorView to_slots,
              int64_t workers, TensorView n) {
  kv::with_slots(slots, [&](auto* at) {
    const auto* to_at = static_cast<decltype(at)>(to_slots.data_ptr());
    walk(kv::job_of(kv::paged(table, at), kv::paged(to, to_at), table, slots), workers, n);
  });
}

int64_t quotient(int64_t dividend, int64_t divisor) {
  return kv::quotient(dividend, static_cast<uint32_t>(divisor));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather, gather);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scatter, scatter);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(transfer, transfer);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quotient, quotient);
