// The kernel, a grid of any size over kv_copy.cuh, and its launcher.
#include <algorithm>

#include "launch.h"

namespace kv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kLanes;

template <int kWidth>
struct VectorOf;
template <>
struct VectorOf<16> { using type = uint4; };
template <>
struct VectorOf<8> { using type = uint2; };
template <>
struct VectorOf<4> { using type = unsigned int; };
template <>
struct VectorOf<1> { using type = unsigned char; };

// KV is read once and written once, so it is the first to leave the cache when room is needed: what
// decode keeps there stays.
struct DeviceMemory {
  template <int kWidth>
  using Vector = typename VectorOf<kWidth>::type;

  template <class V>
  static KV_FUNCTION V load(const uint8_t* at) {
#ifdef __CUDA_ARCH__
    return __ldcs(reinterpret_cast<const V*>(at));
#else
    return *reinterpret_cast<const V*>(at);
#endif
  }
  template <class V>
  static KV_FUNCTION void store(uint8_t* at, V value) {
#ifdef __CUDA_ARCH__
    __stcs(reinterpret_cast<V*>(at), value);
#else
    *reinterpret_cast<V*>(at) = value;
#endif
  }
};

// One block per multiprocessor is meant: it may have all the registers that kDepth loads in flight
// take, and what decode runs has the other multiprocessors.
template <class From, class To>
__global__ void __launch_bounds__(kThreads, 1)
    copy_kernel(const __grid_constant__ Job<From, To> job) {
  // Consecutive tiles go to different blocks, so that a short copy also uses all of them.
  const uint32_t worker = threadIdx.x / kLanes * gridDim.x + blockIdx.x;
  copy_share<DeviceMemory>(job, worker, gridDim.x * kWarps, threadIdx.x % kLanes);
}

}  // namespace

template <class From, class To>
cudaError_t launch(Job<From, To> job, const Job<From, To>& host, int64_t blocks,
                   cudaStream_t stream) {
  job.tiles = most_tiles(host);
  const int64_t useful = (job.tiles * job.buffers + kWarps - 1) / kWarps;
  if (useful == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, useful));
  copy_kernel<<<grid, kThreads, 0, stream>>>(job);
  return cudaGetLastError();
}

#define KV_LAUNCH(From, To) \
  template cudaError_t launch(Job<From, To>, const Job<From, To>&, int64_t, cudaStream_t)
KV_LAUNCH(Paged<int32_t>, Dense);
KV_LAUNCH(Paged<int64_t>, Dense);
KV_LAUNCH(Dense, Paged<int32_t>);
KV_LAUNCH(Dense, Paged<int64_t>);
KV_LAUNCH(Paged<int32_t>, Paged<int32_t>);
KV_LAUNCH(Paged<int64_t>, Paged<int64_t>);

}  // namespace kv
