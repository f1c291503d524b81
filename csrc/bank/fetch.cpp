// prefetch() and settle(): frames enter device slots.
#include <algorithm>
#include <utility>

#include "bank/bank_state.h"

namespace longlive::bank {

// A prefetch: what its frames need.
struct Bank::State::Fetching {
  explicit Fetching(const std::vector<Frame>& the_frames) : frames(the_frames) {}
  std::vector<Frame> frames;     // that the bank has
  std::vector<Frame> missing;
  std::vector<Entry*> copies;    // to copy from host memory now
  std::vector<Entry*> reads;     // to read from disk
  std::vector<Record*> records;  // one a read
  std::int64_t device = 0, host = 0, disk = 0;  // hits
};

void Bank::State::prefetch(const std::vector<Frame>& wanted, Stream stream) {
  for (const Frame frame : wanted) {
    if (frame < 0) throw std::invalid_argument("frame must be >= 0, got " + std::to_string(frame));
  }
  Turn turn(*this);
  check_capture(stream, "prefetch");
  for (;;) {
    repair();
    tend();
    Fetching fetching(wanted);
    auto& there = fetching.frames;
    for (const Frame frame : wanted) {
      if (find(frame) == nullptr) fetching.missing.push_back(frame);
    }
    there.erase(std::remove_if(there.begin(), there.end(), [&](Frame frame) { return find(frame) == nullptr; }),
                there.end());
    if (!slots.fit(there)) {
      throw BankFull("cannot prefetch " + std::to_string(there.size()) + " frame(s): of " +
                     std::to_string(slots.capacity()) + " device slots too many are pinned");
    }
    if (choose_fetch(fetching)) {
      begin_fetch(fetching, stream);
      spill_ahead(false);
      return;
    }
    make_room(turn.lock, static_cast<std::int64_t>(fetching.reads.size()), true, "prefetch");
  }
}

bool Bank::State::choose_fetch(Fetching& fetching) {
  std::vector<Frame> seen(fetching.frames);
  std::sort(seen.begin(), seen.end());
  seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
  for (const Frame frame : seen) {
    Entry& entry = *find(frame);
    if (slots.lookup(frame) >= 0 && entry.filled) {
      ++fetching.device;
    } else if (entry.host != nullptr && !entry.fetch) {
      ++fetching.host;
      fetching.copies.push_back(&entry);
    } else {
      ++fetching.disk;
      if (!entry.fetch) fetching.reads.push_back(&entry);
    }
  }
  const auto count = static_cast<std::int64_t>(fetching.reads.size());
  if (count == 0) return true;
  if (!records->ready(count)) return false;
  const HostRecords::Choice choice = records->choose(count, true, [&](const Record& record) {
    return !record.owner->fetch &&
           std::find(fetching.copies.begin(), fetching.copies.end(), record.owner) == fetching.copies.end();
  });
  if (choice.size() < count) return false;
  fetching.records = records->take(choice, [&](Record& record) {
    record.owner->host = nullptr;
    ++counts.host_drops;
  });
  if (static_cast<std::int64_t>(fetching.records.size()) == count) return true;
  for (Record* record : fetching.records) --record->users;  // the system refused memory
  return false;
}

void Bank::State::begin_fetch(Fetching& fetching, Stream stream) {
  std::vector<Frame> fresh;                     // frames that have got a slot now
  std::list<std::shared_ptr<Fetch>> beginning;  // one a read
  std::vector<Job> jobs;
  std::map<Frame, std::string> asking;
  std::size_t pinned = 0;
  try {
    for (std::size_t i = 0; i < fetching.reads.size(); ++i) {
      auto fetch = std::make_shared<Fetch>();
      fetch->entry = fetching.reads[i];
      fetch->record = fetching.records[i];
      fetch->place = fetching.reads[i]->disk;
      fetch->jobs = chunks();
      queue_reads(fetch, jobs);
      beginning.push_back(std::move(fetch));
    }
    for (const Frame frame : fetching.frames) asking[frame];
    for (const Frame frame : fetching.missing) asking[frame] = "missing";
    outbox.reserve(outbox.size() + jobs.size());
    if (!fetching.frames.empty()) {
      // Whoever allocated the slots may still be zeroing them.
      EventRef begin;
      bool marked = false;
      fresh.reserve(fetching.frames.size());
      const auto acquired = slots.acquire(fetching.frames);
      for (std::size_t i = 0; i < acquired.size(); ++i) {
        if (acquired[i].evicted) {
          find(*acquired[i].evicted)->filled = false;
          ++counts.evictions;
        }
        if (!acquired[i].is_new) continue;
        fresh.push_back(fetching.frames[i]);
        find(fetching.frames[i])->filled = false;
      }
      for (const Frame frame : fresh) {
        const Slot slot = slots.lookup(frame);
        if (!slots.fresh(slot)) continue;
        if (!marked) begin = device->record(stream);
        marked = true;
        slots.begin(slot, {stream, begin});
      }
      copy_in(fetching.copies);
      for (; pinned < fetching.frames.size(); ++pinned) slots.pin(fetching.frames[pinned], stream);
    }
  } catch (...) {
    while (pinned > 0) slots.unpin(fetching.frames[--pinned]);
    for (const Frame frame : fresh) {
      slots.drop(*device, frame);
      find(frame)->filled = false;
    }
    for (Record* record : fetching.records) --record->users;
    tend();
    throw;
  }
  // From here on nothing throws.
  for (const auto& fetch : beginning) {
    fetch->number = ++fetch_number;
    fetch->entry->fetch = fetch;
    ++working;
  }
  fetches.splice(fetches.end(), beginning);
  for (Job& job : jobs) outbox.push_back(std::move(job));
  for (auto& [frame, reason] : asking) {
    const auto known = asked.find(frame);
    if (known != asked.end()) known->second = std::move(reason);
  }
  asked.merge(asking);
  for (const Frame frame : fetching.frames) {
    Record* host = find(frame)->host;
    if (host != nullptr) records->touch(*host);
  }
  counts.hits_device += fetching.device;
  counts.hits_host += fetching.host;
  counts.hits_disk += fetching.disk;
  std::sort(fetching.missing.begin(), fetching.missing.end());
  counts.misses += std::unique(fetching.missing.begin(), fetching.missing.end()) - fetching.missing.begin();
}

// Enqueues the copies of frames from host memory to their slots. When it throws no slot is valid.
void Bank::State::copy_in(const std::vector<Entry*>& entries) {
  if (entries.empty()) return;
  const PageLayout& layout = options.layout;
  std::vector<EventRef> after, points;
  std::vector<Copy> copies;
  std::vector<Slot> places;
  points.reserve(static_cast<std::size_t>(layout.layers));
  std::list<Points> watched{std::make_shared<std::vector<EventRef>>(1)};
  for (const Entry* entry : entries) {
    places.push_back(slots.lookup(entry->frame));
    slots.collect(*device, places.back(), after);
    records->stored(*entry->host);
  }
  copies.reserve(entries.size() * static_cast<std::size_t>(layout.samples) * layout.segments.size());
  bool copying = false;
  const auto mark = [&] {
    if (points.empty()) return;
    watched.front()->back() = points.back();
    for (std::size_t i = 0; i < entries.size(); ++i) {
      entries[i]->host->fetched = watched.front();
      slots.filling(places[i], points.back());
    }
    records->watch(Direction::kToDevice, watched);
  };
  try {
    for (std::int64_t layer = 0; layer < layout.layers; ++layer) {
      copies.clear();
      for (std::size_t i = 0; i < entries.size(); ++i) {
        const Record& record = *entries[i]->host;
        // The copy that brings this layer here may be under way itself.
        if (record.written && !record.written->empty()) {
          const EventRef& written = (*record.written)[static_cast<std::size_t>(layer)];
          if (written && std::find(after.begin(), after.end(), written) == after.end()) after.push_back(written);
        }
        for (std::int64_t sample = 0; sample < layout.samples; ++sample) {
          for (std::size_t s = 0; s < layout.segments.size(); ++s) {
            const Segment& segment = layout.segments[s];
            const std::byte* from = record.memory + layout.page_offset(layer, sample) + segment.offset;
            copies.push_back({slots.address(s, layer, sample, places[i]), reinterpret_cast<std::uintptr_t>(from),
                              segment.bytes});
          }
        }
      }
      copying = true;
      points.push_back(device->copy(Direction::kToDevice, copies, after));
      after.clear();
    }
  } catch (...) {
    if (copying) unmarked_to_device = true;
    mark();
    throw;
  }
  mark();
  for (Entry* entry : entries) entry->filled = true;
  std::copy(points.begin(), points.end(), to_device.begin());
  for (const Segment& segment : layout.segments) {
    counts.fetched_bytes += segment.bytes * layout.pages() * static_cast<std::int64_t>(entries.size());
  }
}

// Waits for the reads that have begun by now.
void Bank::State::wait_for_reads(Lock& lock) {
  const std::uint64_t last = fetch_number;
  const auto begin = std::chrono::steady_clock::now();
  bool waited = false;
  while (std::any_of(fetches.begin(), fetches.end(),
                     [&](const auto& fetch) { return fetch->number <= last && !fetch->done(); })) {
    waited = true;
    wait_change(lock);
  }
  if (!waited) return;
  counts.stall_us +=
      std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin).count();
}

// Enqueues the copies of all frames that have been read and still have a slot. When the device refuses, they stay to be
// copied.
void Bank::State::copy_settled() {
  repair();
  std::vector<Entry*> ready;
  for (const auto& fetch : fetches) {
    if (!fetch->done() || fetch->entry == nullptr) continue;
    if (slots.lookup(fetch->entry->frame) >= 0 && !fetch->entry->filled) ready.push_back(fetch->entry);
  }
  std::sort(ready.begin(), ready.end(), [](const Entry* a, const Entry* b) { return a->frame < b->frame; });
  copy_in(ready);
  fetches.remove_if([](const std::shared_ptr<Fetch>& fetch) {
    if (!fetch->done()) return false;
    if (fetch->entry != nullptr) fetch->entry->fetch.reset();
    return true;
  });
}

std::vector<Lost> Bank::State::take_lost() {
  std::vector<Lost> lost;
  for (const auto& [frame, reason] : asked) {
    if (!reason.empty()) lost.push_back({frame, reason});
  }
  for (auto place = asked.begin(); place != asked.end();) {
    const Entry* entry = find(place->first);
    const bool reading = place->second.empty() && entry != nullptr && entry->fetch != nullptr;
    place = reading ? std::next(place) : asked.erase(place);
  }
  return lost;
}

}  // namespace longlive::bank
