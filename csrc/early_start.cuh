// Kernels that start while the one in front of them is still running: programmatic dependent launch, from Hopper on.
#pragma once

#include <cuda_runtime.h>

namespace dit_moe {

// The next kernel may start, as soon as all blocks have said so, if it was launched to start early.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernels in front of this one are done and what they wrote can be seen, if this one was launched to start
// early; otherwise they are.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// By all threads at the end of a kernel that does not depend on the one in front of it and may run beside that one's
// end: its last block waits for it, so that what comes behind waits for both.
__device__ __forceinline__ void outlast_previous() {
  const bool last = blockIdx.x + 1 == gridDim.x && blockIdx.y + 1 == gridDim.y && blockIdx.z + 1 == gridDim.z;
  if (last && threadIdx.x == 0 && threadIdx.y == 0) wait_for_previous();
}

inline cudaLaunchAttribute early_start() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// starts_early: before the kernel in front of it is done; on Hopper.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, bool starts_early,
                          cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = early_start();
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = starts_early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace dit_moe
