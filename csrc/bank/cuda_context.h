// The driver's primary context of a device, and the events made in it.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "bank/device.h"
#include "bank/driver_api.h"

namespace longlive::bank {

// The context that the framework uses too, and a pool of events. Owned by the device and by every event, for events may
// outlive the device.
class CudaContext {
 public:
  // Makes the context current in this thread while it lives, and lets calls pass that a CUDA graph's capture, in
  // whatever thread, would otherwise forbid (and be invalidated by): none of them touches what is captured.
  class Scope {
   public:
    explicit Scope(const CudaContext& context);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    // Whether the context could be made current: not once the driver has shut down, at the end of the process.
    driver::Result result() const { return pushed_; }

   private:
    const driver::Api& api_;
    driver::Result pushed_ = driver::kSuccess;
    bool relaxed_ = false;
    int mode_ = driver::kCaptureModeRelaxed;
  };
  // As Scope; throws std::runtime_error when the context cannot be made current.
  struct Entered : Scope {
    explicit Entered(const CudaContext& context);
  };

  // Throws std::runtime_error when there is no such device, or the driver makes no context.
  CudaContext(std::shared_ptr<const driver::Api> api, int ordinal);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  const driver::Api& api() const { return *api_; }
  int device() const { return device_; }

  // Needs the context to be current. Throws std::runtime_error.
  driver::EventHandle take_event();
  // May be pending: recording it anew does not change what a stream waits for already.
  void give_event(driver::EventHandle event) noexcept;

 private:
  std::shared_ptr<const driver::Api> api_;
  int device_ = 0;
  driver::Context handle_ = nullptr;
  std::mutex mutex_;
  std::size_t events_ = 0;  // made so far
  std::vector<driver::EventHandle> idle_;
};

class CudaEvent final : public Event {
 public:
  explicit CudaEvent(std::shared_ptr<CudaContext> context)
      : context_(std::move(context)), handle_(context_->take_event()) {}
  ~CudaEvent() override { context_->give_event(handle_); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;
  driver::EventHandle handle() const { return handle_; }

 private:
  std::shared_ptr<CudaContext> context_;
  driver::EventHandle handle_;
};

// Throws std::invalid_argument for a point that another kind of device made. Not null.
driver::EventHandle handle_of(const EventRef& event);

}  // namespace longlive::bank
