// Tests of the slot table without Python. `slot_table_test NAME` runs one case, without a name all of them.
// The checks work in release builds, too.
#include "slot_table.h"

#include "tests/test_case.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <list>
#include <map>
#include <new>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

using longlive::SlotTable;

// The number of allocations that still succeed, < 0 for no limit: memory can be made to run out at any point of a call.
static long allocations_left = -1;

void* operator new(std::size_t size) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using Frames = std::vector<SlotTable::Frame>;

// Everything that can be seen from outside.
std::string state(const SlotTable& table) {
  std::string text = std::to_string(table.capacity()) + ":";
  for (const auto frame : table.frames()) {
    text += " " + std::to_string(frame) + "@" + std::to_string(table.lookup(frame)) + "x" + std::to_string(table.pins(frame));
  }
  return text;
}

}  // namespace

TEST_CASE(gives_slots_in_ascending_order) {
  SlotTable table(3, 12);
  CHECK(table.size() == 0 && table.capacity() == 3 && table.first() == 12);
  for (int i = 0; i < 3; ++i) {
    const auto got = table.acquire(100 - i);
    CHECK(got.slot == 12 + i && got.is_new && !got.evicted);
  }
  const auto again = table.acquire(99);
  CHECK(again.slot == 13 && !again.is_new && !again.evicted);
  CHECK(table.size() == 3);
}

TEST_CASE(evicts_the_least_recently_used) {
  SlotTable table(3);
  table.acquire_many({1, 2, 3});
  CHECK(table.touch(1) == 0);
  CHECK(table.lookup(2) == 1);  // no use: 2 is evicted all the same
  const auto got = table.acquire(4);
  CHECK(got.slot == 1 && got.is_new && got.evicted == 2);
  CHECK(table.lookup(2) == -1 && table.touch(2) == -1);
  CHECK((table.frames() == Frames{3, 1, 4}));
}

TEST_CASE(reuses_the_lowest_released_slot_first) {
  SlotTable table(5);
  table.acquire_many({10, 11, 12, 13});
  CHECK(table.release(12) == 2);
  CHECK(table.release(10) == 0);
  CHECK(table.release(11) == 1);
  CHECK(table.acquire(20).slot == 0);
  CHECK(table.acquire(21).slot == 1);
  CHECK(table.acquire(22).slot == 2);
  CHECK(table.acquire(23).slot == 4);  // never used before
  CHECK(table.acquire(24).evicted == 13);
}

TEST_CASE(pins_protect_and_count) {
  SlotTable table(2);
  table.acquire_many({1, 2});
  CHECK(table.pin(1) == 1 && table.pin(1) == 2 && table.pins(1) == 2 && table.pins(2) == 0 && table.pins(9) == 0);
  CHECK(table.acquire(3).evicted == 2);
  CHECK(table.pin(3) == 1);
  const std::string before = state(table);
  CHECK_THROWS(std::runtime_error, "2 pinned", table.acquire(4));
  CHECK_THROWS(std::runtime_error, "2 pin(s)", table.release(1));
  CHECK(state(table) == before);
  CHECK(!table.acquire(1).is_new);  // a frame that is there needs no slot
  CHECK(table.unpin(1) == 1);
  CHECK_THROWS(std::runtime_error, "no slot", table.acquire(4));
  CHECK(table.unpin(1) == 0);
  CHECK_THROWS(std::runtime_error, "frame 1: it is not pinned", table.unpin(1));
  CHECK(table.acquire(4).evicted == 1);
}

TEST_CASE(unpinning_is_a_use) {
  SlotTable table(3);
  table.acquire_many({1, 2, 3});
  table.pin(1);
  CHECK((table.frames() == Frames{2, 3, 1}));
  table.unpin(1);
  CHECK((table.frames() == Frames{2, 3, 1}));
}

TEST_CASE(acquire_many_is_all_or_nothing) {
  SlotTable table(4);
  table.acquire_many({1, 2, 3});
  table.pin(1);
  const std::string before = state(table);
  CHECK_THROWS(std::runtime_error, "no slot for 3", table.acquire_many({2, 4, 5, 6}));  // one free + frame 3
  CHECK(state(table) == before);
  CHECK_THROWS(std::invalid_argument, "frame must be >= 0, got -7", table.acquire_many({8, -7}));
  CHECK(state(table) == before && table.lookup(8) == -1);
  CHECK(table.acquire_many({}).empty());
  CHECK(state(table) == before);
}

TEST_CASE(acquire_many_keeps_its_own_frames) {
  SlotTable table(3);
  table.acquire_many({1, 2, 3});
  const auto got = table.acquire_many({4, 1, 4, 5});  // 1 is the oldest, yet 2 and 3 go
  CHECK(got.size() == 4);
  CHECK(got[0].slot == 1 && got[0].is_new && got[0].evicted == 2);
  CHECK(got[1].slot == 0 && !got[1].is_new && !got[1].evicted);
  CHECK(got[2].slot == 1 && !got[2].is_new && !got[2].evicted);
  CHECK(got[3].slot == 2 && got[3].is_new && got[3].evicted == 3);
  CHECK((table.frames() == Frames{1, 4, 5}));
  table.acquire_many({1, 1, 4, 6});  // naming 1 twice keeps one slot, not two: 5 can go
  CHECK((table.frames() == Frames{1, 4, 6}));
}

TEST_CASE(clear_forgets_everything) {
  SlotTable table(3, 5);
  table.acquire_many({1, 2, 3});
  table.pin(2);
  table.release(1);
  table.clear();
  CHECK(table.size() == 0 && table.frames().empty() && table.pins(2) == 0 && table.capacity() == 3);
  const auto got = table.acquire_many({7, 8, 9});
  CHECK(got[0].slot == 5 && got[1].slot == 6 && got[2].slot == 7);
  CHECK(table.pins(7) == 0 && table.pins(8) == 0);
  CHECK(table.acquire(10).evicted == 7);
}

TEST_CASE(grow_keeps_slots) {
  SlotTable table(2, 3);
  table.acquire_many({1, 2});
  CHECK_THROWS(std::invalid_argument, "new_capacity must be >= the present capacity 2, got 1", table.grow(1));
  table.grow(2);
  table.grow(4);
  CHECK(table.capacity() == 4 && table.lookup(1) == 3 && table.lookup(2) == 4);
  CHECK(table.acquire(3).slot == 5 && table.acquire(4).slot == 6);
  CHECK(table.acquire(5).evicted == 1);
}

TEST_CASE(rejects_what_is_not_allowed) {
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
  CHECK_THROWS(std::invalid_argument, "capacity must be in 1 ..", SlotTable(0));
  CHECK_THROWS(std::invalid_argument, "got -3", SlotTable(-3));
  CHECK_THROWS(std::invalid_argument, "capacity must be in 1 .. 2147483647", SlotTable(most + 1));
  CHECK_THROWS(std::invalid_argument, "got 9223372036854775807", SlotTable(std::numeric_limits<std::int64_t>::max(), 1));
  CHECK_THROWS(std::invalid_argument, "first must be in 0 ..", SlotTable(1, -1));
  CHECK_THROWS(std::invalid_argument, "first must be in 0 ..", SlotTable(1, most + 1));
  CHECK_THROWS(std::invalid_argument, "capacity must be in 1 .. 1 ", SlotTable(2, most));
  SlotTable last(1, most);
  CHECK(last.acquire(std::numeric_limits<std::int64_t>::max()).slot == most);
  CHECK_THROWS(std::invalid_argument, "new_capacity must be in 1 .. 1 ", last.grow(2));

  SlotTable table(1);
  CHECK_THROWS(std::invalid_argument, "frame must be >= 0, got -1", table.acquire(-1));
  CHECK_THROWS(std::invalid_argument, "got -1", table.lookup(-1));
  CHECK_THROWS(std::invalid_argument, "got -1", table.touch(-1));
  CHECK_THROWS(std::invalid_argument, "got -1", table.pins(-1));
  CHECK_THROWS(std::invalid_argument, "cannot pin frame 5: it has no slot", table.pin(5));
  CHECK_THROWS(std::invalid_argument, "cannot unpin frame 5", table.unpin(5));
  CHECK_THROWS(std::invalid_argument, "cannot release frame 5", table.release(5));
}

TEST_CASE(survives_running_out_of_memory_at_every_point) {
  for (long allowed = 0;; ++allowed) {
    SlotTable table(6);
    table.acquire_many({1, 2, 3, 4});
    table.pin(2);
    const std::string before = state(table);
    const Frames request{3, 10, 11, 12, 10, 13};
    bool failed = false;
    allocations_left = allowed;
    try {
      table.acquire_many(request);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    allocations_left = -1;
    if (!failed) {
      CHECK(allowed > 2);  // it did run out on the way here
      CHECK((table.frames() == Frames{3, 11, 12, 10, 13, 2}));
      return;
    }
    CHECK(state(table) == before);
    CHECK(table.acquire_many(request).size() == request.size());  // and it still works
  }
}

TEST_CASE(gives_slots_back_without_memory) {
  for (const int capacity : {40, 80}) {
    SlotTable table(40);
    if (capacity > 40) table.grow(capacity);
    for (int frame = 0; frame < capacity; ++frame) table.acquire(frame);
    allocations_left = 0;
    for (int frame = 0; frame < capacity; ++frame) {
      table.pin(frame);
      table.unpin(frame);
      table.release(frame);
    }
    table.clear();
    allocations_left = -1;
    CHECK(table.size() == 0);
  }
}

// A table of the simplest kind: searches everything, links nothing.
TEST_CASE(agrees_with_a_simple_model) {
  std::mt19937 random(7);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 200; ++round) {
    std::int64_t capacity = 1 + below(6);
    SlotTable table(capacity, 10);
    std::list<SlotTable::Frame> order;  // oldest use first
    std::map<SlotTable::Frame, std::pair<int, int>> held;  // frame -> slot, pins
    const auto use = [&](SlotTable::Frame frame) {
      order.remove(frame);
      order.push_back(frame);
    };
    for (int step = 0; step < 200; ++step) {
      const SlotTable::Frame frame = below(10);
      const bool there = held.count(frame) > 0;
      switch (below(8)) {
        case 0:
        case 1:
        case 2: {
          std::set<int> free;
          for (int slot = 10; slot < 10 + capacity; ++slot) free.insert(slot);
          for (const auto& [_, place] : held) free.erase(place.first);
          int slot = -1;
          SlotTable::Frame victim = -1;
          if (there) {
            slot = held[frame].first;
          } else if (!free.empty()) {
            slot = *free.begin();
          } else {
            for (const auto candidate : order) {
              if (held[candidate].second == 0) {
                victim = candidate;
                slot = held[candidate].first;
                break;
              }
            }
          }
          if (slot < 0) {
            CHECK_THROWS(std::runtime_error, "no slot", table.acquire(frame));
            break;
          }
          if (victim >= 0) {
            held.erase(victim);
            order.remove(victim);
          }
          const auto got = table.acquire(frame);
          CHECK(got.slot == slot && got.is_new == !there && got.evicted.value_or(-1) == victim);
          if (!there) held[frame] = {slot, 0};
          use(frame);
          break;
        }
        case 3:
          CHECK(table.touch(frame) == (there ? held[frame].first : -1));
          if (there) use(frame);
          break;
        case 4:
          if (!there) break;
          CHECK(table.pin(frame) == ++held[frame].second);
          if (held[frame].second == 1) use(frame);
          break;
        case 5:
          if (!there || held[frame].second == 0) break;
          CHECK(table.unpin(frame) == --held[frame].second);
          if (held[frame].second == 0) use(frame);
          break;
        case 6:
          if (!there || held[frame].second > 0) break;
          CHECK(table.release(frame) == held[frame].first);
          held.erase(frame);
          order.remove(frame);
          break;
        default:
          if (below(20) == 0) table.grow(++capacity);
      }
      CHECK(table.size() == held.size() && table.capacity() == capacity);
      Frames expected;
      for (const bool pinned : {false, true}) {
        for (const auto f : order) {
          if ((held[f].second > 0) == pinned) expected.push_back(f);
        }
      }
      CHECK(table.frames() == expected);
      for (SlotTable::Frame f = 0; f < 10; ++f) CHECK(table.lookup(f) == (held.count(f) ? held[f].first : -1));
    }
  }
}
