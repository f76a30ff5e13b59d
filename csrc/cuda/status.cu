// Format version, error texts and limits of the device.
#include "common.cuh"

namespace lowra {

static thread_local const char *last_error = "no error";

int keep_error(cudaError_t error) {
  if (error == cudaSuccess) return LOWRA_OK;
  last_error = cudaGetErrorString(error);
  return LOWRA_CUDA_ERROR;
}

int launched() { return keep_error(cudaGetLastError()); }

int limits_of_current_device(device_limits &limits) {
  int device = 0;
  if (const int status = keep_error(cudaGetDevice(&device))) return status;
  constexpr int kDevices = 64;
  static thread_local device_limits known[kDevices];
  if (device >= kDevices) return LOWRA_UNSUPPORTED;
  device_limits &found = known[device];
  if (found.major == 0) {
    cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&found.l2_bytes, cudaDevAttrL2CacheSize, device);
    cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, device);
  }
  limits = found;
  return LOWRA_OK;
}

}  // namespace lowra

int lowra_format_version(void) { return LOWRA_FORMAT_VERSION; }

int lowra_interface_version(void) { return LOWRA_INTERFACE_VERSION; }

const char *lowra_cuda_error(void) { return lowra::last_error; }
