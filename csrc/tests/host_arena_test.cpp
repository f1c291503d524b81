// Tests of host memory: accounting to the byte, refusals of locks and of memory.
#include "bank/host_arena.h"

#include "tests/test_case.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <stdexcept>

#include "bank/page_layout.h"

using namespace longlive::bank;

namespace {

constexpr std::int64_t kRecord = 3 * kAlignment;
constexpr std::int64_t kPlenty = std::numeric_limits<std::int64_t>::max();

// Only locks memory, and refuses the calls that are named.
class LockingDevice : public Device {
 public:
  std::set<int> refused;                // lock calls, from 0
  bool broken = false;                  // lock throws
  int calls = 0;
  std::map<void*, std::size_t> locked;  // now

  std::size_t locked_bytes() const {
    std::size_t sum = 0;
    for (const auto& [memory, bytes] : locked) sum += bytes;
    return sum;
  }

  bool lock(void* memory, std::size_t bytes, std::string* reason) override {
    const int call = calls++;
    if (broken) throw std::runtime_error("the driver is gone");
    if (refused.count(call) != 0) {
      *reason = "no lock in call " + std::to_string(call);
      return false;
    }
    CHECK(locked.emplace(memory, bytes).second);
    // locked after the first touch and as a whole: every byte can be read, and is zero
    const auto* const data = static_cast<const unsigned char*>(memory);
    CHECK(std::all_of(data, data + bytes, [](unsigned char byte) { return byte == 0; }));
    return true;
  }
  void unlock(void* memory) noexcept override {
    if (locked.erase(memory) != 1) fail(__LINE__, "unlock of what is not locked", __FILE__);
    static_cast<volatile unsigned char*>(memory)[0] = 1;  // must still be mapped
  }

  EventRef record(Stream) override { return nullptr; }
  void wait(Stream, const EventRef&) override {}
  EventRef copy(Direction, const std::vector<Copy>&, const std::vector<EventRef>&) override { return nullptr; }
  void copy_on(Stream, const std::vector<Copy>&) override {}
  bool done(const EventRef&) override { return true; }
  void synchronize(const EventRef&) override {}
  bool capturing(Stream) override { return false; }
  DeviceStats stats() const override { return {}; }
};

ArenaOptions options_of(std::int64_t limit, std::int64_t slab) {
  ArenaOptions options;
  options.record_bytes = kRecord;
  options.limit_bytes = limit;
  options.slab_bytes = slab;
  return options;
}

// By smaps_rollup: statm and status are off by megabytes on machines of many cores.
std::int64_t resident_bytes() {
  std::ifstream file("/proc/self/smaps_rollup");
  for (std::string word; file >> word;) {
    std::int64_t kilobytes = 0;
    if (word == "Rss:" && file >> kilobytes) return kilobytes * 1024;
  }
  fail(__LINE__, "no Rss in /proc/self/smaps_rollup", __FILE__);
}

std::vector<std::byte*> fill(HostArena& arena) {
  std::vector<std::byte*> records;
  while (std::byte* const record = arena.allocate()) records.push_back(record);
  return records;
}

}  // namespace

TEST_CASE(sizes_that_are_not_allowed) {
  LockingDevice device;
  const auto with = [](auto change) {
    ArenaOptions options = options_of(10 * kRecord, 4 * kRecord);
    change(options);
    return options;
  };
  CHECK_THROWS(std::invalid_argument, "record_bytes = 0", HostArena(device, with([](auto& o) { o.record_bytes = 0; })));
  CHECK_THROWS(std::invalid_argument, "record_bytes = 4097, allowed: a positive multiple of 4096",
               HostArena(device, with([](auto& o) { o.record_bytes = 4097; })));
  CHECK_THROWS(std::invalid_argument, "record_bytes = -4096",
               HostArena(device, with([](auto& o) { o.record_bytes = -4096; })));
  CHECK_THROWS(std::invalid_argument, "limit_bytes = -1", HostArena(device, with([](auto& o) { o.limit_bytes = -1; })));
  CHECK_THROWS(std::invalid_argument, "slab_bytes = 0", HostArena(device, with([](auto& o) { o.slab_bytes = 0; })));
  CHECK_THROWS(std::invalid_argument, "touch_threads = -1",
               HostArena(device, with([](auto& o) { o.touch_threads = -1; })));
}

TEST_CASE(nothing_is_taken_before_the_first_record) {
  LockingDevice device;
  const HostArena arena(device, options_of(10 * kRecord, 4 * kRecord));
  CHECK(device.calls == 0 && arena.stats().reserved_bytes == 0 && arena.stats().capacity == 10);
}

// 10 records and 100 bytes; slabs of 4 records and a half: 4 + 4 + 2.
TEST_CASE(slabs_are_whole_records_and_end_at_the_limit) {
  LockingDevice device;
  {
    HostArena arena(device, options_of(10 * kRecord + 100, 4 * kRecord + kRecord / 2));
    const std::vector<std::int64_t> reserved = {4, 4, 4, 4, 8, 8, 8, 8, 10, 10};
    std::set<std::byte*> seen;
    for (std::size_t i = 0; i < reserved.size(); ++i) {
      std::byte* const record = arena.allocate();
      CHECK(record != nullptr && seen.insert(record).second);
      CHECK(reinterpret_cast<std::uintptr_t>(record) % kAlignment == 0);
      CHECK(std::all_of(record, record + kRecord, [](std::byte byte) { return byte == std::byte{0}; }));
      std::fill(record, record + kRecord, std::byte{0xee});
      const ArenaStats& stats = arena.stats();
      CHECK(stats.used == static_cast<std::int64_t>(i) + 1 && stats.capacity == 10);
      CHECK(stats.reserved_bytes == reserved[i] * kRecord && stats.locked_bytes == stats.reserved_bytes);
      CHECK(device.locked_bytes() == static_cast<std::size_t>(stats.reserved_bytes));
    }
    // records do not overlap, and each lies in one lock
    std::byte* last = nullptr;
    for (std::byte* const record : seen) {
      CHECK(last == nullptr || record - last >= kRecord);
      last = record;
      const auto slab = --device.locked.upper_bound(record);
      CHECK(record + kRecord <= static_cast<std::byte*>(slab->first) + slab->second);
    }
    CHECK(arena.allocate() == nullptr && arena.allocate() == nullptr);
    CHECK(device.calls == 3 && arena.stats().capacity == 10 && arena.stats().refusal.empty());
    CHECK(arena.stats().pageable_slabs == 0 && arena.stats().pageable_reason.empty());
  }
  CHECK(device.locked.empty());
}

TEST_CASE(a_slab_smaller_than_a_record_holds_one) {
  LockingDevice device;
  HostArena arena(device, options_of(3 * kRecord - 1, 1));
  CHECK(fill(arena).size() == 2);
  CHECK(device.calls == 2 && arena.stats().reserved_bytes == 2 * kRecord);
}

TEST_CASE(a_limit_below_one_record_holds_none) {
  LockingDevice device;
  HostArena arena(device, options_of(kRecord - 1, kRecord));
  CHECK(arena.stats().capacity == 0 && arena.allocate() == nullptr && arena.stats().refusal.empty());
}

TEST_CASE(records_are_reused_last_in_first_out) {
  LockingDevice device;
  HostArena arena(device, options_of(8 * kRecord, 4 * kRecord));
  std::vector<std::byte*> records = fill(arena);
  CHECK(records.size() == 8);
  arena.free(records[2]);
  arena.free(records[7]);
  arena.free(records[0]);
  CHECK(arena.stats().used == 5);
  CHECK(arena.allocate() == records[0] && arena.allocate() == records[7] && arena.allocate() == records[2]);
  CHECK(arena.allocate() == nullptr && device.calls == 2);
}

TEST_CASE(what_cannot_be_freed) {
  LockingDevice device;
  HostArena arena(device, options_of(4 * kRecord, 2 * kRecord));
  std::byte other[1];
  CHECK_THROWS(std::invalid_argument, "not an address", arena.free(other));
  std::byte* const record = arena.allocate();
  CHECK_THROWS(std::invalid_argument, "not an address", arena.free(record + kAlignment));
  CHECK_THROWS(std::invalid_argument, "not an address", arena.free(record + 2 * kRecord));
  CHECK_THROWS(std::invalid_argument, "not an address", arena.free(nullptr));
  CHECK_THROWS(std::invalid_argument, "free already", arena.free(record + kRecord));
  arena.free(record);
  CHECK_THROWS(std::invalid_argument, "free already", arena.free(record));
  CHECK(arena.stats().used == 0);
}

TEST_CASE(memory_stays_flat) {
  LockingDevice device;
  HostArena arena(device, options_of(64 * kRecord, 16 * kRecord));
  std::vector<std::byte*> held = fill(arena);
  CHECK(held.size() == 64);
  std::mt19937 random(5);
  std::int64_t before = 0;
  for (int i = 0; i < 110000; ++i) {
    if (i == 10000) before = resident_bytes();
    if (!held.empty() && (held.size() == 64 || random() % 2 == 0)) {
      std::swap(held[random() % held.size()], held.back());
      arena.free(held.back());
      held.pop_back();
    } else {
      held.push_back(arena.allocate());
      CHECK(held.back() != nullptr);
    }
    CHECK(arena.stats().used == static_cast<std::int64_t>(held.size()));
  }
  CHECK(arena.stats().reserved_bytes == 64 * kRecord && device.calls == 4);
  // a sanitizer keeps what was freed for a while
  CHECK(resident_bytes() - before < (std::int64_t{4} << 20));
}

// Every slab can be the one that is refused; the others are locked all the same, and each is tried once.
TEST_CASE(refused_locks_leave_slabs_pageable) {
  for (int refused = 0; refused < 4; ++refused) {
    LockingDevice device;
    device.refused = {refused};
    {
      HostArena arena(device, options_of(8 * kRecord, 2 * kRecord));
      const std::vector<std::byte*> records = fill(arena);
      CHECK(records.size() == 8);
      for (std::byte* const record : records) std::fill(record, record + kRecord, std::byte{0x77});
      const ArenaStats& stats = arena.stats();
      CHECK(stats.capacity == 8 && stats.reserved_bytes == 8 * kRecord && stats.locked_bytes == 6 * kRecord);
      CHECK(stats.pageable_slabs == 1 && stats.pageable_reason == "no lock in call " + std::to_string(refused));
      CHECK(stats.refusal.empty() && device.calls == 4);
      for (std::byte* const record : records) arena.free(record);
      CHECK(fill(arena).size() == 8 && device.calls == 4);
    }
    CHECK(device.locked.empty());
  }
}

TEST_CASE(all_locks_refused) {
  LockingDevice device;
  device.refused = {0, 1, 2, 3};
  HostArena arena(device, options_of(8 * kRecord, 2 * kRecord));
  CHECK(fill(arena).size() == 8);
  CHECK(arena.stats().locked_bytes == 0 && arena.stats().pageable_slabs == 4 && device.calls == 4);
}

TEST_CASE(locks_not_asked_for) {
  LockingDevice device;
  ArenaOptions options = options_of(4 * kRecord, 2 * kRecord);
  options.lock = false;
  HostArena arena(device, options);
  CHECK(fill(arena).size() == 4);
  CHECK(device.calls == 0 && arena.stats().locked_bytes == 0 && arena.stats().pageable_slabs == 0);
}

TEST_CASE(a_device_that_breaks_leaves_the_arena_as_it_was) {
  LockingDevice device;
  HostArena arena(device, options_of(4 * kRecord, 2 * kRecord));
  device.broken = true;
  CHECK_THROWS(std::runtime_error, "the driver is gone", arena.allocate());
  CHECK(arena.stats().used == 0 && arena.stats().reserved_bytes == 0 && arena.stats().capacity == 4);
  device.broken = false;
  CHECK(fill(arena).size() == 4);
}

// The machine says at the third slab that memory is short: the capacity is what is there, for good.
TEST_CASE(memory_that_runs_short_shrinks_the_capacity) {
  LockingDevice device;
  ArenaOptions options = options_of(8 * kRecord, 2 * kRecord);
  int asked = 0;
  options.memory = [&] { return HostMemory{++asked == 3 ? 2 * kRecord : kPlenty, kPlenty, "somebody"}; };
  HostArena arena(device, options);
  const std::vector<std::byte*> records = fill(arena);
  CHECK(records.size() == 4 && asked == 3);
  CHECK(arena.stats().capacity == 4 && arena.stats().used == 4 && arena.stats().reserved_bytes == 4 * kRecord);
  CHECK(arena.stats().refusal.find("somebody leaves " + std::to_string(2 * kRecord) + " bytes") != std::string::npos);
  CHECK(arena.stats().pageable_slabs == 0);
  arena.free(records[1]);
  CHECK(arena.allocate() == records[1] && arena.allocate() == nullptr && asked == 3);
}

// More than the address space: mmap itself refuses.
TEST_CASE(mmap_refuses) {
  LockingDevice device;
  constexpr std::int64_t kHuge = std::int64_t{1} << 60;
  ArenaOptions options;
  options.record_bytes = kHuge;
  options.limit_bytes = 4 * kHuge;
  options.slab_bytes = kHuge;
  options.memory = [] { return HostMemory{kPlenty, kPlenty, ""}; };
  HostArena arena(device, options);
  CHECK(arena.stats().capacity == 4);
  CHECK(arena.allocate() == nullptr);
  CHECK(arena.stats().capacity == 0 && arena.stats().reserved_bytes == 0 && device.calls == 0);
  CHECK(arena.stats().refusal.find("mmap: ") != std::string::npos);
}

// Large enough for huge pages and several stretches; huge pages asked for and not.
TEST_CASE(many_threads_touch_a_slab) {
  for (const int threads : {0, 1, 3, 8}) {
    for (const std::int64_t free : {kPlenty, std::int64_t{0}}) {
      LockingDevice device;
      ArenaOptions options;
      options.record_bytes = (std::int64_t{5} << 20) + 3 * kAlignment;
      options.limit_bytes = options.slab_bytes = 9 * options.record_bytes;
      options.touch_threads = threads;
      options.memory = [free] { return HostMemory{kPlenty, free, ""}; };
      const std::int64_t before = resident_bytes();
      {
        HostArena arena(device, options);
        std::byte* const record = arena.allocate();
        CHECK(record != nullptr && arena.stats().refusal == "");
        // all of the slab is there, not only the record that was given out
        CHECK(resident_bytes() - before >= options.slab_bytes * 9 / 10);
        CHECK(arena.stats().locked_bytes == options.slab_bytes);
        record[options.record_bytes - 1] = std::byte{1};
      }
      CHECK(resident_bytes() - before < options.slab_bytes / 2);
    }
  }
}

TEST_CASE(two_arenas_share_a_device) {
  LockingDevice device;
  HostArena first(device, options_of(4 * kRecord, 2 * kRecord));
  {
    HostArena second(device, options_of(4 * kRecord, 2 * kRecord));
    CHECK(fill(first).size() == 4);
    std::byte* const record = second.allocate();
    CHECK_THROWS(std::invalid_argument, "not an address", first.free(record));
  }
  CHECK(device.locked_bytes() == static_cast<std::size_t>(4 * kRecord));
}
