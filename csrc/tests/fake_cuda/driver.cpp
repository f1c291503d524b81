// A stand-in for libcuda.so.1: the driver's functions that the bank uses, over the machine in machine.h. Build:
// c++ -std=c++17 -O1 -g -shared -fPIC driver.cpp controls.cpp machine.cpp -o libcuda.so.1
#include <cstring>

#include "machine.h"

using namespace fake;

namespace {

int entered(Machine& m) {
  if (m.option("shut_down") != 0) return kDeinitialized;
  return context_depth > 0 ? kSuccess : kInvalidContext;
}

// What a thread that did not relax its mode must not call while anything is captured.
int allowed(Machine& m, const char* call) {
  if (!m.captures() || capture_mode == 2) return kSuccess;
  m.violation(std::string(call) + " invalidates a capture");
  return kCaptureUnsupported;
}

#define RETURN_UNLESS_OK(call)                                        \
  do {                                                                \
    if (const int result = (call); result != kSuccess) return result; \
  } while (false)

int single_copy(std::uintptr_t to, std::uintptr_t from, std::size_t bytes, Handle stream, bool host_to,
                bool host_from) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  ++m.counts[host_to ? "d2h" : host_from ? "h2d" : "d2d"];
  return m.enqueue_copy(stream, {{to, from, bytes}}, host_to, host_from);
}

struct Location {
  int type, id;
};
struct Attributes {
  int source_order;
  Location source, destination;
  unsigned flags;
};

}  // namespace

API int cuInit(unsigned flags) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  return flags != 0 ? kInvalidValue : static_cast<int>(m.option("init_result"));
}

API int cuGetErrorName(int error, const char** name) {
  *name = name_of(error);
  if (**name != '\0') return kSuccess;
  *name = nullptr;
  return kInvalidValue;
}

API int cuDeviceGet(int* device, int ordinal) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  if (ordinal < 0 || ordinal >= m.option("devices")) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

API int cuDeviceGetAttribute(int* value, int attribute, int) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  if (attribute != 91) return kInvalidValue;
  *value = static_cast<int>(m.option("host_pointers"));
  return kSuccess;
}

API int cuDevicePrimaryCtxRetain(Handle* context, int device) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  ++m.contexts;
  *context = 0xC0 + static_cast<Handle>(device);
  return kSuccess;
}

API int cuDevicePrimaryCtxRelease_v2(int) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  if (m.option("shut_down") != 0) return kDeinitialized;
  if (--m.contexts < 0) m.violation("a context was released too often");
  return kSuccess;
}

API int cuCtxPushCurrent_v2(Handle context) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  if (m.option("shut_down") != 0) return kDeinitialized;
  if (context < 0xC0 || m.contexts <= 0) return kInvalidContext;
  ++context_depth;
  return kSuccess;
}

API int cuCtxPopCurrent_v2(Handle* context) {
  if (context_depth == 0) return kInvalidContext;
  --context_depth;
  if (context != nullptr) *context = 0xC0;
  return kSuccess;
}

API int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return kSuccess;
}

API int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return kSuccess;
}

API int cuStreamCreateWithPriority(Handle* stream, unsigned flags, int) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  *stream = m.next_handle += 16;
  m.streams[*stream].blocking = flags != 1;
  return kSuccess;
}

API int cuStreamDestroy_v2(Handle stream) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  const auto found = m.streams.find(stream);
  if (found == m.streams.end() || stream == 0) return kInvalidHandle;
  if (!found->second.queue.empty()) m.violation("a stream was destroyed with work pending");
  m.streams.erase(found);
  return kSuccess;
}

API int cuStreamSynchronize(Handle stream) {
  Machine& m = machine();
  Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  RETURN_UNLESS_OK(allowed(m, "cuStreamSynchronize"));
  const auto found = m.streams.find(stream);
  if (found != m.streams.end() && found->second.capturing) {
    m.violation("cuStreamSynchronize of a stream being captured invalidates the capture");
    return kCaptureUnsupported;
  }
  return m.finish_stream(hold, stream);
}

API int cuStreamWaitEvent(Handle stream, Handle event, unsigned) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  const auto found = m.events.find(event);
  if (found == m.events.end()) return kInvalidHandle;
  if (found->second == nullptr) return kSuccess;
  Operation operation;
  operation.kind = Operation::kWait;
  operation.mark = found->second;
  return m.enqueue(stream, std::move(operation));
}

API int cuStreamIsCapturing(Handle stream, int* status) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  const auto found = m.streams.find(stream);
  if (found == m.streams.end()) return kInvalidHandle;
  if (stream == 0) {
    for (const auto& [other, state] : m.streams) {
      if (other != 0 && state.blocking && state.capturing) return kCaptureImplicit;
    }
  }
  *status = found->second.capturing ? 1 : 0;
  return kSuccess;
}

API int cuEventCreate(Handle* event, unsigned flags) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  if ((flags & 2) == 0) m.violation("an event with timing");
  *event = m.next_handle += 16;
  m.events[*event] = nullptr;
  ++m.counts["events_made"];
  return kSuccess;
}

API int cuEventDestroy_v2(Handle event) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  return m.events.erase(event) == 1 ? kSuccess : kInvalidHandle;
}

API int cuEventRecord(Handle event, Handle stream) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  const auto found = m.events.find(event);
  if (found == m.events.end()) return kInvalidHandle;
  Operation operation;
  operation.mark = std::make_shared<Mark>();
  found->second = operation.mark;
  return m.enqueue(stream, std::move(operation));
}

API int cuEventQuery(Handle event) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  RETURN_UNLESS_OK(allowed(m, "cuEventQuery"));
  const auto found = m.events.find(event);
  if (found == m.events.end()) return kInvalidHandle;
  if (found->second == nullptr) return kSuccess;
  if (found->second->captured) return kCapturedEvent;
  for (std::int64_t left = m.option("query_steps"); left > 0 && m.step(); --left) continue;
  if (const std::int64_t left = m.option("not_ready"); left > 0) {
    m.set("not_ready", left - 1);
    return kNotReady;
  }
  return found->second->done ? kSuccess : kNotReady;
}

API int cuEventSynchronize(Handle event) {
  Machine& m = machine();
  Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  RETURN_UNLESS_OK(allowed(m, "cuEventSynchronize"));
  const auto found = m.events.find(event);
  if (found == m.events.end()) return kInvalidHandle;
  const MarkRef mark = found->second;
  if (mark == nullptr) return kSuccess;
  return mark->captured ? kCapturedEvent : m.finish(hold, mark);
}

API int cuMemcpyHtoDAsync_v2(std::uintptr_t to, const void* from, std::size_t bytes, Handle stream) {
  return single_copy(to, reinterpret_cast<std::uintptr_t>(from), bytes, stream, false, true);
}
API int cuMemcpyDtoHAsync_v2(void* to, std::uintptr_t from, std::size_t bytes, Handle stream) {
  return single_copy(reinterpret_cast<std::uintptr_t>(to), from, bytes, stream, true, false);
}
API int cuMemcpyDtoDAsync_v2(std::uintptr_t to, std::uintptr_t from, std::size_t bytes, Handle stream) {
  return single_copy(to, from, bytes, stream, false, false);
}

API int cuMemcpyBatchAsync(std::uintptr_t* to, std::uintptr_t* from, std::size_t* bytes, std::size_t count,
                           Attributes* attributes, std::size_t* starts, std::size_t attribute_count,
                           std::size_t* failed, Handle stream) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  ++m.counts["batches"];
  if (const auto result = static_cast<int>(m.option("batch_result")); result != kSuccess) {
    if (m.option("batch_failed") >= 0) *failed = static_cast<std::size_t>(m.option("batch_failed"));
    return result;
  }
  const auto found = m.streams.find(stream);
  if (found == m.streams.end()) return kInvalidHandle;
  // As the driver: the capture goes on, without the copies.
  if (found->second.capturing) return kCaptureUnsupported;
  if (stream == 0 && m.option("batch_stream0") == 0) return kInvalidValue;
  if (count == 0 || attribute_count != 1 || starts[0] != 0) return kInvalidValue;
  if (attributes->source_order != 1) m.violation("a batch whose sources are not read in stream order");
  m.counts["batch_flags"] = attributes->flags;
  std::vector<Part> parts;
  for (std::size_t i = 0; i < count; ++i) {
    parts.push_back({to[i], from[i], bytes[i]});
    if (m.option("host_pointers") == 0) m.violation("a batch faults on the host's addresses");
    if (!m.registered(to[i]) && !m.registered(from[i])) m.violation("a batch copies memory that is not registered");
  }
  return m.enqueue_copy(stream, std::move(parts), false, false);
}

// Of CUDA 13: one argument less. Who is given this one has asked for the wrong version.
API int cuMemcpyBatchAsync_v2(std::uintptr_t*, std::uintptr_t*, std::size_t*, std::size_t, Attributes*, std::size_t*,
                              std::size_t, Handle) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  m.violation("the batch call of another version");
  return kUnknown;
}

API int cuMemGetAddressRange_v2(std::uintptr_t* base, std::size_t* bytes, std::uintptr_t address) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  // Undeclared device memory counts as one allocation with everything up to its declared neighbours.
  *base = 1;
  std::uintptr_t end = UINTPTR_MAX;
  for (const auto& [begin, range] : m.ranges) {
    if (address >= range.end) *base = range.end;
    if (address >= begin && address < range.end) *base = begin;
    if (address < begin || address < range.end) {
      end = address < begin ? begin : range.end;
      break;
    }
  }
  *bytes = end - *base;
  return kSuccess;
}

API int cuMemHostRegister_v2(void* memory, std::size_t bytes, unsigned flags) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  RETURN_UNLESS_OK(allowed(m, "cuMemHostRegister"));
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  if (memory == nullptr || bytes == 0 || (flags & 1) == 0) return kInvalidValue;
  const std::int64_t oom = m.option("register_oom");
  if (++m.counts["register_calls"] >= oom && oom > 0) return kOutOfMemory;
  for (const auto& [start, range] : m.ranges) {
    if (begin < range.end && start < begin + bytes) return kAlreadyRegistered;
  }
  m.ranges[begin] = {begin + bytes, true};
  return kSuccess;
}

API int cuMemHostUnregister(void* memory) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  RETURN_UNLESS_OK(entered(m));
  RETURN_UNLESS_OK(allowed(m, "cuMemHostUnregister"));
  const auto found = m.ranges.find(reinterpret_cast<std::uintptr_t>(memory));
  if (found == m.ranges.end() || !found->second.host) return kNotRegistered;
  if (m.touching(found->first, found->second.end, true) > 0) {
    m.violation("host memory was unregistered while a copy of it was pending");
  }
  m.ranges.erase(found);
  return kSuccess;
}

API int cuGetProcAddress_v2(const char* name, void** found, int version, std::uint64_t flags, int* status) {
  struct Entry {
    const char* name;
    int version;
    void* function;
  };
#define ENTRY(name, version, function) {#name, version, reinterpret_cast<void*>(function)}
  static const Entry kEntries[] = {
      ENTRY(cuInit, 2000, cuInit),
      ENTRY(cuGetErrorName, 6000, cuGetErrorName),
      ENTRY(cuDeviceGet, 2000, cuDeviceGet),
      ENTRY(cuDeviceGetAttribute, 2000, cuDeviceGetAttribute),
      ENTRY(cuDevicePrimaryCtxRetain, 7000, cuDevicePrimaryCtxRetain),
      ENTRY(cuDevicePrimaryCtxRelease, 11000, cuDevicePrimaryCtxRelease_v2),
      ENTRY(cuCtxPushCurrent, 4000, cuCtxPushCurrent_v2),
      ENTRY(cuCtxPopCurrent, 4000, cuCtxPopCurrent_v2),
      ENTRY(cuCtxGetStreamPriorityRange, 5050, cuCtxGetStreamPriorityRange),
      ENTRY(cuThreadExchangeStreamCaptureMode, 10010, cuThreadExchangeStreamCaptureMode),
      ENTRY(cuStreamCreateWithPriority, 5050, cuStreamCreateWithPriority),
      ENTRY(cuStreamDestroy, 4000, cuStreamDestroy_v2),
      ENTRY(cuStreamSynchronize, 2000, cuStreamSynchronize),
      ENTRY(cuStreamWaitEvent, 3020, cuStreamWaitEvent),
      ENTRY(cuStreamIsCapturing, 10000, cuStreamIsCapturing),
      ENTRY(cuEventCreate, 2000, cuEventCreate),
      ENTRY(cuEventDestroy, 4000, cuEventDestroy_v2),
      ENTRY(cuEventRecord, 2000, cuEventRecord),
      ENTRY(cuEventQuery, 2000, cuEventQuery),
      ENTRY(cuEventSynchronize, 2000, cuEventSynchronize),
      ENTRY(cuMemcpyHtoDAsync, 3020, cuMemcpyHtoDAsync_v2),
      ENTRY(cuMemcpyDtoHAsync, 3020, cuMemcpyDtoHAsync_v2),
      ENTRY(cuMemcpyDtoDAsync, 3020, cuMemcpyDtoDAsync_v2),
      ENTRY(cuMemGetAddressRange, 3020, cuMemGetAddressRange_v2),
      ENTRY(cuMemHostRegister, 6050, cuMemHostRegister_v2),
      ENTRY(cuMemHostUnregister, 4000, cuMemHostUnregister),
      ENTRY(cuMemcpyBatchAsync, 12080, cuMemcpyBatchAsync),
      ENTRY(cuMemcpyBatchAsync, 13000, cuMemcpyBatchAsync_v2),
  };
  Machine& m = machine();
  const Hold hold(m.mutex);
  *found = nullptr;
  if (flags == 2) m.violation("functions for a default stream of each thread");
  for (const Entry& entry : kEntries) {
    if (m.option("proc_address") == 0 || std::strcmp(entry.name, name) != 0) continue;
    if (entry.version <= version && entry.version <= m.option("driver_version")) *found = entry.function;
  }
  if (status != nullptr) *status = *found != nullptr ? 0 : 1;
  return *found != nullptr ? kSuccess : kNotFound;
}
