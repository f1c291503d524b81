// The bank against a map of byte vectors: random calls, tiny limits, devices that are late, memory that runs out.
#include <random>
#include <set>

#include "tests/bank_case.h"
#include "tests/scripted_device.h"

namespace {

// New memory of this thread fails once the count is at zero; < 0: never.
thread_local long allocations_left = -1;

struct Held {
  std::int64_t stamp = 0, generation = 0;
  int pins = 0;
  bool asked = false;  // prefetched and not settled
};

struct Model {
  std::map<Frame, Held> frames;
  std::int64_t stamps = 0;
  Frame next = 0;
};

// One random run. Compute streams write the pages that are committed, overwrite them after wait(), and read slots; all
// of it late. What they read is compared when they do.
void run(unsigned seed, int operations, std::int64_t host, std::int64_t disk, Slot slot_count) {
  Rig rig(slot_count, host, disk, 2, 2);
  std::mt19937 random(seed);
  auto made = std::make_unique<ScriptedDevice>(seed);
  ScriptedDevice& device = *made;
  rig.open(std::move(made));
  Bank& bank = *rig.bank;
  Model model;
  std::vector<std::unique_ptr<Source>> sources;  // live until the device is done with them
  // The caller's own work on the slots before the bank had them.
  for (int stream = 0; stream < 2; ++stream) {
    device.compute(0, [&] {
      for (Bytes& plane : rig.slots.planes) std::fill(plane.begin(), plane.end(), 0);
    });
  }
  device.compute(1, [] {});
  const EventRef zeroed = device.record(0);
  device.wait(1, zeroed);
  int compared = 0;
  const auto pick = [&](int count) { return static_cast<int>(random() % static_cast<unsigned>(count)); };
  const auto choose = [&](auto allowed) {
    std::vector<Frame> found;
    for (const auto& [frame, held] : model.frames) {
      if (allowed(held)) found.push_back(frame);
    }
    return found.empty() ? Frame{-1} : found[static_cast<std::size_t>(pick(static_cast<int>(found.size())))];
  };
  const auto pinned = [&] {
    std::int64_t count = 0;
    for (const auto& [frame, held] : model.frames) count += held.pins > 0;
    return count;
  };
  const auto commit = [&](const std::vector<Frame>& frames, bool replace, Stream stream) {
    std::vector<PageSource> pages;
    std::vector<Source*> mine;
    std::vector<std::int64_t> stamps;
    for (const Frame frame : frames) {
      const std::int64_t stamp = ++model.stamps;
      sources.push_back(std::make_unique<Source>());
      Source* source = sources.back().get();
      device.compute(stream, [source, frame, stamp] { source->set(record_of(frame + 1000 * stamp)); });
      pages.push_back(source->pages());
      mine.push_back(source);
      stamps.push_back(stamp);
    }
    bank.commit(frames, pages, stream, replace);
    for (std::size_t i = 0; i < frames.size(); ++i) {
      Held& held = model.frames[frames[i]];
      held.stamp = stamps[i];
      if (replace) ++held.generation;
      held.pins = 0;
      if (replace) held.asked = false;
    }
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      bank.wait(layer, stream);
      for (Source* source : mine) {
        device.compute(stream, [source, layer] {
          for (std::int64_t sample = 0; sample < kSamples; ++sample) {
            for (int s = 0; s < 2; ++s) std::memset(source->at(s, layer, sample), 0xDD, 700);
          }
        });
      }
    }
  };
  for (int i = 0; i < operations; ++i) {
    const Stream stream = random() % 2;
    const int what = pick(100);
    if (what < 30) {
      const int count = 1 + pick(2);
      std::vector<Frame> frames;
      for (int n = 0; n < count; ++n) frames.push_back(model.next++);
      if (bank.room() >= count) {
        commit(frames, false, stream);
      } else {
        CHECK_THROWS(BankFull, "room", commit(frames, false, stream));
        const Frame old = choose([](const Held& held) { return held.pins == 0; });
        if (old >= 0) {
          bank.forget({old});
          model.frames.erase(old);
        }
      }
    } else if (what < 40) {
      const Frame frame = choose([](const Held&) { return true; });
      if (frame >= 0) commit({frame}, true, stream);
    } else if (what < 65) {
      std::vector<Frame> frames;
      for (int n = 1 + pick(2); n > 0; --n) {
        const Frame frame = choose([](const Held&) { return true; });
        if (frame >= 0) frames.push_back(frame);
      }
      std::set<Frame> fresh;
      for (const Frame frame : frames) {
        if (model.frames[frame].pins == 0) fresh.insert(frame);
      }
      if (pinned() + static_cast<std::int64_t>(fresh.size()) > slot_count) {
        CHECK_THROWS(BankFull, "slots", bank.prefetch(frames, stream));
        continue;
      }
      bank.prefetch(frames, stream);
      for (const Frame frame : frames) {
        ++model.frames[frame].pins;
        CHECK(bank.where(frame).slot >= kFirst);
      }
      if (pick(3) == 0) continue;  // settled later, by wait() perhaps
      if (pick(2) == 0) {
        for (const Lost& lost : bank.settle()) CHECK(lost.reason == "replaced" || lost.reason == "missing");
      }
      for (std::int64_t layer = 0; layer < kLayers; ++layer) {
        bank.wait(layer, stream);
        for (const Frame frame : frames) {
          const Slot slot = bank.where(frame).slot;
          const std::int64_t stamp = model.frames[frame].stamp;
          device.compute(stream, [&rig, &compared, slot, layer, frame, stamp] {
            CHECK(rig.slots.holds(slot, layer, record_of(frame + 1000 * stamp)));
            ++compared;
          });
        }
      }
      if (pick(2) == 0) {
        bank.release(frames, stream);
        for (const Frame frame : frames) --model.frames[frame].pins;
      }
    } else if (what < 75) {
      const Frame frame = choose([](const Held& held) { return held.pins > 0; });
      if (frame < 0) continue;
      // On the stream that may still read it, which waits for the other: as a caller with two streams has to.
      device.wait(stream, device.record(1 - stream));
      bank.release({frame}, stream);
      --model.frames[frame].pins;
    } else if (what < 82) {
      const Frame frame = choose([](const Held& held) { return held.pins == 0; });
      if (frame < 0) continue;
      bank.forget({frame});
      model.frames.erase(frame);
    } else if (what < 90) {
      const Frame frame = choose([](const Held&) { return true; });
      if (frame >= 0) CHECK(rig.has(frame, model.frames[frame].stamp));
    } else if (what < 94) {
      if (bank.room() < 1) continue;
      const Frame frame = model.next++;
      const std::int64_t stamp = ++model.stamps;
      const Bytes record = record_of(frame + 1000 * stamp);
      bank.insert(frame, reinterpret_cast<const std::byte*>(record.data()), 3);
      model.frames[frame] = {stamp, 3, 0, false};
    } else if (what < 97) {
      device.some(pick(40));
    } else if (what == 97) {
      bank.flush();
    } else if (what == 98) {
      for (const Lost& lost : bank.settle()) CHECK(lost.reason == "replaced" || lost.reason == "missing");
    } else if (pick(4) == 0) {
      bank.clear();
      model.frames.clear();
    }
    const BankStats stats = bank.stats();
    CHECK(stats.frames == static_cast<std::int64_t>(model.frames.size()));
    CHECK(stats.host.used <= host && stats.host.used >= stats.host_frames);
    CHECK(stats.disk.used <= disk && stats.disk.used >= stats.disk_frames);
    CHECK(stats.damaged_pages == 0 && stats.failed_spills == 0);
    if (i % 16 == 0) {
      std::int64_t in_slots = 0;
      for (const auto& [frame, held] : model.frames) {
        const Where where = bank.where(frame);
        CHECK(where.generation == held.generation);
        CHECK(where.host || where.disk || where.slot >= 0);
        CHECK(held.pins == 0 || where.slot >= kFirst);
        in_slots += where.slot >= 0;
      }
      CHECK(in_slots == bank.stats().device_frames);
    }
  }
  device.drain();
  for (const auto& [frame, held] : model.frames) CHECK(rig.has(frame, held.stamp));
  bank.flush();
  device.drain();
  const BankStats stats = bank.stats();
  CHECK(stats.host.used == stats.host_frames && stats.disk.used == stats.disk_frames);
  CHECK(slot_count == 0 || operations < 200 || compared > 0);
}

}  // namespace

// GCC takes the pair below for a mismatch where it inlines one of the two.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
void* operator new(std::size_t bytes) {
  if (allocations_left >= 0 && allocations_left-- == 0) {
    allocations_left = -1;  // once
    throw std::bad_alloc();
  }
  void* memory = std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

TEST_CASE(random_calls_host_memory_only) {
  for (unsigned seed = 0; seed < 12; ++seed) run(seed, 400, 6, 0, static_cast<Slot>(2 + seed % 4));
}

TEST_CASE(random_calls_with_a_disk) {
  for (unsigned seed = 100; seed < 112; ++seed) run(seed, 400, 5, 7, static_cast<Slot>(2 + seed % 4));
}

TEST_CASE(random_calls_at_the_smallest_sizes) {
  for (unsigned seed = 200; seed < 206; ++seed) run(seed, 300, 4, 2, 2);
  for (unsigned seed = 206; seed < 209; ++seed) run(seed, 300, 2, 0, 1);
}

// Each call fails at its n-th allocation, for every n: it has no effect then, but that caches may have been dropped.
TEST_CASE(memory_runs_out_anywhere) {
  int failures = 0;
  for (long left = 0; left < 400; ++left) {
    Rig rig(2, 4, 6, 2, 2);
    rig.open();
    rig.commit({0, 1});
    rig.commit({2, 3});
    rig.bank->flush();
    Source sources[2];
    std::vector<PageSource> pages;
    const auto set = [&](std::int64_t stamp) {
      pages.clear();
      for (int i = 0; i < 2; ++i) {
        sources[i].set(record_of(4 + i + 1000 * stamp));
        pages.push_back(sources[i].pages());
      }
    };
    bool failed = false;
    const auto attempt = [&](auto call) {
      allocations_left = left;
      bool threw = false;
      try {
        call();
      } catch (const std::bad_alloc&) {
        threw = true;
        ++failures;
      }
      failed = failed || threw;
      allocations_left = -1;
      return !threw;
    };
    const std::vector<Frame> pair{4, 5}, mixed{0, 4, 70};
    set(0);
    const bool first = attempt([&] { rig.bank->commit(pair, pages, 0, false); });
    CHECK(rig.bank->frames().size() == (first ? 6u : 4u));
    if (!first) rig.commit({4, 5});
    set(1);
    const bool second = attempt([&] { rig.bank->commit(pair, pages, 0, true); });
    for (const Frame frame : pair) {
      CHECK(rig.bank->where(frame).generation == (second ? 1 : 0));
      CHECK(rig.has(frame, second ? 1 : 0));
    }
    const std::int64_t stamp = second ? 1 : 0;
    const bool third = attempt([&] { rig.bank->prefetch(mixed, 0); });
    const bool fourth = attempt([&] { rig.bank->settle(); });
    if (!fourth) rig.bank->settle();
    if (third) {
      CHECK(rig.in_slot(0) && rig.in_slot(4, stamp));
      CHECK_THROWS(BankFull, "slots", rig.bank->prefetch({1}, 0));
      if (!attempt([&] { rig.bank->release(mixed, 0); })) rig.bank->release(mixed, 0);
    }
    rig.bank->prefetch({1, 2}, 0);  // nothing else is pinned
    CHECK(rig.bank->settle().empty());
    CHECK(rig.in_slot(1) && rig.in_slot(2));
    rig.bank->release({1, 2}, 0);
    const Bytes record = record_of(9);
    if (attempt([&] { rig.bank->insert(9, reinterpret_cast<const std::byte*>(record.data()), 0); })) CHECK(rig.has(9));
    const std::vector<Frame> gone{3};
    if (attempt([&] { rig.bank->forget(gone); })) CHECK(rig.bank->where(3).generation == -1);
    rig.bank->flush();
    const BankStats stats = rig.bank->stats();
    CHECK(stats.host.used == stats.host_frames && stats.disk.used == stats.disk_frames);
    for (const Frame frame : {Frame{0}, Frame{1}, Frame{2}}) CHECK(rig.has(frame));
    if (!failed) {
      CHECK(failures > 50);
      return;
    }
  }
  CHECK(false);  // there are not so many allocations
}
