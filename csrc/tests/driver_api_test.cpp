// The driver's interface as declared by hand, against NVIDIA's header where there is one; and how functions are found.
#include <cstddef>
#include <stdexcept>
#include <type_traits>

#include "bank/driver_api.h"
#include "stand_in.h"
#include "test_case.h"

#if __has_include(<cudaTypedefs.h>)
#include <cudaTypedefs.h>
#endif

namespace driver = longlive::bank::driver;

#ifdef CUDA_VERSION
namespace {

// NVIDIA's types in our words: an enumeration is an int, its pointer an int*.
template <typename T, typename = void>
struct Plain {
  using type = T;
};
template <typename T>
struct Plain<T, std::enable_if_t<std::is_enum_v<T>>> {
  static_assert(sizeof(T) == sizeof(int));
  using type = int;
};
template <typename T>
struct Plain<T*, std::enable_if_t<std::is_enum_v<T>>> {
  using type = int*;
};
template <>
struct Plain<CUmemcpyAttributes_v1*> {
  using type = driver::CopyAttributes*;
};
template <typename R, typename... A>
struct Plain<R (*)(A...)> {
  using type = typename Plain<R>::type (*)(typename Plain<A>::type...);
};

#define SAME(member, theirs) \
  static_assert(std::is_same_v<decltype(driver::Api::member), Plain<theirs>::type>, #theirs)
SAME(init, PFN_cuInit_v2000);
SAME(error_name, PFN_cuGetErrorName_v6000);
SAME(device_get, PFN_cuDeviceGet_v2000);
SAME(device_attribute, PFN_cuDeviceGetAttribute_v2000);
SAME(primary_retain, PFN_cuDevicePrimaryCtxRetain_v7000);
SAME(primary_release, PFN_cuDevicePrimaryCtxRelease_v11000);
SAME(context_push, PFN_cuCtxPushCurrent_v4000);
SAME(context_pop, PFN_cuCtxPopCurrent_v4000);
SAME(priority_range, PFN_cuCtxGetStreamPriorityRange_v5050);
SAME(exchange_capture_mode, PFN_cuThreadExchangeStreamCaptureMode_v10010);
SAME(stream_create, PFN_cuStreamCreateWithPriority_v5050);
SAME(stream_destroy, PFN_cuStreamDestroy_v4000);
SAME(stream_synchronize, PFN_cuStreamSynchronize_v2000);
SAME(stream_wait_event, PFN_cuStreamWaitEvent_v3020);
SAME(stream_is_capturing, PFN_cuStreamIsCapturing_v10000);
SAME(event_create, PFN_cuEventCreate_v2000);
SAME(event_destroy, PFN_cuEventDestroy_v4000);
SAME(event_record, PFN_cuEventRecord_v2000);
SAME(event_query, PFN_cuEventQuery_v2000);
SAME(event_synchronize, PFN_cuEventSynchronize_v2000);
SAME(copy_to_device, PFN_cuMemcpyHtoDAsync_v3020);
SAME(copy_to_host, PFN_cuMemcpyDtoHAsync_v3020);
SAME(copy_in_device, PFN_cuMemcpyDtoDAsync_v3020);
SAME(address_range, PFN_cuMemGetAddressRange_v3020);
SAME(host_register, PFN_cuMemHostRegister_v6050);
SAME(host_unregister, PFN_cuMemHostUnregister_v4000);
#if CUDA_VERSION >= 12080
SAME(copy_batch, PFN_cuMemcpyBatchAsync_v12080);
static_assert(sizeof(driver::CopyAttributes) == sizeof(CUmemcpyAttributes_v1));
static_assert(offsetof(driver::CopyAttributes, source_order) == offsetof(CUmemcpyAttributes_v1, srcAccessOrder));
static_assert(offsetof(driver::CopyAttributes, source_hint) == offsetof(CUmemcpyAttributes_v1, srcLocHint));
static_assert(offsetof(driver::CopyAttributes, destination_hint) == offsetof(CUmemcpyAttributes_v1, dstLocHint));
static_assert(offsetof(driver::CopyAttributes, flags) == offsetof(CUmemcpyAttributes_v1, flags));
static_assert(sizeof(driver::Location) == sizeof(CUmemLocation_v1));
static_assert(offsetof(driver::Location, id) == offsetof(CUmemLocation_v1, id));
static_assert(driver::kSourceInStreamOrder == CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
static_assert(driver::kPreferOverlapWithCompute == CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE);
#endif
static_assert(driver::kCanUseRegisteredHostPointer == CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM);
static_assert(driver::kSuccess == CUDA_SUCCESS);
static_assert(driver::kInvalidValue == CUDA_ERROR_INVALID_VALUE);
static_assert(driver::kDeinitialized == CUDA_ERROR_DEINITIALIZED);
static_assert(driver::kNotReady == CUDA_ERROR_NOT_READY);
static_assert(driver::kNotSupported == CUDA_ERROR_NOT_SUPPORTED);
static_assert(driver::kCaptureUnsupported == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
static_assert(driver::kCaptureImplicit == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
static_assert(driver::kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(driver::kEventBlockingSync == CU_EVENT_BLOCKING_SYNC);
static_assert(driver::kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(driver::kHostRegisterPortable == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(driver::kCaptureStatusNone == CU_STREAM_CAPTURE_STATUS_NONE);
static_assert(driver::kCaptureModeRelaxed == CU_STREAM_CAPTURE_MODE_RELAXED);

}  // namespace
#endif

TEST_CASE(every_function_is_found_in_its_version) {
  const StandIn fresh;
  const auto api = driver::load(LONGLIVE_FAKE_CUDA);
  CHECK(api->copy_batch != nullptr);
  CHECK(api->name_of(2) == "CUDA_ERROR_OUT_OF_MEMORY (2)");
  CHECK(api->name_of(12345) == "CUDA error 12345");
  api->check(driver::kSuccess, "cuNothing");
  CHECK_THROWS(std::runtime_error, "cuSomething failed: CUDA_ERROR_NOT_READY (600)", api->check(600, "cuSomething"));
}

TEST_CASE(an_old_driver_has_no_batch_copy) {
  StandIn fake;
  fake.set("driver_version", 12040);
  CHECK(driver::load(LONGLIVE_FAKE_CUDA)->copy_batch == nullptr);
  fake.set("driver_version", 12080);
  CHECK(driver::load(LONGLIVE_FAKE_CUDA)->copy_batch != nullptr);
}

TEST_CASE(exported_functions_do_without_versions) {
  StandIn fake;
  fake.set("proc_address", 0);
  const auto api = driver::load(LONGLIVE_FAKE_CUDA);
  CHECK(api->copy_batch == nullptr);
  CHECK(api->name_of(1) == "CUDA_ERROR_INVALID_VALUE (1)");
}

TEST_CASE(what_is_missing_is_named) {
  StandIn fake;
  CHECK_THROWS(std::runtime_error, "no-such-libcuda.so.1", driver::load("/no-such-libcuda.so.1"));
  // A library, but none of the driver's.
  CHECK_THROWS(std::runtime_error, "libm.so.6 has no cuInit", driver::load("libm.so.6"));
  fake.set("init_result", 100);
  CHECK_THROWS(std::runtime_error, "cuInit failed: CUDA_ERROR_NO_DEVICE (100)", driver::load(LONGLIVE_FAKE_CUDA));
}
