#include "bank/cuda_context.h"

#include <stdexcept>
#include <string>

namespace longlive::bank {

using driver::EventHandle;
using driver::Result;

CudaContext::Scope::Scope(const CudaContext& context) : api_(*context.api_) {
  pushed_ = api_.context_push(context.handle_);
  if (pushed_ == driver::kSuccess) relaxed_ = api_.exchange_capture_mode(&mode_) == driver::kSuccess;
}

CudaContext::Scope::~Scope() {
  if (relaxed_) api_.exchange_capture_mode(&mode_);
  driver::Context popped = nullptr;
  if (pushed_ == driver::kSuccess) api_.context_pop(&popped);
}

CudaContext::Entered::Entered(const CudaContext& context) : Scope(context) {
  context.api_->check(result(), "cuCtxPushCurrent");
}

CudaContext::CudaContext(std::shared_ptr<const driver::Api> api, int ordinal) : api_(std::move(api)) {
  const Result found = api_->device_get(&device_, ordinal);
  if (found != driver::kSuccess) {
    throw std::runtime_error("ordinal " + std::to_string(ordinal) + ": cuDeviceGet failed: " + api_->name_of(found));
  }
  api_->check(api_->primary_retain(&handle_, device_), "cuDevicePrimaryCtxRetain");
}

CudaContext::~CudaContext() {
  {
    const Scope scope(*this);
    for (const EventHandle event : idle_) {
      if (scope.result() == driver::kSuccess) api_->event_destroy(event);
    }
  }
  api_->primary_release(device_);
}

EventHandle CudaContext::take_event() {
  {
    const std::lock_guard<std::mutex> hold(mutex_);
    if (!idle_.empty()) {
      const EventHandle event = idle_.back();
      idle_.pop_back();
      return event;
    }
    // Giving one back must not need memory: it happens in destructors.
    if (++events_ > idle_.capacity()) idle_.reserve(2 * events_);
  }
  EventHandle event = nullptr;
  api_->check(api_->event_create(&event, driver::kEventDisableTiming | driver::kEventBlockingSync), "cuEventCreate");
  return event;
}

void CudaContext::give_event(EventHandle event) noexcept {
  const std::lock_guard<std::mutex> hold(mutex_);
  idle_.push_back(event);
}

EventHandle handle_of(const EventRef& event) {
  const auto* ours = dynamic_cast<const CudaEvent*>(event.get());
  if (ours == nullptr) throw std::invalid_argument("event: made by another kind of device");
  return ours->handle();
}

}  // namespace longlive::bank
