#include "slot_table.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace longlive {
namespace {

constexpr std::int64_t kMaxSlot = std::numeric_limits<SlotTable::Slot>::max();

void check_frame(SlotTable::Frame frame) {
  if (frame < 0) throw std::invalid_argument("frame must be >= 0, got " + std::to_string(frame));
}

}  // namespace

std::size_t SlotTable::checked_capacity(const char* name, std::int64_t capacity, std::int64_t first) {
  if (first < 0 || first > kMaxSlot) {
    throw std::invalid_argument("first must be in 0 .. " + std::to_string(kMaxSlot) + ", got " + std::to_string(first));
  }
  const std::int64_t most = std::min(kMaxSlot, kMaxSlot - first + 1);  // indices must fit into 31 bits, too
  if (capacity < 1 || capacity > most) {
    throw std::invalid_argument(std::string(name) + " must be in 1 .. " + std::to_string(most) + " (with first = " +
                                std::to_string(first) + "), got " + std::to_string(capacity));
  }
  return static_cast<std::size_t>(capacity);
}

SlotTable::SlotTable(std::int64_t capacity, std::int64_t first) {
  entries_.resize(checked_capacity("capacity", capacity, first));
  freed_.reserve(entries_.size());  // so that release() cannot fail
  first_ = static_cast<Slot>(first);
}

SlotTable::Acquired SlotTable::acquire(Frame frame) { return acquire_many({frame}).front(); }

std::vector<SlotTable::Acquired> SlotTable::acquire_many(const std::vector<Frame>& frames) {
  for (const Frame frame : frames) check_frame(frame);
  std::vector<Acquired> result(frames.size());

  // 1. What can fail comes first. Absent frames are entered without a slot (and taken out again on failure), the idle
  // ones of the request are counted: they cannot be evicted for the others.
  ++request_;
  std::int64_t wanted = 0;
  std::int64_t kept = 0;
  const auto undo = [&]() noexcept {
    for (std::size_t i = 0; i < frames.size(); ++i) {
      if (result[i].is_new) slots_.erase(frames[i]);
    }
  };
  try {
    for (std::size_t i = 0; i < frames.size(); ++i) {
      const auto [place, inserted] = slots_.emplace(frames[i], kNone);
      result[i].is_new = inserted;
      if (inserted) {
        ++wanted;
      } else if (place->second != kNone) {
        Entry& entry = entries_[static_cast<std::size_t>(place->second)];
        if (entry.pins == 0 && entry.request != request_) ++kept;
        entry.request = request_;
      }
    }
  } catch (...) {
    undo();
    throw;
  }
  const std::int64_t free = free_count();
  const std::int64_t held = capacity() - free;
  const std::int64_t evictable = held - pinned_count_ - kept;
  if (wanted > free + evictable) {
    undo();
    throw std::runtime_error("no slot for " + std::to_string(wanted) + " new frame(s): of " + std::to_string(capacity()) +
                             " slots " + std::to_string(free) + " are free, " + std::to_string(pinned_count_) +
                             " pinned, " + std::to_string(kept) + " held by frames of the same request, " +
                             std::to_string(evictable) + " can be reused");
  }

  // 2. From here on nothing throws. The frames already there move out of the way of eviction, ...
  for (std::size_t i = 0; i < frames.size(); ++i) {
    const Index index = slots_.find(frames[i])->second;
    if (index != kNone) use(index);
  }
  // ... the absent ones get slots, ...
  for (std::size_t i = 0; i < frames.size(); ++i) {
    if (!result[i].is_new) continue;
    Index index = take_free();
    if (index == kNone) {
      index = idle_.head;
      remove(idle_, index);
      result[i].evicted = entries_[static_cast<std::size_t>(index)].frame;
      slots_.erase(*result[i].evicted);
    }
    Entry& entry = entries_[static_cast<std::size_t>(index)];
    entry.frame = frames[i];
    entry.pins = 0;  // clear() leaves the pins of what it forgot
    append(idle_, index);
    slots_.find(frames[i])->second = index;
  }
  // ... and the order of use becomes that of the request.
  for (std::size_t i = 0; i < frames.size(); ++i) {
    const Index index = slots_.find(frames[i])->second;
    use(index);
    result[i].slot = first_ + index;
  }
  return result;
}

SlotTable::Slot SlotTable::lookup(Frame frame) const {
  const Index index = find(frame);
  return index == kNone ? -1 : first_ + index;
}

SlotTable::Slot SlotTable::touch(Frame frame) {
  const Index index = find(frame);
  if (index == kNone) return -1;
  use(index);
  return first_ + index;
}

std::int64_t SlotTable::pin(Frame frame) {
  const Index index = require(frame, "pin");
  Entry& entry = entries_[static_cast<std::size_t>(index)];
  if (entry.pins == 0) {
    remove(idle_, index);
    append(pinned_, index);
    ++pinned_count_;
  }
  return ++entry.pins;
}

std::int64_t SlotTable::unpin(Frame frame) {
  const Index index = require(frame, "unpin");
  Entry& entry = entries_[static_cast<std::size_t>(index)];
  if (entry.pins == 0) throw std::runtime_error("cannot unpin frame " + std::to_string(frame) + ": it is not pinned");
  if (--entry.pins == 0) {
    remove(pinned_, index);
    append(idle_, index);
    --pinned_count_;
  }
  return entry.pins;
}

std::int64_t SlotTable::pins(Frame frame) const {
  const Index index = find(frame);
  return index == kNone ? 0 : entries_[static_cast<std::size_t>(index)].pins;
}

SlotTable::Slot SlotTable::release(Frame frame) {
  const Index index = require(frame, "release");
  Entry& entry = entries_[static_cast<std::size_t>(index)];
  if (entry.pins > 0) {
    throw std::runtime_error("cannot release frame " + std::to_string(frame) + ": it has " + std::to_string(entry.pins) +
                             " pin(s)");
  }
  remove(idle_, index);
  slots_.erase(frame);
  freed_.push_back(index);
  std::push_heap(freed_.begin(), freed_.end(), std::greater<>());
  return first_ + index;
}

void SlotTable::clear() {
  slots_.clear();
  freed_.clear();
  unused_ = 0;
  pinned_count_ = 0;
  idle_ = pinned_ = List{};
}

void SlotTable::grow(std::int64_t new_capacity) {
  if (new_capacity < capacity()) {
    throw std::invalid_argument("new_capacity must be >= the present capacity " + std::to_string(capacity()) + ", got " +
                                std::to_string(new_capacity));
  }
  freed_.reserve(checked_capacity("new_capacity", new_capacity, first_));
  entries_.resize(static_cast<std::size_t>(new_capacity));
}

std::vector<SlotTable::Frame> SlotTable::frames() const {
  std::vector<Frame> found;
  found.reserve(size());
  for (const List& list : {idle_, pinned_}) {
    for (Index index = list.head; index != kNone;) {
      const Entry& entry = entries_[static_cast<std::size_t>(index)];
      found.push_back(entry.frame);
      index = entry.next;
    }
  }
  return found;
}

SlotTable::Index SlotTable::find(Frame frame) const {
  check_frame(frame);
  const auto place = slots_.find(frame);
  return place == slots_.end() ? kNone : place->second;
}

SlotTable::Index SlotTable::require(Frame frame, const char* action) const {
  const Index index = find(frame);
  if (index == kNone) {
    throw std::invalid_argument("cannot " + std::string(action) + " frame " + std::to_string(frame) + ": it has no slot");
  }
  return index;
}

void SlotTable::append(List& list, Index index) noexcept {
  Entry& entry = entries_[static_cast<std::size_t>(index)];
  entry.previous = list.tail;
  entry.next = kNone;
  (list.tail == kNone ? list.head : entries_[static_cast<std::size_t>(list.tail)].next) = index;
  list.tail = index;
}

void SlotTable::remove(List& list, Index index) noexcept {
  const Entry& entry = entries_[static_cast<std::size_t>(index)];
  (entry.previous == kNone ? list.head : entries_[static_cast<std::size_t>(entry.previous)].next) = entry.next;
  (entry.next == kNone ? list.tail : entries_[static_cast<std::size_t>(entry.next)].previous) = entry.previous;
}

void SlotTable::use(Index index) noexcept {
  List& list = entries_[static_cast<std::size_t>(index)].pins > 0 ? pinned_ : idle_;
  remove(list, index);
  append(list, index);
}

std::int64_t SlotTable::free_count() const {
  return static_cast<std::int64_t>(freed_.size()) + capacity() - unused_;
}

SlotTable::Index SlotTable::take_free() noexcept {
  if (!freed_.empty()) {
    std::pop_heap(freed_.begin(), freed_.end(), std::greater<>());
    const Index index = freed_.back();
    freed_.pop_back();
    return index;
  }
  return unused_ < capacity() ? unused_++ : kNone;
}

}  // namespace longlive
