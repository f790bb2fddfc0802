// What kv_copy.cu offers to host code.
#pragma once

#include <cuda_runtime_api.h>

#include "kv_copy.cuh"

namespace kv {

// Starts a job on a stream of the current device, on at most `blocks` blocks. `host` is the same
// job with the tables' copies in host memory; its slots are not looked at.
template <class From, class To>
cudaError_t launch(Job<From, To> job, const Job<From, To>& host, int64_t blocks,
                   cudaStream_t stream);

}  // namespace kv
