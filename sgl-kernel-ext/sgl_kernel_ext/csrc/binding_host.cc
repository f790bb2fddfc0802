// gather, scatter and transfer on host pools, for Python through tvm-ffi.
//
// `limit` is the number of rows of a pool; bytes from `stream_from` on are written past the cache.
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include "arguments.h"
#include "kv_copy_host.h"

namespace {

using kv::Dense;
using kv::TensorView;

// A wrong slot would overwrite somebody's memory, and looking costs next to nothing here.
template <class Slot>
void require(const Slot* slots, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] < 0 || slots[i] >= limit) {
      TVM_FFI_THROW(IndexError) << "slot " << slots[i] << " at position " << i
                                << " is not one of the pool's " << limit;
    }
  }
}

void gather(TensorView table, int64_t limit, TensorView slots, TensorView out, int64_t threads,
            int64_t stream_from) {
  kv::with_slots(slots, [&](auto* at) {
    require(at, slots.size(0), limit);
    kv::host::copy(kv::job_of(kv::paged(table, at), Dense{kv::bytes_of(out)}, table, slots),
                   threads, stream_from);
  });
}

void scatter(TensorView table, int64_t limit, TensorView slots, TensorView source, int64_t threads,
             int64_t stream_from) {
  kv::with_slots(slots, [&](auto* at) {
    require(at, slots.size(0), limit);
    kv::host::copy(kv::job_of(Dense{kv::bytes_of(source)}, kv::paged(table, at), table, slots),
                   threads, stream_from);
  });
}

// Both slot tensors are of one type.
void transfer(TensorView table, int64_t limit, TensorView slots, TensorView to_table,
              int64_t to_limit, TensorView to_slots, int64_t threads, int64_t stream_from) {
  kv::with_slots(slots, [&](auto* at) {
    const auto* to_at = static_cast<decltype(at)>(to_slots.data_ptr());
    require(at, slots.size(0), limit);
    require(to_at, to_slots.size(0), to_limit);
    kv::host::copy(kv::job_of(kv::paged(table, at), kv::paged(to_table, to_at), table, slots),
                   threads, stream_from);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather, gather);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scatter, scatter);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(transfer, transfer);
