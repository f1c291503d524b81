// Which frames the bank holds, and how they leave.
#include <algorithm>
#include <utility>

#include "bank/bank_state.h"

namespace longlive::bank {

Entry* Bank::State::find(Frame frame) {
  const auto place = frames.find(frame);
  return place == frames.end() ? nullptr : &place->second;
}

const Entry* Bank::State::find(Frame frame) const {
  const auto place = frames.find(frame);
  return place == frames.end() ? nullptr : &place->second;
}

// Takes everything from the entry that its generation has: slot, host record, place on disk, what is under way.
void Bank::State::retire(Entry& entry, const char* reason) noexcept {
  const auto waiting = asked.find(entry.frame);
  bool under_way = entry.fetch != nullptr;
  const Slot slot = slots.lookup(entry.frame);
  if (slot >= 0) {
    under_way = under_way || !slots.filled(*device, slot) || (waiting != asked.end() && slots.pins(entry.frame) > 0);
    slots.drop(*device, entry.frame);
  }
  entry.filled = false;
  if (under_way) ++counts.dropped_fetches;
  if (waiting != asked.end() && waiting->second.empty()) waiting->second = reason;  // short: no memory is needed
  if (entry.fetch) {
    entry.fetch->entry = nullptr;
    entry.fetch.reset();
  }
  if (entry.spill) {
    entry.spill->entry = nullptr;
    entry.spill.reset();
  }
  if (entry.host != nullptr) {
    records->move(*entry.host, Record::Place::kLoose);
    entry.host->owner = nullptr;
    entry.host = nullptr;
  }
  if (entry.disk) {
    entry.disk.reset();
    --disk_frames;
  }
}

void Bank::State::drop(Entry& entry, const char* reason) noexcept {
  retire(entry, reason);
  frames.erase(entry.frame);
}

void Bank::State::drop_damaged(Entry& entry, std::string reason) noexcept {
  const Frame frame = entry.frame;
  drop(entry, "damaged");
  const auto waiting = asked.find(frame);
  if (waiting != asked.end()) waiting->second = std::move(reason);
}

void Bank::State::forget(const std::vector<Frame>& wanted) {
  Turn turn(*this);
  for (const Frame frame : wanted) {
    if (find(frame) == nullptr) {
      throw std::invalid_argument("cannot forget frame " + std::to_string(frame) + ": it is not in the bank");
    }
    if (slots.pins(frame) > 0) {
      throw std::invalid_argument("cannot forget frame " + std::to_string(frame) + ": it is pinned " +
                                  std::to_string(slots.pins(frame)) + " time(s)");
    }
  }
  for (const Frame frame : wanted) {
    Entry* entry = find(frame);
    if (entry != nullptr) drop(*entry, "missing");  // null: named twice
  }
  tend();
}

void Bank::State::clear() {
  Turn turn(*this);
  while (!frames.empty()) drop(frames.begin()->second, "missing");
  tend();
}

// Host records that frames beside the disk's never fill: for those on their way to the device, and for new generations
// of frames that are on disk alone.
std::int64_t Bank::State::kept_back() const { return std::max(options.bounce_records, options.commit_records); }

std::int64_t Bank::State::room() const {
  std::int64_t capacity = records->stats().capacity;
  if (disk) {
    // A disk that refuses to be written to still holds what it holds, and no more needs to be fetched from it.
    const bool failing = spill_failures >= kMostSpillFailures;
    const std::int64_t held = failing ? disk_frames : disk->stats().capacity;
    capacity += held - std::min(held, kept_back());
  }
  return capacity - static_cast<std::int64_t>(frames.size());
}

BankStats Bank::State::snapshot() const {
  BankStats stats = counts;
  stats.frames = static_cast<std::int64_t>(frames.size());
  stats.device_frames = slots.held();
  stats.host_frames = static_cast<std::int64_t>(records->only.size() + records->both.size());
  stats.disk_frames = disk_frames;
  stats.host = records->stats();
  if (disk) stats.disk = disk->stats();
  stats.device = device->stats();
  return stats;
}

}  // namespace longlive::bank
