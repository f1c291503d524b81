#include "bank/driver_api.h"

#include <dlfcn.h>

#include <stdexcept>

namespace longlive::bank::driver {
namespace {

// cuGetProcAddress of 12.0 reports through one more argument than that of 11.3, which has the unsuffixed name.
using GetProcAddress = Result (*)(const char*, void**, int, std::uint64_t, int*);
using GetProcAddress11 = Result (*)(const char*, void**, int, std::uint64_t);
// The default stream (0) is the legacy one, as in the framework that names the streams.
constexpr std::uint64_t kLegacyStream = 1;

class Library {
 public:
  explicit Library(const std::string& path) : path_(path.empty() ? "libcuda.so.1" : path) {
    // Never closed: the driver does not survive that.
    handle_ = dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) {
      const char* reason = dlerror();
      throw std::runtime_error("the CUDA driver cannot be loaded: " + std::string(reason != nullptr ? reason : path_));
    }
    get_ = reinterpret_cast<GetProcAddress>(dlsym(handle_, "cuGetProcAddress_v2"));
    if (get_ == nullptr) get11_ = reinterpret_cast<GetProcAddress11>(dlsym(handle_, "cuGetProcAddress"));
  }

  // The function as it was in that version of the interface, or null.
  void* find(const char* name, int version) const {
    void* found = nullptr;
    int status = 0;
    Result result = kNotSupported;
    if (get_ != nullptr) {
      result = get_(name, &found, version, kLegacyStream, &status);
    } else if (get11_ != nullptr) {
      result = get11_(name, &found, version, kLegacyStream);
    }
    return result == kSuccess ? found : nullptr;
  }

  // `exported`: the library's symbol of the same ABI, for drivers that know no versions.
  template <typename Function>
  void need(Function& function, const char* name, int version, const char* exported) const {
    void* found = find(name, version);
    if (found == nullptr) found = dlsym(handle_, exported);
    if (found == nullptr) throw std::runtime_error("the CUDA driver " + path_ + " has no " + name + "; it is too old");
    function = reinterpret_cast<Function>(found);
  }

 private:
  std::string path_;
  void* handle_ = nullptr;
  GetProcAddress get_ = nullptr;
  GetProcAddress11 get11_ = nullptr;
};

}  // namespace

std::string Api::name_of(Result result) const {
  const char* name = nullptr;
  const std::string number = std::to_string(result);
  if (error_name == nullptr || error_name(result, &name) != kSuccess || name == nullptr) return "CUDA error " + number;
  return std::string(name) + " (" + number + ")";
}

void Api::check(Result result, const char* call) const {
  if (result != kSuccess) throw std::runtime_error(std::string(call) + " failed: " + name_of(result));
}

std::shared_ptr<const Api> load(const std::string& path) {
  const Library library(path);
  auto api = std::make_shared<Api>();
  library.need(api->init, "cuInit", 2000, "cuInit");
  library.need(api->error_name, "cuGetErrorName", 6000, "cuGetErrorName");
  library.need(api->device_get, "cuDeviceGet", 2000, "cuDeviceGet");
  library.need(api->device_attribute, "cuDeviceGetAttribute", 2000, "cuDeviceGetAttribute");
  library.need(api->primary_retain, "cuDevicePrimaryCtxRetain", 7000, "cuDevicePrimaryCtxRetain");
  library.need(api->primary_release, "cuDevicePrimaryCtxRelease", 11000, "cuDevicePrimaryCtxRelease_v2");
  library.need(api->context_push, "cuCtxPushCurrent", 4000, "cuCtxPushCurrent_v2");
  library.need(api->context_pop, "cuCtxPopCurrent", 4000, "cuCtxPopCurrent_v2");
  library.need(api->priority_range, "cuCtxGetStreamPriorityRange", 5050, "cuCtxGetStreamPriorityRange");
  library.need(api->exchange_capture_mode, "cuThreadExchangeStreamCaptureMode", 10010,
               "cuThreadExchangeStreamCaptureMode");
  library.need(api->stream_create, "cuStreamCreateWithPriority", 5050, "cuStreamCreateWithPriority");
  library.need(api->stream_destroy, "cuStreamDestroy", 4000, "cuStreamDestroy_v2");
  library.need(api->stream_synchronize, "cuStreamSynchronize", 2000, "cuStreamSynchronize");
  library.need(api->stream_wait_event, "cuStreamWaitEvent", 3020, "cuStreamWaitEvent");
  library.need(api->stream_is_capturing, "cuStreamIsCapturing", 10000, "cuStreamIsCapturing");
  library.need(api->event_create, "cuEventCreate", 2000, "cuEventCreate");
  library.need(api->event_destroy, "cuEventDestroy", 4000, "cuEventDestroy_v2");
  library.need(api->event_record, "cuEventRecord", 2000, "cuEventRecord");
  library.need(api->event_query, "cuEventQuery", 2000, "cuEventQuery");
  library.need(api->event_synchronize, "cuEventSynchronize", 2000, "cuEventSynchronize");
  library.need(api->copy_to_device, "cuMemcpyHtoDAsync", 3020, "cuMemcpyHtoDAsync_v2");
  library.need(api->copy_to_host, "cuMemcpyDtoHAsync", 3020, "cuMemcpyDtoHAsync_v2");
  library.need(api->copy_in_device, "cuMemcpyDtoDAsync", 3020, "cuMemcpyDtoDAsync_v2");
  library.need(api->address_range, "cuMemGetAddressRange", 3020, "cuMemGetAddressRange_v2");
  library.need(api->host_register, "cuMemHostRegister", 6050, "cuMemHostRegister_v2");
  library.need(api->host_unregister, "cuMemHostUnregister", 4000, "cuMemHostUnregister");
  api->copy_batch = reinterpret_cast<decltype(api->copy_batch)>(library.find("cuMemcpyBatchAsync", 12080));
  api->check(api->init(0), "cuInit");
  return api;
}

}  // namespace longlive::bank::driver
