// The device through the CUDA driver: one non-blocking stream for each direction of copies.
#include <atomic>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "bank/copy_runs.h"
#include "bank/cuda_context.h"
#include "bank/device.h"
#include "bank/driver_api.h"

namespace longlive::bank {
namespace {

using driver::Api;
using driver::Result;
using driver::StreamHandle;

StreamHandle handle_of(Stream stream) { return reinterpret_cast<StreamHandle>(stream); }

class CudaDevice final : public Device {
 public:
  CudaDevice(int ordinal, const std::string& library)
      : context_(std::make_shared<CudaContext>(driver::load(library), ordinal)), api_(context_->api()) {
    const CudaContext::Entered scope(*context_);
    int least = 0, greatest = 0;
    if (api_.copy_batch == nullptr) {
      no_batch_ = "the driver has no cuMemcpyBatchAsync (CUDA 12.8)";
    } else if (int usable = 0; api_.device_attribute(&usable, driver::kCanUseRegisteredHostPointer,
                                                     context_->device()) != driver::kSuccess || usable == 0) {
      // Such a device (under WSL2, say) takes the host's address in single copies only; in a batch it faults, for good.
      no_batch_ = "the device does not reach page-locked memory by its address";
    }
    api_.check(api_.priority_range(&least, &greatest), "cuCtxGetStreamPriorityRange");
    // Somebody waits for what comes to the device; what leaves it has time.
    make_stream(&to_device_, greatest);
    try {
      make_stream(&to_host_, least);
    } catch (...) {
      api_.stream_destroy(to_device_);
      throw;
    }
  }

  ~CudaDevice() override {
    const CudaContext::Scope scope(*context_);
    if (scope.result() != driver::kSuccess) return;
    for (const StreamHandle stream : {to_device_, to_host_}) {
      // Memory that copies still use is about to go. There is nobody to tell of an error.
      api_.stream_synchronize(stream);
      api_.stream_destroy(stream);
    }
    for (const auto& [begin, end] : locked_) api_.host_unregister(reinterpret_cast<void*>(begin));
  }

  EventRef record(Stream stream) override {
    const CudaContext::Entered scope(*context_);
    return record_on(handle_of(stream));
  }

  void wait(Stream stream, const EventRef& event) override {
    if (event == nullptr) return;
    const CudaContext::Entered scope(*context_);
    wait_on(handle_of(stream), event);
  }

  EventRef copy(Direction direction, const std::vector<Copy>& copies, const std::vector<EventRef>& after) override {
    const CudaContext::Entered scope(*context_);
    const bool to_host = direction == Direction::kToHost;
    const StreamHandle stream = to_host ? to_host_ : to_device_;
    const MayJoin on_device = device_seams();
    std::vector<Copy> runs =
        to_host ? join_copies(copies, nullptr, on_device) : join_copies(copies, on_device, nullptr);
    const auto host_side = to_host ? &Copy::to : &Copy::from;
    bool locked = true;
    {
      const std::lock_guard<std::mutex> hold(lock_mutex_);
      runs = split_copies(runs, cuts_, host_side);
      for (const Copy& run : runs) locked = locked && is_locked(run.*host_side);
    }
    for (const EventRef& event : after) {
      if (event != nullptr) wait_on(stream, event);
    }
    const bool captured = is_capturing(stream);
    try {
      if (!runs.empty()) submit(direction, stream, runs, captured, locked);
      return record_on(stream);
    } catch (...) {
      // The caller gets no point to wait for, so nothing may stay under way.
      if (!captured) api_.stream_synchronize(stream);
      throw;
    }
  }

  void copy_on(Stream stream, const std::vector<Copy>& copies) override {
    const CudaContext::Entered scope(*context_);
    const MayJoin on_device = device_seams();
    // One at a time: within a device the batch call is slower, and takes neither stream 0 nor a stream being captured.
    const std::vector<Copy> runs = join_copies(copies, on_device, on_device);
    for (const Copy& run : runs) {
      api_.check(api_.copy_in_device(run.to, run.from, static_cast<std::size_t>(run.bytes), handle_of(stream)),
                 "cuMemcpyDtoDAsync");
    }
    count(runs.size(), 0, 0, nullptr);
  }

  bool done(const EventRef& event) override {
    if (event == nullptr) return true;
    const CudaContext::Entered scope(*context_);
    const Result result = api_.event_query(handle_of(event));
    if (result == driver::kNotReady) return false;
    api_.check(result, "cuEventQuery");
    return true;
  }

  void synchronize(const EventRef& event) override {
    if (event == nullptr) return;
    const CudaContext::Entered scope(*context_);
    api_.check(api_.event_synchronize(handle_of(event)), "cuEventSynchronize");
  }

  bool capturing(Stream stream) override {
    const CudaContext::Entered scope(*context_);
    return is_capturing(handle_of(stream));
  }

  bool lock(void* memory, std::size_t bytes, std::string* reason) override {
    const CudaContext::Entered scope(*context_);
    const Result result = api_.host_register(memory, bytes, driver::kHostRegisterPortable);
    if (result != driver::kSuccess) {
      if (reason != nullptr) *reason = "cuMemHostRegister failed: " + api_.name_of(result);
      return false;
    }
    const std::lock_guard<std::mutex> hold(lock_mutex_);
    const auto begin = reinterpret_cast<std::uintptr_t>(memory);
    locked_[begin] = begin + bytes;
    find_cuts();
    return true;
  }

  void unlock(void* memory) noexcept override {
    const CudaContext::Scope scope(*context_);
    if (scope.result() == driver::kSuccess) api_.host_unregister(memory);
    const std::lock_guard<std::mutex> hold(lock_mutex_);
    locked_.erase(reinterpret_cast<std::uintptr_t>(memory));
    find_cuts();
  }

  DeviceStats stats() const override {
    const std::lock_guard<std::mutex> hold(stats_mutex_);
    return stats_;
  }

 private:
  void make_stream(StreamHandle* stream, int priority) {
    api_.check(api_.stream_create(stream, driver::kStreamNonBlocking, priority), "cuStreamCreateWithPriority");
  }

  EventRef record_on(StreamHandle stream) {
    auto event = std::make_shared<CudaEvent>(context_);
    api_.check(api_.event_record(event->handle(), stream), "cuEventRecord");
    return event;
  }

  void wait_on(StreamHandle stream, const EventRef& event) {
    api_.check(api_.stream_wait_event(stream, handle_of(event), 0), "cuStreamWaitEvent");
  }

  bool is_capturing(StreamHandle stream) {
    int status = driver::kCaptureStatusNone;
    const Result result = api_.stream_is_capturing(stream, &status);
    // The legacy stream, while a stream that it synchronises with is captured: work on it would end that capture.
    if (result == driver::kCaptureImplicit) return true;
    api_.check(result, "cuStreamIsCapturing");
    return status != driver::kCaptureStatusNone;
  }

  // Allocations may be neighbours by chance; the driver refuses a copy that reaches from one into the next.
  MayJoin device_seams() const {
    return [this, base = driver::Address{0}, bytes = std::size_t{0}](std::uintptr_t seam) mutable {
      if (bytes == 0 || seam <= base || seam - base >= bytes) {
        if (api_.address_range(&base, &bytes, seam) != driver::kSuccess) bytes = 0;
      }
      return bytes != 0 && seam > base && seam - base < bytes;
    };
  }

  void submit(Direction direction, StreamHandle stream, const std::vector<Copy>& runs, bool captured, bool locked) {
    std::string reason;
    bool lasting = false;
    if (captured) {
      // The call would return an error, and the copies be missing from the graph.
      reason = "a CUDA graph is being captured";
    } else if (!no_batch_.empty()) {
      reason = no_batch_;
    } else if (!locked) {
      // Whether a batch takes other memory depends on the system; a single copy does everywhere.
      reason = "host memory is not page-locked";
    } else if (batch_refused_.load(std::memory_order_relaxed)) {
      reason = "";  // as said when it was refused
    } else {
      std::size_t failed = std::numeric_limits<std::size_t>::max();
      const Result result = batch(stream, runs, &failed);
      if (result == driver::kSuccess) {
        count(runs.size(), 1, 0, nullptr);
        return;
      }
      if (result != driver::kInvalidValue && result != driver::kNotSupported && result != driver::kCaptureUnsupported) {
        api_.check(result, "cuMemcpyBatchAsync");
      }
      reason = "cuMemcpyBatchAsync failed: " + api_.name_of(result);
      // One descriptor at fault says nothing about other batches.
      lasting = result == driver::kNotSupported ||
                (result == driver::kInvalidValue && failed == std::numeric_limits<std::size_t>::max());
      // Copying once more what the refused call may have enqueued changes nothing: same bytes, same order.
    }
    for (const Copy& run : runs) {
      const auto bytes = static_cast<std::size_t>(run.bytes);
      if (direction == Direction::kToHost) {
        api_.check(api_.copy_to_host(reinterpret_cast<void*>(run.to), run.from, bytes, stream), "cuMemcpyDtoHAsync");
      } else {
        api_.check(api_.copy_to_device(run.to, reinterpret_cast<const void*>(run.from), bytes, stream),
                   "cuMemcpyHtoDAsync");
      }
    }
    // Only now: single copies of the same bytes went through, so it was the batch call that was refused.
    if (lasting) batch_refused_.store(true, std::memory_order_relaxed);
    count(runs.size(), 0, 1, reason.empty() ? nullptr : &reason);
  }

  Result batch(StreamHandle stream, const std::vector<Copy>& runs, std::size_t* failed) const {
    std::vector<driver::Address> to, from;
    std::vector<std::size_t> bytes;
    to.reserve(runs.size());
    from.reserve(runs.size());
    bytes.reserve(runs.size());
    for (const Copy& run : runs) {
      to.push_back(run.to);
      from.push_back(run.from);
      bytes.push_back(static_cast<std::size_t>(run.bytes));
    }
    driver::CopyAttributes attributes;
    attributes.source_order = driver::kSourceInStreamOrder;
    attributes.flags = driver::kPreferOverlapWithCompute;
    std::size_t start = 0;
    return api_.copy_batch(to.data(), from.data(), bytes.data(), runs.size(), &attributes, &start, 1, failed, stream);
  }

  void count(std::size_t copies, int batches, int loops, const std::string* reason) {
    const std::lock_guard<std::mutex> hold(stats_mutex_);
    stats_.copies += static_cast<std::int64_t>(copies);
    stats_.batches += batches;
    stats_.copy_loops += loops;
    if (reason != nullptr) stats_.copy_loop_reason = *reason;
  }

  // Needs lock_mutex_. Whether a registration holds this address.
  bool is_locked(std::uintptr_t address) const {
    const auto after = locked_.upper_bound(address);
    return after != locked_.begin() && address < std::prev(after)->second;
  }

  // Needs lock_mutex_.
  void find_cuts() {
    cuts_.clear();
    for (const auto& [begin, end] : locked_) {
      if (cuts_.empty() || cuts_.back() != begin) cuts_.push_back(begin);
      cuts_.push_back(end);
    }
  }

  std::shared_ptr<CudaContext> context_;
  const Api& api_;
  StreamHandle to_device_ = nullptr;
  StreamHandle to_host_ = nullptr;
  std::string no_batch_;  // why the batch call is never tried, "" when it is
  std::atomic<bool> batch_refused_{false};
  std::mutex lock_mutex_;
  std::map<std::uintptr_t, std::uintptr_t> locked_;  // begin -> end
  std::vector<std::uintptr_t> cuts_;                 // where registrations begin and end
  mutable std::mutex stats_mutex_;
  DeviceStats stats_;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int ordinal, const std::string& library) {
  return std::make_unique<CudaDevice>(ordinal, library);
}

}  // namespace longlive::bank
