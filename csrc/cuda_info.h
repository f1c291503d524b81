// What the CUDA part of the module was compiled with, and what it finds on this machine. No CUDA header is needed.
#pragma once

#include <string>
#include <vector>

namespace longlive {

struct CudaDevice {
  std::string name;
  int major = 0;            // compute capability
  int minor = 0;
  int image = 0;            // compiled image that this device runs, 90 for sm_90; 0 when there is none
  std::string image_error;  // why image is 0
};

struct CudaBuildInfo {
  std::string toolkit;         // version of the CUDA toolkit, "13.0"
  std::string driver;          // newest CUDA version the driver supports, "" without a driver
  int device_count = 0;
  std::string error;           // CUDA's text when devices cannot be counted, else ""
  std::vector<CudaDevice> devices;
};

// Never throws for a missing driver or device; leaves no CUDA error behind. Makes a context on every device it finds.
CudaBuildInfo cuda_build_info();

}  // namespace longlive
