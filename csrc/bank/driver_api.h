// What the bank uses of the CUDA driver, declared by hand: it builds without the toolkit and loads without a driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

// The driver's handles, by its own names for what they point to, so that a test can compare types with its header.
struct CUctx_st;
struct CUstream_st;
struct CUevent_st;

namespace longlive::bank::driver {

// The driver's enumerations are ints here; `Result` is a CUresult.
using Result = int;
using Address = unsigned long long;  // CUdeviceptr
using Context = CUctx_st*;
using StreamHandle = CUstream_st*;
using EventHandle = CUevent_st*;

inline constexpr Result kSuccess = 0;
inline constexpr Result kInvalidValue = 1;
inline constexpr Result kDeinitialized = 4;
inline constexpr Result kNotReady = 600;
inline constexpr Result kNotSupported = 801;
inline constexpr Result kCaptureUnsupported = 900;
inline constexpr Result kCaptureImplicit = 906;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventBlockingSync = 1;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kHostRegisterPortable = 1;
inline constexpr int kCaptureStatusNone = 0;
inline constexpr int kCaptureModeRelaxed = 2;
inline constexpr int kCanUseRegisteredHostPointer = 91;   // CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
inline constexpr int kSourceInStreamOrder = 1;            // CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
inline constexpr unsigned kPreferOverlapWithCompute = 1;  // CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE

struct Location {  // CUmemLocation
  int type = 0;
  int id = 0;
};
struct CopyAttributes {  // CUmemcpyAttributes
  int source_order = 0;
  Location source_hint;
  Location destination_hint;
  unsigned flags = 0;
};

// The functions, each in the ABI of one version of the driver's interface.
struct Api {
  Result (*init)(unsigned flags) = nullptr;
  Result (*error_name)(Result error, const char** name) = nullptr;
  Result (*device_get)(int* device, int ordinal) = nullptr;
  Result (*device_attribute)(int* value, int attribute, int device) = nullptr;
  Result (*primary_retain)(Context* context, int device) = nullptr;
  Result (*primary_release)(int device) = nullptr;
  Result (*context_push)(Context context) = nullptr;
  Result (*context_pop)(Context* context) = nullptr;
  Result (*priority_range)(int* least, int* greatest) = nullptr;
  Result (*exchange_capture_mode)(int* mode) = nullptr;
  Result (*stream_create)(StreamHandle* stream, unsigned flags, int priority) = nullptr;
  Result (*stream_destroy)(StreamHandle stream) = nullptr;
  Result (*stream_synchronize)(StreamHandle stream) = nullptr;
  Result (*stream_wait_event)(StreamHandle stream, EventHandle event, unsigned flags) = nullptr;
  Result (*stream_is_capturing)(StreamHandle stream, int* status) = nullptr;
  Result (*event_create)(EventHandle* event, unsigned flags) = nullptr;
  Result (*event_destroy)(EventHandle event) = nullptr;
  Result (*event_record)(EventHandle event, StreamHandle stream) = nullptr;
  Result (*event_query)(EventHandle event) = nullptr;
  Result (*event_synchronize)(EventHandle event) = nullptr;
  Result (*copy_to_device)(Address to, const void* from, std::size_t bytes, StreamHandle stream) = nullptr;
  Result (*copy_to_host)(void* to, Address from, std::size_t bytes, StreamHandle stream) = nullptr;
  Result (*copy_in_device)(Address to, Address from, std::size_t bytes, StreamHandle stream) = nullptr;
  Result (*address_range)(Address* base, std::size_t* bytes, Address address) = nullptr;
  Result (*host_register)(void* memory, std::size_t bytes, unsigned flags) = nullptr;
  Result (*host_unregister)(void* memory) = nullptr;
  // cuMemcpyBatchAsync as CUDA 12.8 had it (13.0 dropped `failed`); null when the driver is older than that.
  Result (*copy_batch)(Address* to, Address* from, std::size_t* bytes, std::size_t count, CopyAttributes* attributes,
                       std::size_t* attribute_starts, std::size_t attribute_count, std::size_t* failed,
                       StreamHandle stream) = nullptr;

  // "CUDA_ERROR_OUT_OF_MEMORY (2)"
  std::string name_of(Result result) const;
  // Throws std::runtime_error that names the call and the driver's error, unless it succeeded.
  void check(Result result, const char* call) const;
};

// Loads `library`, or libcuda.so.1 when empty, for good, and starts the driver. Throws std::runtime_error that says why
// when the library, a function other than copy_batch, or a GPU is missing.
std::shared_ptr<const Api> load(const std::string& library);

}  // namespace longlive::bank::driver
