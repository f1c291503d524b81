#include "cuda_info.h"

#include <cuda_runtime.h>

namespace longlive {
namespace {

// Never launched: it is there so that every architecture has an image, and the runtime can say which one a device uses.
__global__ void image_probe() {}

std::string version_text(int version) {  // CUDA writes 13.0 as 13000
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// CUDA keeps the last error for whoever asks next (torch, say, after its next launch), so a tolerated one is cleared.
std::string error_text(cudaError_t status) {
  cudaGetLastError();
  return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
}

CudaDevice describe(int device) {
  CudaDevice found;
  cudaDeviceProp properties{};
  cudaError_t status = cudaGetDeviceProperties(&properties, device);
  if (status == cudaSuccess) {
    found.name = properties.name;
    found.major = properties.major;
    found.minor = properties.minor;
    status = cudaSetDevice(device);
  }
  cudaFuncAttributes attributes{};
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, image_probe);
  if (status == cudaSuccess) {
    found.image = attributes.binaryVersion;
  } else {
    found.image_error = error_text(status);
  }
  return found;
}

}  // namespace

CudaBuildInfo cuda_build_info() {
  CudaBuildInfo info;
  info.toolkit = version_text(CUDART_VERSION);
  int driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0) info.driver = version_text(driver);
  cudaError_t status = cudaGetDeviceCount(&info.device_count);
  int current = 0;
  if (status == cudaSuccess && info.device_count > 0) status = cudaGetDevice(&current);
  if (status != cudaSuccess) {
    info.device_count = 0;
    info.error = error_text(status);
    return info;
  }
  for (int device = 0; device < info.device_count; ++device) info.devices.push_back(describe(device));
  if (info.device_count > 0) cudaSetDevice(current);
  return info;
}

}  // namespace longlive
