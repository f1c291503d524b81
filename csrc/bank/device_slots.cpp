#include "bank/device_slots.h"

#include <algorithm>

namespace longlive::bank {

namespace {

// A later point of a stream lies behind the earlier one.
void add(std::vector<StreamPoint>& points, const StreamPoint& point) {
  for (StreamPoint& mark : points) {
    if (mark.stream != point.stream) continue;
    mark.point = point.point;
    return;
  }
  points.push_back(point);
}

}  // namespace

bool reached(Device& device, EventRef& point) noexcept {
  if (!point) return true;
  try {
    if (!device.done(point)) return false;
  } catch (...) {
    return false;
  }
  point.reset();
  return true;
}

void prune(Device& device, std::vector<StreamPoint>& points) noexcept {
  const auto past = [&](StreamPoint& mark) { return reached(device, mark.point); };
  points.erase(std::remove_if(points.begin(), points.end(), past), points.end());
}

DeviceSlots::DeviceSlots(const SlotGeometry& geometry) : geometry_(geometry) {
  if (geometry.count == 0) return;
  table_.emplace(geometry.count, geometry.first);
  states_.resize(static_cast<std::size_t>(geometry.count));
  // so that drop() cannot fail for want of memory
  for (State& state : states_) state.marks.reserve(4);
}

bool DeviceSlots::fit(const std::vector<Frame>& frames) const {
  std::vector<Frame> distinct(frames);
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  std::int64_t absent = 0, kept = 0;
  for (const Frame frame : distinct) {
    if (lookup(frame) < 0) {
      ++absent;
    } else if (pins(frame) == 0) {
      ++kept;
    }
  }
  return absent <= capacity() - pinned_ - kept;
}

void DeviceSlots::pin(Frame frame, Stream stream) {
  State& held = state(table_->lookup(frame));
  add_reader(held, stream);
  if (table_->pin(frame) == 1) ++pinned_;
}

// With room for its mark, so that unmarked() cannot fail for want of memory.
void DeviceSlots::add_reader(State& held, Stream stream) {
  if (std::find(held.readers.begin(), held.readers.end(), stream) != held.readers.end()) return;
  held.marks.reserve(held.marks.size() + held.readers.size() + 2);  // and for one that fills it
  held.readers.push_back(stream);
}

void DeviceSlots::read_by(Stream stream) {
  if (pinned_ == 0) return;
  for (State& held : states_) {
    if (!held.readers.empty()) add_reader(held, stream);  // else not pinned
  }
}

bool DeviceSlots::pinned_fill(const EventRef& point) const {
  return std::any_of(states_.begin(), states_.end(),
                     [&](const State& held) { return !held.readers.empty() && held.filled == point; });
}

void DeviceSlots::expect_release(Frame frame) {
  const Slot slot = lookup(frame);
  if (slot >= 0) state(slot).released.reserve(state(slot).released.size() + 1);
}

void DeviceSlots::release(Device& device, Frame frame, const StreamPoint& point,
                          std::vector<StreamPoint>& others) noexcept {
  const Slot slot = lookup(frame);
  if (slot < 0) return;
  add(state(slot).released, point);
  if (table_->pins(frame) == 1) mark_readers(device, slot, &point.stream, others);
  unpin(frame);
}

// Where the streams that may read the slot are now; `but` has been marked. `points` are those of this call so far.
void DeviceSlots::mark_readers(Device& device, Slot slot, const Stream* but,
                               std::vector<StreamPoint>& points) noexcept {
  State& held = state(slot);
  for (const Stream stream : held.readers) {
    if (but != nullptr && stream == *but) continue;
    try {
      // A point in a graph that is being captured is none that copies outside of it could wait for.
      if (device.capturing(stream)) {
        unmarked(slot, stream);
        continue;
      }
      auto known = std::find_if(points.begin(), points.end(),
                                [&](const StreamPoint& mark) { return mark.stream == stream; });
      if (known == points.end()) known = points.insert(points.end(), {stream, device.record(stream)});
      add(held.released, *known);
    } catch (...) {
      unmarked(slot, stream);
    }
  }
}

void DeviceSlots::unpin(Frame frame) noexcept {
  if (table_->pins(frame) == 0 || table_->unpin(frame) > 0) return;
  --pinned_;
  state(table_->lookup(frame)).readers.clear();
}

void DeviceSlots::drop(Device& device, Frame frame) noexcept {
  const Slot slot = lookup(frame);
  if (slot < 0) return;
  State& held = state(slot);
  if (table_->pins(frame) > 0) {
    --pinned_;
    while (table_->pins(frame) > 0) table_->unpin(frame);
    std::vector<StreamPoint> points;
    mark_readers(device, slot, nullptr, points);
  }
  held.readers.clear();
  table_->release(frame);
}

void DeviceSlots::unmarked(Slot slot, Stream stream) noexcept {
  State& held = state(slot);
  if (std::find(held.marks.begin(), held.marks.end(), stream) != held.marks.end()) return;
  held.marks.push_back(stream);
}

void DeviceSlots::begin(Slot slot, const StreamPoint& point) {
  state(slot).released.push_back(point);
  state(slot).fresh = false;
}

void DeviceSlots::collect(Device& device, Slot slot, std::vector<EventRef>& points) {
  State& held = state(slot);
  while (!held.marks.empty()) {
    const Stream stream = held.marks.back();
    held.released.reserve(held.released.size() + 1);
    held.released.push_back({stream, device.record(stream)});
    held.marks.pop_back();
  }
  prune(device, held.released);
  for (const StreamPoint& mark : held.released) points.push_back(mark.point);
  if (!reached(device, held.filled)) points.push_back(held.filled);
}

}  // namespace longlive::bank
