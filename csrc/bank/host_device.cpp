// The device of a machine without one: everything is host memory, every copy is done when the call returns.
#include <atomic>
#include <cstring>

#include "bank/copy_runs.h"
#include "bank/device.h"

namespace longlive::bank {
namespace {

class HostDevice final : public Device {
 public:
  EventRef record(Stream) override { return nullptr; }
  void wait(Stream, const EventRef&) override {}
  EventRef copy(Direction, const std::vector<Copy>& copies, const std::vector<EventRef>&) override {
    move(copies);
    return nullptr;
  }
  void copy_on(Stream, const std::vector<Copy>& copies) override { move(copies); }

  bool done(const EventRef&) override { return true; }
  void synchronize(const EventRef&) override {}
  bool capturing(Stream) override { return false; }

  bool lock(void*, std::size_t, std::string* reason) override {
    if (reason != nullptr) *reason = "a CPU device needs no page-locked memory";
    return false;
  }
  void unlock(void*) noexcept override {}

  DeviceStats stats() const override {
    DeviceStats stats;
    stats.copies = copies_.load(std::memory_order_relaxed);
    return stats;
  }

 private:
  void move(const std::vector<Copy>& copies) {
    const std::vector<Copy> runs = join_copies(copies, nullptr, nullptr);
    for (const Copy& run : runs) {
      // Slots and the window's pool may be one tensor: a copy onto itself is allowed, memcpy would make it undefined.
      std::memmove(reinterpret_cast<void*>(run.to), reinterpret_cast<const void*>(run.from),
                   static_cast<std::size_t>(run.bytes));
    }
    copies_.fetch_add(static_cast<std::int64_t>(runs.size()), std::memory_order_relaxed);
  }

  std::atomic<std::int64_t> copies_{0};
};

}  // namespace

std::unique_ptr<Device> make_host_device() { return std::make_unique<HostDevice>(); }

}  // namespace longlive::bank
