// Format version, error texts and limits of the device.
#include "common.cuh"

namespace lowra {

static thread_local const char *last_error = "no error";

int keep_error(cudaError_t error) {
  if (error == cudaSuccess) return LOWRA_OK;
  last_error = cudaGetErrorString(error);
  const bool no_code = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
                       error == cudaErrorUnsupportedPtxVersion;
  if (no_code) cudaGetLastError();  // or the next launch would be taken for a failed one
  return no_code ? LOWRA_NO_CODE : LOWRA_CUDA_ERROR;
}

// Does nothing: says for which chip the code that runs here was compiled.
static __global__ void probe() {}

#ifdef LOWRA_HOPPER
constexpr bool kHasHopper = true;
#else
constexpr bool kHasHopper = false;
#endif

static int find_limits(int device, device_limits &found) {
  cudaFuncAttributes code;
  if (const int status = keep_error(cudaFuncGetAttributes(&code, probe))) return status;
  int major = 0, clusters = 0;
  cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&found.l2_bytes, cudaDevAttrL2CacheSize, device);
  cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  found.code = code.ptxVersion;
  found.clusters = found.code >= kHopper && clusters;
  found.hopper = kHasHopper && found.code >= kHopper && major == 9;  // sm_90a code runs on no other chip
  // Code for Turing keeps to its 64 KB wherever it runs, so that a test elsewhere takes the same ways.
  if (found.code < kAmpere && found.shared_bytes > 64 << 10) found.shared_bytes = 64 << 10;
  return LOWRA_OK;
}

int launched() { return keep_error(cudaGetLastError()); }

int limits_of_current_device(device_limits &limits) {
  int device = 0;
  if (const int status = keep_error(cudaGetDevice(&device))) return status;
  constexpr int kDevices = 64;
  static thread_local device_limits known[kDevices];
  if (device >= kDevices) return LOWRA_UNSUPPORTED;
  device_limits &found = known[device];
  if (found.code == 0) {
    if (const int status = find_limits(device, found)) return status;
  }
  limits = found;
  return LOWRA_OK;
}

}  // namespace lowra

int lowra_format_version(void) { return LOWRA_FORMAT_VERSION; }

int lowra_interface_version(void) { return LOWRA_INTERFACE_VERSION; }

const char *lowra_cuda_error(void) { return lowra::last_error; }

int32_t lowra_cuda_code(int32_t *hopper) {
  lowra::device_limits limits;
  if (!hopper || lowra::limits_of_current_device(limits) != LOWRA_OK) return 0;
  *hopper = limits.hopper;
  return limits.code;
}
