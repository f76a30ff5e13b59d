// Format version and error texts of the CUDA library.
#include "common.cuh"

namespace lowra {

static thread_local const char *last_error = "no error";

int keep_error(cudaError_t error) {
  if (error == cudaSuccess) return LOWRA_OK;
  last_error = cudaGetErrorString(error);
  return LOWRA_CUDA_ERROR;
}

int launched() { return keep_error(cudaGetLastError()); }

}  // namespace lowra

int lowra_format_version(void) { return LOWRA_FORMAT_VERSION; }

const char *lowra_cuda_error(void) { return lowra::last_error; }
