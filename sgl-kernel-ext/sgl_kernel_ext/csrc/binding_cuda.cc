// gather, scatter and transfer on CUDA pools, for Python through tvm-ffi.
//
// `host` and `table` hold one pointer table, on the host and on the device that copies; `stream` is
// a cudaStream_t of that device, as a number.
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>

#include "arguments.h"
#include "launch.h"

namespace {

using kv::Dense;
using kv::Paged;
using kv::TensorView;

template <class From, class To>
void start(const kv::Job<From, To>& job, const kv::Job<From, To>& host, const TensorView& slots,
           int64_t blocks, int64_t stream) {
  const tvm::ffi::CUDADeviceGuard device(slots.device().device_id);
  TVM_FFI_CHECK_CUDA_ERROR(kv::launch(job, host, blocks, reinterpret_cast<cudaStream_t>(stream)));
}

void gather(TensorView host, TensorView table, TensorView slots, TensorView out, int64_t blocks,
            int64_t stream) {
  kv::with_slots(slots, [&](auto* at) {
    const auto job = [&](const TensorView& entries) {
      return kv::job_of(kv::paged(entries, at), Dense{kv::bytes_of(out)}, entries, slots);
    };
    start(job(table), job(host), slots, blocks, stream);
  });
}

void scatter(TensorView host, TensorView table, TensorView slots, TensorView source, int64_t blocks,
             int64_t stream) {
  kv::with_slots(slots, [&](auto* at) {
    const auto job = [&](const TensorView& entries) {
      return kv::job_of(Dense{kv::bytes_of(source)}, kv::paged(entries, at), entries, slots);
    };
    start(job(table), job(host), slots, blocks, stream);
  });
}

// Both slot tensors are of one type and on the device that copies.
void transfer(TensorView host, TensorView table, TensorView slots, TensorView to_host,
              TensorView to_table, TensorView to_slots, int64_t blocks, int64_t stream) {
  kv::with_slots(slots, [&](auto* at) {
    const auto* to_at = static_cast<decltype(at)>(to_slots.data_ptr());
    const auto job = [&](const TensorView& entries, const TensorView& to_entries) {
      return kv::job_of(kv::paged(entries, at), kv::paged(to_entries, to_at), entries, slots);
    };
    start(job(table, to_table), job(host, to_host), slots, blocks, stream);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather, gather);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scatter, scatter);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(transfer, transfer);
