// What the bank needs of a device: ordered copies, marks in the order of work, page-locked memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace longlive::bank {

// A compute stream as the caller's framework numbers it (a CUstream); 0 is the default stream. Never destroyed here.
using Stream = std::uintptr_t;

// A point in the order of work on some stream. A null pointer is a point that has been reached. The last owner gives
// the device's event back.
class Event {
 public:
  virtual ~Event() = default;
};
using EventRef = std::shared_ptr<Event>;

struct Copy {
  std::uintptr_t to = 0;
  std::uintptr_t from = 0;
  std::int64_t bytes = 0;
};

enum class Direction { kToHost, kToDevice };

struct DeviceStats {
  std::int64_t copies = 0;            // descriptors, after runs that are contiguous on both sides were joined
  std::int64_t batches = 0;           // calls of the driver's batch copy
  std::int64_t copy_loops = 0;        // batches that went out as a loop of single copies instead
  std::string copy_loop_reason;       // why, "" when none did
};

// Thread-safe. Throws std::runtime_error (what the driver said, and in which call) when the driver refuses.
class Device {
 public:
  virtual ~Device() = default;

  // The point after everything enqueued on `stream` so far.
  virtual EventRef record(Stream stream) = 0;
  // What is enqueued on `stream` from now on waits for `event`.
  virtual void wait(Stream stream, const EventRef& event) = 0;
  // Enqueues on the device's own queue of that direction: after all of `after`, and after earlier copies of that
  // direction, the copies, which are unordered among themselves and do not overlap. Returns the point where they are
  // done. Neither vector is needed once the call returns.
  virtual EventRef copy(Direction direction, const std::vector<Copy>& copies, const std::vector<EventRef>& after) = 0;
  // Copies within the device, ordered on the compute stream.
  virtual void copy_on(Stream stream, const std::vector<Copy>& copies) = 0;

  virtual bool done(const EventRef& event) = 0;
  virtual void synchronize(const EventRef& event) = 0;  // the host waits
  virtual bool capturing(Stream stream) = 0;            // a CUDA graph is being recorded from it

  // Page-locks memory for asynchronous copies. False when that is refused, with the reason; nothing is locked then.
  virtual bool lock(void* memory, std::size_t bytes, std::string* reason) = 0;
  virtual void unlock(void* memory) noexcept = 0;

  virtual DeviceStats stats() const = 0;
};

// Copies at once, in the calling thread; every point is reached when the call that makes it returns.
std::unique_ptr<Device> make_host_device();

// Through the driver library (`library`, or libcuda.so.1 when empty), found at run time, in the primary context of
// device `ordinal`. Throws std::runtime_error that says why when there is none.
std::unique_ptr<Device> make_cuda_device(int ordinal, const std::string& library);

}  // namespace longlive::bank
