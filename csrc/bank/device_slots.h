// Device slots: which frame each holds (SlotTable), and what must be over before one is filled again.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "bank/device.h"
#include "bank/page_layout.h"
#include "slot_table.h"

namespace longlive::bank {

struct StreamPoint {
  Stream stream = 0;
  EventRef point;
};

// Forgets the points that have been reached. A device that cannot say keeps them.
void prune(Device& device, std::vector<StreamPoint>& points) noexcept;
// Whether the point has been reached; it is forgotten then. False when the device cannot say.
bool reached(Device& device, EventRef& point) noexcept;

// Not thread-safe: the bank serialises the calls.
class DeviceSlots {
 public:
  explicit DeviceSlots(const SlotGeometry& geometry);

  std::int64_t capacity() const { return geometry_.count; }
  std::int64_t held() const { return table_ ? static_cast<std::int64_t>(table_->size()) : 0; }
  std::int64_t free() const { return capacity() - held(); }
  Slot lookup(Frame frame) const { return table_ ? table_->lookup(frame) : -1; }
  std::int64_t pins(Frame frame) const { return table_ ? table_->pins(frame) : 0; }

  // Whether slots can be had for all these frames at once, beside what is pinned.
  bool fit(const std::vector<Frame>& frames) const;
  // As SlotTable::acquire_many.
  std::vector<SlotTable::Acquired> acquire(const std::vector<Frame>& frames) { return table_->acquire_many(frames); }
  // One more pin, of a reader on `stream`.
  void pin(Frame frame, Stream stream);
  // `stream` has waited for copies, so that it may read whatever is pinned.
  void read_by(Stream stream);
  // `point`: where `stream` has read the slot for the last time. Takes back a pin, if there is one; with the last, where
  // other readers are now becomes a condition of the next use; `others` keeps these points, for further frames. The two
  // halves: what can fail, and what cannot.
  void expect_release(Frame frame);
  void release(Device& device, Frame frame, const StreamPoint& point, std::vector<StreamPoint>& others) noexcept;
  void unpin(Frame frame) noexcept;
  // The frame loses its slot, pinned or not. Points on the streams that may read it become conditions of the next use.
  void drop(Device& device, Frame frame) noexcept;

  // Copies into a slot: what they must wait for, and where they end.
  void collect(Device& device, Slot slot, std::vector<EventRef>& points);
  void filling(Slot slot, const EventRef& point) noexcept {
    state(slot).filled = point;
    state(slot).fresh = false;
  }
  // Whether the copies that end at this point brought a frame that is pinned now.
  bool pinned_fill(const EventRef& point) const;
  // Copies into a slot that may be under way on `stream`, without a point.
  void unmarked(Slot slot, Stream stream) noexcept;
  // A slot's memory was written, before the bank had it, by work on some stream; `point` is the caller's word for it.
  bool fresh(Slot slot) const { return states_[index(slot)].fresh; }
  void begin(Slot slot, const StreamPoint& point);
  bool filled(Device& device, Slot slot) noexcept { return reached(device, state(slot).filled); }

  std::uintptr_t address(std::size_t segment, std::int64_t layer, std::int64_t sample, Slot slot) const {
    const SlotGeometry::Part& part = geometry_.parts[segment];
    return part.base + static_cast<std::uintptr_t>(layer * part.layer_stride + sample * part.sample_stride +
                                                   slot * part.slot_stride);
  }

 private:
  struct State {
    EventRef filled;                    // the last copy into it
    std::vector<StreamPoint> released;  // the last reads, one a stream
    std::vector<Stream> readers;        // while pinned: streams that pinned it, or waited for copies since
    std::vector<Stream> marks;          // streams whose work up to now must end first, but could not be marked
    bool fresh = true;
  };
  static void add_reader(State& held, Stream stream);
  void mark_readers(Device& device, Slot slot, const Stream* but, std::vector<StreamPoint>& points) noexcept;
  std::size_t index(Slot slot) const { return static_cast<std::size_t>(slot - geometry_.first); }
  State& state(Slot slot) { return states_[index(slot)]; }

  SlotGeometry geometry_;
  std::optional<SlotTable> table_;  // none for no slots
  std::vector<State> states_;
  std::int64_t pinned_ = 0;         // frames with pins
};

}  // namespace longlive::bank
