// Spilling: frames that only host memory holds are written to disk, so that their records can be dropped.
#include <algorithm>
#include <utility>

#include "bank/bank_state.h"
#include "bank/crc32c.h"

namespace longlive::bank {

// Starts spills, least recently used frames first, until `wanted` records are free, droppable or about to be. `probe`:
// a disk that failed too often gets one more frame to show that it works again.
void Bank::State::start_spills(std::int64_t wanted, bool probe) {
  if (!disk || closing || unmarked_to_host) return;
  const auto enough = [&] {
    const auto soon = static_cast<std::int64_t>(records->both.size() + records->loose.size()) + spilling;
    return records->free_count() + soon >= wanted;
  };
  const bool failing = spill_failures >= kMostSpillFailures;
  if (failing && (!probe || spilling > 0)) return;
  const DiskStats stats = disk->stats();
  std::int64_t places = stats.capacity - stats.used - placing;
  for (auto record = records->only.begin(); record != records->only.end() && places > 0 && !enough();) {
    Entry& entry = *record->owner;
    const bool ready = !entry.spill && records->stored(*record);
    ++record;
    if (!ready) continue;
    start_spill(entry);
    if (failing) return;
    --places;
  }
}

void Bank::State::start_spill(Entry& entry) {
  auto spill = std::make_shared<Spill>();
  spill->entry = &entry;
  spill->record = entry.host;
  spill->jobs = 1;
  outbox.push_back({IoPool::Kind::kWrite, [this, spill] { place_spill(spill); }, pool.get()});
  entry.spill = std::move(spill);
  ++entry.host->users;
  ++placing;
  ++spilling;
  ++working;
}

// A job: finds a place, which may take as long as a file system needs to make room for a shard, and starts the others.
void Bank::State::place_spill(const std::shared_ptr<Spill>& spill) {
  std::shared_ptr<DiskPlace> place;
  std::vector<Job> jobs;
  bool failed = abandoned.load(std::memory_order_relaxed), refused = false;
  try {
    if (!failed) place = std::make_shared<DiskPlace>(*disk, options.layout.pages());
    refused = place && place->extent < 0;
    split([&](std::int64_t first, std::int64_t count) {
      jobs.push_back(
          {IoPool::Kind::kWrite, [this, spill, first, count] { spill_pages(*spill, first, count); }, pool.get()});
    });
  } catch (...) {  // no memory
    failed = true;
  }
  {
    const Lock lock(mutex);
    --placing;
    if (failed || refused) {
      spill->failed = true;
      spill->refused = refused;
      end_spill(*spill);
      return;
    }
    spill->place = place;
    spill->jobs = static_cast<std::int64_t>(jobs.size());
  }
  place.reset();
  submit(jobs, 1);
  jobs.front().run();
}

// So that the next commit and the next fetch need not wait.
void Bank::State::spill_ahead(bool probe) noexcept {
  grow_ahead();
  try {
    start_spills(options.bounce_records + options.commit_records, probe);
  } catch (...) {  // no memory: another time
  }
}

// A job. Nothing writes the record meanwhile: it has a user.
void Bank::State::spill_pages(Spill& spill, std::int64_t first, std::int64_t count) {
  const std::int64_t bytes = options.layout.page_bytes;
  const std::byte* from = spill.record->memory + first * bytes;
  bool failed = abandoned.load(std::memory_order_relaxed);
  if (!failed) {
    for (std::int64_t page = 0; page < count; ++page) {
      spill.place->checksums[static_cast<std::size_t>(first + page)] =
          crc32c(from + page * bytes, static_cast<std::size_t>(bytes));
    }
    try {
      disk->write(spill.place->extent, first * bytes, from, count * bytes);
    } catch (...) {  // whatever it is, the frame stays in host memory
      failed = true;
    }
  }
  const Lock lock(mutex);
  spill.failed = spill.failed || failed;
  if (--spill.jobs == 0) end_spill(spill);
}

void Bank::State::end_spill(Spill& spill) noexcept {
  --spilling;
  --working;
  --spill.record->users;
  if (!spill.failed) {
    spill_failures = 0;
    ++counts.spilled;
  } else if (!closing) {
    if (!spill.refused) ++spill_failures;
    ++counts.failed_spills;
  }
  if (spill.entry != nullptr) {
    Entry& entry = *spill.entry;
    if (spill.failed) {
      records->move(*spill.record, Record::Place::kOnly);  // to the end: the next try is another frame's
    } else {
      entry.disk = spill.place;
      ++disk_frames;
      records->move_by_use(*spill.record);
    }
    entry.spill.reset();
  }
  spill.place.reset();
  tend();
  ++changes;
  changed.notify_all();
}

// No record can be had now: waits for the one thing that may change that, or throws BankFull when nothing will.
void Bank::State::make_room(Lock& lock, std::int64_t wanted, bool idle, const char* what) {
  const auto begin = std::chrono::steady_clock::now();
  struct Stall {
    std::chrono::steady_clock::time_point since;
    std::int64_t& total;
    ~Stall() {
      total += std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - since).count();
    }
  } stall{begin, counts.stall_us};
  if (!records->ready(wanted)) return wait_for_growth(lock);
  start_spills(wanted + options.bounce_records, false);
  if (working > 0) {
    wait_change(lock);
    return;
  }
  // Read, but not yet in their slots: such records may not be dropped.
  if (std::any_of(fetches.begin(), fetches.end(), [](const auto& fetch) { return fetch->done(); })) {
    copy_settled();
    return;
  }
  EventRef point;
  if (disk && spill_failures < kMostSpillFailures && disk->stats().used < disk->stats().capacity) {
    for (Record& record : records->only) {
      if (!records->stored(record)) {
        point = record.written->back();
        break;
      }
    }
  }
  for (HostRecords::List* list : {&records->loose, &records->both}) {
    for (Record& record : *list) {
      if (!idle || point) break;
      if (!records->stored(record)) {
        point = record.written->back();
      } else if (!records->fetched(record)) {
        point = record.fetched->back();
      }
    }
  }
  if (point) {
    wait_point(lock, point);
    return;
  }
  // What was under way when records were chosen may be done by now.
  if (std::exchange(arrivals, records->arrivals()) != records->arrivals()) return;
  throw BankFull(std::string("no host memory for ") + what + ": " + std::to_string(wanted) + " record(s) wanted, of " +
                 std::to_string(records->stats().capacity) + " " + std::to_string(records->only.size()) +
                 " hold frames that are nowhere else" +
                 (spill_failures >= kMostSpillFailures ? " and the disk refuses to be written to" : ""));
}

}  // namespace longlive::bank
