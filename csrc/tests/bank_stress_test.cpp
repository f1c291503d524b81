// Many threads on one bank over the host device and a disk. What they read is their own, or says whose it is; meant for
// -fsanitize=thread and address as much as for its own checks (make sanitize).
#include "bank/bank.h"

#include "tests/test_case.h"

#include <atomic>
#include <chrono>
#include <filesystem>
#include <random>
#include <thread>

using namespace longlive::bank;

namespace {

constexpr std::int64_t kLayers = 2, kSamples = 2, kPage = 4096, kSlots = 12;
constexpr Segment kSegments[] = {{0, 1536}, {1536, 1000}};
constexpr std::int64_t kRecord = kLayers * kSamples * kPage;

// A slot tensor of the bytes the segments have, and the geometry of it: [layer][segment][sample][slot], from slot 1 on.
struct SlotMemory {
  std::vector<std::byte> bytes;
  SlotGeometry geometry;

  explicit SlotMemory(Slot count) : bytes(static_cast<std::size_t>(kLayers * kSamples * (count + 1) * kPage)) {
    const std::int64_t plane = kSamples * (count + 1) * 1536;
    for (int part = 0; part < 2; ++part) {
      geometry.parts.push_back({reinterpret_cast<std::uintptr_t>(bytes.data()) + static_cast<std::uintptr_t>(part * plane),
                                2 * plane, (count + 1) * 1536, 1536});
    }
    geometry.first = 1;
    geometry.count = count;
  }
  const std::uint64_t* at(int part, std::int64_t layer, std::int64_t sample, Slot slot) const {
    const auto& p = geometry.parts[static_cast<std::size_t>(part)];
    return reinterpret_cast<const std::uint64_t*>(p.base + static_cast<std::uintptr_t>(
        layer * p.layer_stride + sample * p.sample_stride + slot * p.slot_stride));
  }
};

// What a frame's words are: made of the frame, a stamp of who wrote it when, and the place.
std::uint64_t word(Frame frame, std::uint64_t stamp, std::int64_t layer, std::int64_t sample, int part) {
  return (static_cast<std::uint64_t>(frame) << 40) ^ (stamp << 8) ^ static_cast<std::uint64_t>(layer * 8 + sample * 4 + part);
}

struct Pages {
  std::vector<std::uint64_t> words[2];
  PageSource source;

  Pages(Frame frame, std::uint64_t stamp) {
    for (int part = 0; part < 2; ++part) {
      const auto each = static_cast<std::size_t>(kSegments[part].bytes / 8);
      for (std::int64_t layer = 0; layer < kLayers; ++layer) {
        for (std::int64_t sample = 0; sample < kSamples; ++sample) {
          words[part].insert(words[part].end(), each, word(frame, stamp, layer, sample, part));
        }
      }
      source.parts.push_back({reinterpret_cast<std::uintptr_t>(words[part].data()), kSamples * kSegments[part].bytes,
                              kSegments[part].bytes});
    }
  }
  // A commit copies: what it was given is worthless afterwards.
  void spoil() {
    for (auto& part : words) std::fill(part.begin(), part.end(), 0xABABABABABABABABu);
  }
};

// The stamp of a record all of whose words agree on it; fails otherwise.
std::uint64_t stamp_of(const std::vector<std::byte>& record, Frame frame) {
  std::uint64_t first;
  std::memcpy(&first, record.data(), 8);
  const std::uint64_t stamp = (first ^ word(frame, 0, 0, 0, 0)) >> 8;
  for (std::int64_t layer = 0; layer < kLayers; ++layer) {
    for (std::int64_t sample = 0; sample < kSamples; ++sample) {
      const std::byte* page = record.data() + (layer * kSamples + sample) * kPage;
      for (int part = 0; part < 2; ++part) {
        for (std::int64_t at = 0; at < kSegments[part].bytes; at += 8) {
          std::uint64_t got;
          std::memcpy(&got, page + kSegments[part].offset + at, 8);
          CHECK(got == word(frame, stamp, layer, sample, part));
        }
      }
      for (std::int64_t at = kSegments[1].offset + kSegments[1].bytes; at < kPage; ++at) CHECK(page[at] == std::byte{0});
    }
  }
  return stamp;
}

// A folder of its own, gone afterwards.
struct Folder {
  std::filesystem::path path;
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "longlive-stress-XXXXXX").string();
    CHECK(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Folder() { std::filesystem::remove_all(path); }
};

BankOptions options(const SlotMemory& slots, const std::string& folder, std::int64_t host, std::int64_t disk) {
  BankOptions made;
  made.layout = {kLayers, kSamples, kPage, {kSegments[0], kSegments[1]}};
  made.slots = slots.geometry;
  made.host.limit_bytes = host * kRecord;
  made.host.slab_bytes = 3 * kRecord;
  made.disk.folder = folder;
  made.disk.limit_bytes = disk * kRecord;
  made.disk.shard_bytes = 5 * kRecord;
  made.io_threads = 4;
  made.bounce_records = disk > 0 ? 8 : 0;
  made.commit_records = 2;
  return made;
}

// What a thread did, all together; a test that did nothing has shown nothing.
struct Tally {
  std::atomic<int> committed{0}, replaced{0}, fetched{0}, read{0}, forgotten{0}, full{0};
};

// One thread's life with the frames that only it touches: whatever the others do, each read gives what it wrote last.
void live(Bank& bank, const SlotMemory& slots, int thread, int threads, int steps, Tally* tally) {
  std::mt19937 random(static_cast<unsigned>(thread));
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  std::vector<std::uint64_t> stamp(6, 0);  // of frame thread + i * threads; 0: not in the bank
  std::uint64_t next = static_cast<std::uint64_t>(thread) * 1000000 + 1;
  std::vector<std::byte> record(static_cast<std::size_t>(kRecord));
  for (int step = 0; step < steps; ++step) {
    const int i = below(static_cast<int>(stamp.size()));
    const Frame frame = thread + i * threads;
    const auto stream = static_cast<Stream>(thread);
    switch (below(8)) {
      case 0:
      case 1: {
        Pages pages(frame, next);
        try {
          bank.commit({frame}, {pages.source}, stream, stamp[i] != 0);
          ++(stamp[i] ? tally->replaced : tally->committed);
          stamp[i] = next++;
        } catch (const BankFull&) {
          CHECK(stamp[i] == 0);  // what is there can always be committed anew
          ++tally->full;
        }
        pages.spoil();
        break;
      }
      case 2:
      case 3:
      case 4: {
        if (!stamp[i]) break;
        try {
          bank.prefetch({frame}, stream);
        } catch (const BankFull&) {
          ++tally->full;
          break;
        }
        for (const Lost& lost : bank.settle()) CHECK(lost.frame < 0);  // nobody asks for what is not there
        const Slot slot = bank.where(frame).slot;
        CHECK(slot >= 1 && slot <= kSlots);
        for (std::int64_t layer = 0; layer < kLayers; ++layer) {
          bank.wait(layer, stream);
          for (std::int64_t sample = 0; sample < kSamples; ++sample) {
            for (int part = 0; part < 2; ++part) {
              const std::uint64_t* got = slots.at(part, layer, sample, slot);
              for (std::int64_t at = 0; at < kSegments[part].bytes / 8; ++at) {
                CHECK(got[at] == word(frame, stamp[i], layer, sample, part));
              }
            }
          }
        }
        bank.release({frame}, stream);
        ++tally->fetched;
        break;
      }
      case 5:
        if (!stamp[i]) {
          CHECK_THROWS(std::out_of_range, std::to_string(frame), bank.read(frame, record.data()));
          break;
        }
        bank.read(frame, record.data());
        CHECK(stamp_of(record, frame) == stamp[i]);
        ++tally->read;
        break;
      case 6:
        if (!stamp[i] || below(2)) break;
        bank.forget({frame});
        stamp[i] = 0;
        CHECK(bank.where(frame).generation == -1);
        ++tally->forgotten;
        break;
      default: {
        const BankStats stats = bank.stats();
        CHECK(stats.host.used <= stats.host.capacity && stats.disk.used <= stats.disk.capacity);
        CHECK(stats.damaged_pages == 0 && stats.failed_spills == 0);
        CHECK((bank.where(frame).generation >= 0) == (stamp[i] != 0));
        (void)bank.room();
        if (below(8) == 0) bank.flush();
      }
    }
  }
  for (std::size_t i = 0; i < stamp.size(); ++i) {
    if (!stamp[i]) continue;
    bank.read(thread + static_cast<Frame>(i) * threads, record.data());
    CHECK(stamp_of(record, thread + static_cast<Frame>(i) * threads) == stamp[i]);
  }
}

// Runs the same function in several threads.
template <typename Function>
void together(int threads, const Function& run) {
  std::vector<std::thread> all;
  for (int thread = 0; thread < threads; ++thread) all.emplace_back([&run, thread] { run(thread); });
  for (std::thread& one : all) one.join();
}

}  // namespace

TEST_CASE(threads_with_frames_of_their_own_never_read_another_s) {
  for (const std::int64_t disk : {std::int64_t{20}, std::int64_t{0}}) {
    Folder folder;
    SlotMemory slots(kSlots);
    Bank bank(options(slots, folder.path.string(), disk ? 12 : 16, disk), make_host_device());
    Tally tally;
    together(4, [&](int thread) { live(bank, slots, thread, 4, 1000, &tally); });
    bank.flush();
    const BankStats stats = bank.stats();
    CHECK(stats.frames == static_cast<std::int64_t>(bank.frames().size()));
    CHECK(stats.frames == tally.committed - tally.forgotten && stats.replaced == tally.replaced);
    CHECK(tally.committed > 30 && tally.replaced > 30 && tally.fetched > 100 && tally.read > 50 && tally.forgotten > 10);
    CHECK(disk == 0 || (stats.spilled > 10 && stats.hits_disk > 10));
    bank.close();
  }
}

// Frames that belong to nobody: any thread may replace, forget or drop them all at any time. Nothing can be said of which
// stamp is read, but it is one stamp throughout, the frame's own, and never an older one than the reader has seen.
TEST_CASE(a_record_is_never_a_mixture) {
  constexpr int kFrames = 10;
  Folder folder;
  SlotMemory slots(kSlots);
  Bank bank(options(slots, folder.path.string(), 12, 8), make_host_device());
  std::atomic<std::uint64_t> next{1};
  std::atomic<int> reads{0}, commits{0};
  together(4, [&](int thread) {
    std::mt19937 random(static_cast<unsigned>(100 + thread));
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    std::vector<std::byte> record(static_cast<std::size_t>(kRecord));
    for (int step = 0; step < 1000; ++step) {
      const Frame frame = below(kFrames);
      const std::int64_t before = bank.where(frame).generation;
      try {
        switch (below(6)) {
          case 0:
          case 1: {
            Pages pages(frame, next++);
            bank.commit({frame}, {pages.source}, 0, before >= 0);
            pages.spoil();
            ++commits;
            break;
          }
          case 2:
            bank.prefetch({frame, (frame + 1) % kFrames}, 0);
            bank.wait(below(kLayers), 0);
            bank.release({frame, (frame + 1) % kFrames}, 0);
            break;
          case 3:
            bank.forget({frame});
            break;
          default:
            bank.read(frame, record.data());
            stamp_of(record, frame);
            ++reads;
            if (step % 100 == 99) bank.clear();
        }
      } catch (const BankFull&) {
      } catch (const std::invalid_argument&) {  // it came, went or was pinned meanwhile
      } catch (const std::out_of_range&) {
      }
    }
  });
  CHECK(reads > 50 && commits > 50);
  bank.clear();
  bank.flush();
  const BankStats stats = bank.stats();
  CHECK(stats.frames == 0 && stats.host.used == 0 && stats.disk.used == 0 && stats.damaged_pages == 0);
}

TEST_CASE(closing_in_the_middle_ends_every_thread_with_an_error) {
  for (int round = 0; round < 12; ++round) {
    Folder folder;
    SlotMemory slots(kSlots);
    Bank bank(options(slots, folder.path.string(), 12, 20), make_host_device());
    std::atomic<int> ended{0};
    together(4, [&](int thread) {
      if (thread == 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2 * round));
        bank.close();
        bank.close();
        return;
      }
      Tally tally;
      try {
        live(bank, slots, thread, 4, 1 << 30, &tally);
      } catch (const BankFull&) {
        throw;
      } catch (const std::runtime_error& error) {
        CHECK(std::string(error.what()).find("closed") != std::string::npos);
        ++ended;
      }
    });
    CHECK(ended == 3 && bank.closed());
    CHECK_THROWS(std::runtime_error, "closed", bank.stats());
    CHECK(std::filesystem::is_empty(folder.path));
  }
}

TEST_CASE(a_bank_can_be_destroyed_with_work_under_way) {
  for (int round = 0; round < 20; ++round) {
    Folder folder;
    SlotMemory slots(kSlots);
    Bank bank(options(slots, folder.path.string(), 12, 20), make_host_device());
    for (Frame frame = 0; frame < 20; ++frame) {
      Pages pages(frame, 7);
      bank.commit({frame}, {pages.source}, 0, false);  // spills start
      pages.spoil();
    }
    bank.prefetch({0, 1, 2, 3}, 0);  // reads start
  }
}
