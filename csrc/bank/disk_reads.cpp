// Reads from disk, whose pages are checked before anybody sees them.
#include <cstdlib>
#include <cstring>
#include <utility>

#include "bank/bank_state.h"
#include "bank/crc32c.h"

namespace longlive::bank {
namespace {

// What is wrong with a page that has been read, "" when nothing is.
std::string fault(DiskTier& disk, const DiskPlace& place, const PageLayout& layout, std::int64_t page, std::byte* to,
                  bool again) {
  const std::string name = "damaged: layer " + std::to_string(page / layout.samples) + ", sample " +
                           std::to_string(page % layout.samples) + ": ";
  if (again) {
    try {
      disk.read(place.extent, page * layout.page_bytes, to, layout.page_bytes);
    } catch (const std::exception& error) {
      return name + error.what();
    }
  }
  const std::uint32_t found = crc32c(to, static_cast<std::size_t>(layout.page_bytes));
  return found == place.checksums[static_cast<std::size_t>(page)] ? "" : name + "the checksum is wrong";
}

// Reads pages `first` .. `first + count - 1` to `to`; returns how many are bad, and why the first of them is.
std::int64_t read_checked(DiskTier& disk, const DiskPlace& place, const PageLayout& layout, std::int64_t first,
                          std::int64_t count, std::byte* to, std::string& reason) {
  bool whole = true;
  try {
    disk.read(place.extent, first * layout.page_bytes, to, count * layout.page_bytes);
  } catch (...) {
    whole = false;  // by single pages, to know which
  }
  std::int64_t bad = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::string found = fault(disk, place, layout, first + i, to + i * layout.page_bytes, !whole);
    if (found.empty()) continue;
    if (bad++ == 0) reason = std::move(found);
  }
  return bad;
}

}  // namespace

void Bank::State::queue_reads(const std::shared_ptr<Fetch>& fetch, std::vector<Job>& jobs) {
  split([&](std::int64_t first, std::int64_t count) {
    jobs.push_back(
        {IoPool::Kind::kRead, [this, fetch, first, count] { read_pages(*fetch, first, count); }, pool.get()});
  });
}

// A job. Nobody else touches the record: it has a user and no frame.
void Bank::State::read_pages(Fetch& fetch, std::int64_t first, std::int64_t count) {
  std::string reason;
  std::int64_t bad = 0;
  const bool skip = abandoned.load(std::memory_order_relaxed);
  if (!skip) {
    const PageLayout& layout = options.layout;
    try {
      std::byte* to = fetch.record->memory + first * layout.page_bytes;
      bad = read_checked(*disk, *fetch.place, layout, first, count, to, reason);
    } catch (...) {  // no memory for the reason
      bad = std::max<std::int64_t>(bad, 1);
      reason = "damaged";
    }
    // The record serves other frames later, whose copies leave gaps as they are.
    if (bad > 0) zero_gaps(layout, fetch.record->memory, first, count);
  }
  const Lock lock(mutex);
  if (bad > 0 && fetch.damaged == 0) fetch.reason = std::move(reason);
  fetch.damaged += bad;
  fetch.skipped = fetch.skipped || skip;
  if (--fetch.jobs == 0) end_read(fetch);
}

void Bank::State::end_read(Fetch& fetch) noexcept {
  --working;
  Record& record = *std::exchange(fetch.record, nullptr);
  --record.users;
  counts.damaged_pages += fetch.damaged;
  if (fetch.entry != nullptr && !fetch.skipped) {
    Entry& entry = *fetch.entry;
    if (fetch.damaged > 0) {
      drop_damaged(entry, std::move(fetch.reason));
    } else {
      entry.host = &record;
      record.owner = &entry;
      records->move(record, Record::Place::kBoth);
      records->touch(record);
    }
  }
  fetch.place.reset();
  tend();
  ++changes;
  changed.notify_all();
}

void Bank::State::read(Frame frame, std::byte* to) {
  if (to == nullptr) throw std::invalid_argument("address must not be null");
  Turn turn(*this);
  for (;;) {
    Entry* entry = find(frame);
    if (entry == nullptr) throw std::out_of_range("frame " + std::to_string(frame) + " is not in the bank");
    if (entry->host != nullptr) return read_host(turn.lock, *entry->host, to);
    if (entry->fetch) {  // read and checked already
      wait_change(turn.lock);
      continue;
    }
    const std::shared_ptr<DiskPlace> place = entry->disk;
    std::string reason;
    const std::int64_t bad = read_disk(turn.lock, place, to, reason);
    if (bad == 0) return;
    counts.damaged_pages += bad;
    check_open();
    entry = find(frame);
    if (entry == nullptr || entry->disk != place || entry->fetch) continue;
    if (entry->host != nullptr) {  // somebody else could read it
      entry->disk.reset();
      --disk_frames;
      records->move(*entry->host, Record::Place::kOnly);
      continue;
    }
    drop_damaged(*entry, reason);
    tend();
    throw Damaged("frame " + std::to_string(frame) + " is " + reason);
  }
}

void Bank::State::read_host(Lock& lock, Record& record, std::byte* to) {
  EventRef point;
  if (!records->stored(record)) point = record.written->back();
  struct User {  // keeps the record as it is
    State& state;
    Record& record;
    Lock& lock;
    User(State& the_state, Record& the_record, Lock& the_lock) : state(the_state), record(the_record), lock(the_lock) {
      ++record.users;
      ++state.working;
      state.send(lock);
      lock.unlock();
    }
    ~User() {
      lock.lock();
      --record.users;
      --state.working;
      ++state.changes;
      state.tend();
      state.changed.notify_all();
    }
  };
  const User user(*this, record, lock);
  if (point) device->synchronize(point);
  std::memcpy(to, record.memory, static_cast<std::size_t>(options.layout.record_bytes()));
}

// Returns the number of bad pages, and why the first of them is.
std::int64_t Bank::State::read_disk(Lock& lock, const std::shared_ptr<DiskPlace>& place, std::byte* to,
                                    std::string& reason) {
  const PageLayout& layout = options.layout;
  std::int64_t bad = 0;
  send(lock);
  lock.unlock();
  try {
    // The caller's memory need not be aligned as direct I/O wants it.
    const auto bytes = static_cast<std::size_t>(std::min(chunk_pages(), layout.pages()) * layout.page_bytes);
    const std::unique_ptr<void, decltype(&std::free)> buffer(std::aligned_alloc(kAlignment, bytes), &std::free);
    if (!buffer) throw std::bad_alloc();
    auto* from = static_cast<std::byte*>(buffer.get());
    split([&](std::int64_t first, std::int64_t count) {
      std::string found;
      const std::int64_t damaged = read_checked(*disk, *place, layout, first, count, from, found);
      if (damaged > 0 && bad == 0) reason = std::move(found);
      bad += damaged;
      if (bad > 0) return;
      std::memcpy(to + first * layout.page_bytes, from, static_cast<std::size_t>(count * layout.page_bytes));
    });
  } catch (...) {
    lock.lock();
    throw;
  }
  lock.lock();
  return bad;
}

}  // namespace longlive::bank
