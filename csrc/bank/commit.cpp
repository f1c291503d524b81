// commit(): frames enter the bank from the device.
#include <algorithm>
#include <set>
#include <utility>

#include "bank/bank_state.h"

namespace longlive::bank {

// A commit: what it has chosen and begun.
struct Bank::State::Storing {
  explicit Storing(const std::vector<Frame>& the_frames)
      : frames(the_frames), own(the_frames.size()), points(std::make_shared<std::vector<EventRef>>()) {}
  const std::vector<Frame>& frames;
  std::vector<Record*> records;  // one a frame
  std::vector<char> own;         // the record that the frame has already
  std::vector<Record*> taken;    // the others
  std::map<Frame, Entry> fresh;  // frames that were not there
  Points points;
  std::list<Points> watched{points};
  bool copying = false;
};

void Bank::State::check_sources(const std::vector<Frame>& wanted, const std::vector<PageSource>& pages) const {
  if (pages.size() != wanted.size()) {
    throw std::invalid_argument("pages must have one entry for each of the " + std::to_string(wanted.size()) +
                                " frames, got " + std::to_string(pages.size()));
  }
  for (std::size_t i = 0; i < pages.size(); ++i) {
    if (pages[i].parts.size() != options.layout.segments.size()) {
      throw std::invalid_argument("pages[" + std::to_string(i) + "] must have one part for each of the " +
                                  std::to_string(options.layout.segments.size()) + " segments, got " +
                                  std::to_string(pages[i].parts.size()));
    }
  }
}

void Bank::State::check_presence(const std::vector<Frame>& wanted, bool replace) const {
  std::set<Frame> seen;
  for (const Frame frame : wanted) {
    if (frame < 0) throw std::invalid_argument("frame must be >= 0, got " + std::to_string(frame));
    if (!seen.insert(frame).second) throw std::invalid_argument("frame " + std::to_string(frame) + " is named twice");
    const bool present = find(frame) != nullptr;
    if (present && !replace) throw std::invalid_argument("frame " + std::to_string(frame) + " is in the bank already");
    if (!present && replace) {
      throw std::invalid_argument("cannot replace frame " + std::to_string(frame) + ": it is not in the bank");
    }
  }
}

void Bank::State::commit(const std::vector<Frame>& wanted, const std::vector<PageSource>& pages, Stream stream,
                         bool replace) {
  check_sources(wanted, pages);
  Storing storing(wanted);
  Turn turn(*this);
  check_capture(stream, "commit");
  for (;;) {
    repair();
    check_presence(wanted, replace);
    if (wanted.empty()) return;
    const auto count = static_cast<std::int64_t>(wanted.size());
    if (!replace && room() < count) {
      throw BankFull("cannot commit " + std::to_string(count) + " frame(s): the bank has room for " +
                     std::to_string(std::max<std::int64_t>(0, room())) + " more beside the " +
                     std::to_string(frames.size()) + " it holds");
    }
    tend();
    if (choose_records(storing, replace)) break;
    make_room(turn.lock, count, false, "commit");
  }
  try {
    store(storing, pages, stream);
  } catch (...) {
    abandon(storing);
    throw;
  }
  publish(storing, replace);
  fill_free_slots(wanted, pages, stream);
  spill_ahead(true);
  tend();
}

// Records nobody has come first. A frame that is replaced may have its own written again, but then a device that fails
// half-way leaves neither the old pages nor the new ones. Last come records of frames that are on disk as well.
bool Bank::State::choose_records(Storing& storing, bool replace) {
  const auto count = static_cast<std::int64_t>(storing.frames.size());
  if (!records->ready(count)) return false;
  HostRecords::Choice choice;
  records->choose_free(choice, count, false);
  std::fill(storing.own.begin(), storing.own.end(), char{0});
  std::int64_t missing = count - choice.size();
  std::set<const Record*> theirs;
  for (std::size_t i = 0; replace && i < storing.frames.size(); ++i) {
    Record* host = find(storing.frames[i])->host;
    if (host == nullptr) continue;
    theirs.insert(host);
    if (missing > 0 && host->users == 0) {
      storing.own[i] = 1;
      --missing;
    }
  }
  for (Record& record : records->both) {
    if (missing <= 0) break;
    if (record.users > 0 || record.owner->fetch || theirs.count(&record) > 0) continue;
    choice.drops.push_back(&record);
    --missing;
  }
  if (missing > 0) return false;
  storing.records.assign(storing.frames.size(), nullptr);
  storing.taken = records->take(choice, [&](Record& record) {
    record.owner->host = nullptr;
    ++counts.host_drops;
  });
  std::size_t next = 0;
  for (std::size_t i = 0; i < storing.frames.size(); ++i) {
    if (storing.own[i]) {
      storing.records[i] = find(storing.frames[i])->host;
    } else if (next < storing.taken.size()) {
      storing.records[i] = storing.taken[next++];
    } else {  // the system refused memory
      for (Record* record : storing.taken) --record->users;
      storing.taken.clear();
      return false;
    }
  }
  return true;
}

void Bank::State::store(Storing& storing, const std::vector<PageSource>& pages, Stream stream) {
  const PageLayout& layout = options.layout;
  std::vector<EventRef> after;
  for (Record* record : storing.records) {
    if (!records->fetched(*record)) after.push_back(record->fetched->back());
  }
  for (const Frame frame : storing.frames) {
    if (find(frame) == nullptr) storing.fresh[frame].frame = frame;
  }
  storing.points->reserve(static_cast<std::size_t>(layout.layers));
  std::vector<Copy> copies;
  copies.reserve(storing.frames.size() * static_cast<std::size_t>(layout.samples) * layout.segments.size());
  after.push_back(device->record(stream));
  for (std::int64_t layer = 0; layer < layout.layers; ++layer) {
    copies.clear();
    for (std::size_t i = 0; i < storing.frames.size(); ++i) {
      for (std::int64_t sample = 0; sample < layout.samples; ++sample) {
        for (std::size_t s = 0; s < layout.segments.size(); ++s) {
          const PageSource::Part& part = pages[i].parts[s];
          const Segment& segment = layout.segments[s];
          const std::byte* to = storing.records[i]->memory + layout.page_offset(layer, sample) + segment.offset;
          const std::int64_t at = layer * part.layer_stride + sample * part.sample_stride;
          copies.push_back({reinterpret_cast<std::uintptr_t>(to), part.base + static_cast<std::uintptr_t>(at),
                            segment.bytes});
        }
      }
    }
    storing.copying = true;
    storing.points->push_back(device->copy(Direction::kToHost, copies, after));
    after.clear();  // the queue keeps its order
  }
}

void Bank::State::abandon(Storing& storing) noexcept {
  if (storing.copying) unmarked_to_host = true;
  for (std::size_t i = 0; i < storing.records.size(); ++i) {
    Record& record = *storing.records[i];
    if (storing.copying) record.written = storing.points;
    if (!storing.own[i]) {
      --record.users;
      continue;
    }
    if (!storing.copying) continue;
    // Half-written: what the frame has left is the copy on disk, if there is one.
    Entry& entry = *record.owner;
    if (entry.disk) {
      records->move(record, Record::Place::kLoose);
      record.owner = nullptr;
      entry.host = nullptr;
    } else {
      drop(entry, "missing");
    }
  }
  tend();
}

void Bank::State::publish(Storing& storing, bool replace) noexcept {
  for (Record* record : storing.taken) --record->users;
  for (std::size_t i = 0; i < storing.frames.size(); ++i) {
    Entry* entry = nullptr;
    if (replace) {
      entry = find(storing.frames[i]);
      retire(*entry, "replaced");
      ++entry->generation;
      ++counts.replaced;
    } else {
      entry = &storing.fresh.find(storing.frames[i])->second;
    }
    Record& record = *storing.records[i];
    record.owner = entry;
    record.written = storing.points;
    record.fetched.reset();  // lies before the copies just enqueued
    entry->host = &record;
    records->move(record, Record::Place::kOnly);
    records->touch(record);
  }
  frames.merge(storing.fresh);
  std::copy(storing.points->begin(), storing.points->end(), to_host.begin());
  records->watch(Direction::kToHost, storing.watched);
  for (const Segment& segment : options.layout.segments) {
    counts.stored_bytes += segment.bytes * options.layout.pages() * static_cast<std::int64_t>(storing.frames.size());
  }
}

// A cache only: what fails here has no consequence but that the frame has no slot.
void Bank::State::fill_free_slots(const std::vector<Frame>& wanted, const std::vector<PageSource>& pages,
                                  Stream stream) noexcept {
  const PageLayout& layout = options.layout;
  const std::size_t count = std::min(static_cast<std::size_t>(slots.free()), wanted.size());
  if (count == 0) return;
  std::size_t acquired = 0;
  bool copying = false;
  try {
    std::vector<EventRef> before;
    std::vector<Copy> copies;
    copies.reserve(count * static_cast<std::size_t>(layout.pages()) * layout.segments.size());
    for (; acquired < count; ++acquired) {
      const Slot slot = slots.acquire({wanted[acquired]}).front().slot;
      find(wanted[acquired])->filled = false;
      slots.collect(*device, slot, before);
      for (std::int64_t layer = 0; layer < layout.layers; ++layer) {
        for (std::int64_t sample = 0; sample < layout.samples; ++sample) {
          for (std::size_t s = 0; s < layout.segments.size(); ++s) {
            const PageSource::Part& part = pages[acquired].parts[s];
            copies.push_back(
                {slots.address(s, layer, sample, slot),
                 part.base + static_cast<std::uintptr_t>(layer * part.layer_stride + sample * part.sample_stride),
                 layout.segments[s].bytes});
          }
        }
      }
    }
    fills.reserve(fills.size() + 1);
    for (const EventRef& point : before) device->wait(stream, point);
    copying = true;
    device->copy_on(stream, copies);
    const EventRef point = device->record(stream);
    for (std::size_t i = 0; i < count; ++i) {
      slots.filling(slots.lookup(wanted[i]), point);
      find(wanted[i])->filled = true;
    }
    prune(*device, fills);
    fills.push_back({stream, point});
  } catch (...) {
    for (std::size_t i = 0; i < count; ++i) {
      const Slot slot = slots.lookup(wanted[i]);
      if (slot < 0) continue;
      if (copying) slots.unmarked(slot, stream);
      slots.drop(*device, wanted[i]);
    }
  }
}

}  // namespace longlive::bank
