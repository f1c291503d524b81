// What the tests of the bank's core share: a small layout, source pages, slots, a disk that can be made to fail.
#pragma once

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unistd.h>
#include <vector>

#include "bank/bank.h"
#include "tests/test_case.h"

namespace {

using namespace longlive::bank;

using Bytes = std::vector<unsigned char>;

constexpr std::int64_t kLayers = 3, kSamples = 2, kPage = 4096, kFirst = 2;
constexpr Segment kSegments[] = {{0, 1000}, {2048, 700}};
constexpr std::int64_t kPages = kLayers * kSamples;
constexpr std::int64_t kRecord = kPages * kPage;

struct Folder {
  std::string path;
  Folder() {
    path = (std::filesystem::temp_directory_path() / "longlive-bank-XXXXXX").string();
    CHECK(mkdtemp(path.data()) != nullptr);
  }
  ~Folder() { std::filesystem::remove_all(path); }
};

// Pages of one frame where a commit takes them from: a plane a segment, [sample][layer], with a gap between.
struct Source {
  static constexpr std::int64_t kStride = 1024;
  std::vector<Bytes> planes{2, Bytes(kPages * kStride, 0xEE)};
  PageSource pages() {
    PageSource source;
    for (Bytes& plane : planes) {
      source.parts.push_back({reinterpret_cast<std::uintptr_t>(plane.data()), kStride, kLayers * kStride});
    }
    return source;
  }
  unsigned char* at(int segment, std::int64_t layer, std::int64_t sample) {
    return planes[static_cast<std::size_t>(segment)].data() + sample * kLayers * kStride + layer * kStride;
  }
  void set(const Bytes& record) {
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      for (std::int64_t sample = 0; sample < kSamples; ++sample) {
        for (int s = 0; s < 2; ++s) {
          std::memcpy(at(s, layer, sample), record.data() + (layer * kSamples + sample) * kPage + kSegments[s].offset,
                      static_cast<std::size_t>(kSegments[s].bytes));
        }
      }
    }
  }
  void spoil() {
    for (Bytes& plane : planes) std::fill(plane.begin(), plane.end(), 0xDD);
  }
};

// A record whose bytes say whose they are; gaps are zero.
Bytes record_of(std::int64_t stamp) {
  Bytes record(kRecord, 0);
  std::uint64_t word = static_cast<std::uint64_t>(stamp) * 0x9E3779B97F4A7C15u + 1;
  for (std::int64_t page = 0; page < kPages; ++page) {
    for (const Segment& segment : kSegments) {
      for (std::int64_t i = 0; i < segment.bytes; ++i) {
        word = word * 6364136223846793005u + 1442695040888963407u;
        record[static_cast<std::size_t>(page * kPage + segment.offset + i)] = static_cast<unsigned char>(word >> 56);
      }
    }
  }
  return record;
}

struct Slots {
  Slot count;
  std::vector<Bytes> planes;
  explicit Slots(Slot the_count)
      : count(the_count), planes(2, Bytes(static_cast<std::size_t>(kPages * (the_count + kFirst) * 1024), 0)) {}
  SlotGeometry geometry() {
    SlotGeometry made;
    for (Bytes& plane : planes) {
      const std::int64_t row = (count + kFirst) * 1024;
      made.parts.push_back({reinterpret_cast<std::uintptr_t>(plane.data()), kSamples * row, row, 1024});
    }
    made.first = kFirst;
    made.count = count;
    return made;
  }
  bool holds(Slot slot, std::int64_t layer, const Bytes& record) const {
    for (std::int64_t sample = 0; sample < kSamples; ++sample) {
      for (int s = 0; s < 2; ++s) {
        const unsigned char* page = planes[static_cast<std::size_t>(s)].data() +
                                    ((layer * kSamples + sample) * (count + kFirst) + slot) * 1024;
        const unsigned char* want = record.data() + (layer * kSamples + sample) * kPage + kSegments[s].offset;
        if (std::memcmp(page, want, static_cast<std::size_t>(kSegments[s].bytes)) != 0) return false;
      }
    }
    return true;
  }
  bool holds(Slot slot, const Bytes& record) const {
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      if (!holds(slot, layer, record)) return false;
    }
    return true;
  }
};

// The system's files, with faults.
struct Faults : FileOps {
  std::atomic<int> write_error{0}, read_error{0}, space_error{0};
  std::atomic<int> flips{0};  // reads of which a byte is turned
  std::atomic<int> flip_at{0};
  std::atomic<int> writes{0}, reads{0};
  std::mutex mutex;
  std::condition_variable changed;
  bool gate_reads = false, gate_writes = false;
  int waiting = 0;

  void gate(bool reads_too, bool writes_too) {
    const std::lock_guard lock(mutex);
    gate_reads = reads_too;
    gate_writes = writes_too;
    changed.notify_all();
  }
  void await(int count) {  // until so many are held up
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return waiting >= count; });
  }
  void pass(const bool& closed) {
    std::unique_lock lock(mutex);
    ++waiting;
    changed.notify_all();
    changed.wait(lock, [&] { return !closed; });
    --waiting;
  }
  int allocate(int fd, off_t offset, off_t bytes) override {
    return space_error != 0 ? space_error.load() : FileOps::allocate(fd, offset, bytes);
  }
  ssize_t pread(int fd, void* to, std::size_t bytes, off_t offset) override {
    ++reads;
    if (bytes > kPage) pass(gate_reads);
    if (read_error != 0) {
      errno = read_error;
      return -1;
    }
    const ssize_t got = FileOps::pread(fd, to, bytes, offset);
    if (got > 0 && flips.load() > 0 && flips.fetch_sub(1) > 0) static_cast<unsigned char*>(to)[flip_at] ^= 0x10;
    return got;
  }
  ssize_t pwrite(int fd, const void* from, std::size_t bytes, off_t offset) override {
    ++writes;
    if (bytes > kPage) pass(gate_writes);  // not the tier's own trial of a new file
    if (write_error != 0 && bytes > kPage) {
      errno = write_error;
      return -1;
    }
    return FileOps::pwrite(fd, from, bytes, offset);
  }
};

struct Rig {
  Folder folder;
  Slots slots;
  std::shared_ptr<Faults> faults = std::make_shared<Faults>();
  BankOptions options;
  std::unique_ptr<Bank> bank;

  Rig(Slot slot_count, std::int64_t host, std::int64_t disk, std::int64_t bounce = 2, std::int64_t commit = 2)
      : slots(slot_count) {
    options.layout = {kLayers, kSamples, kPage, {kSegments[0], kSegments[1]}};
    options.slots = slots.geometry();
    options.host.limit_bytes = host * kRecord;
    options.host.slab_bytes = 2 * kRecord;
    options.host.lock = false;
    options.host.touch_threads = 1;
    options.disk.folder = folder.path;
    options.disk.limit_bytes = disk * kRecord;
    options.disk.shard_bytes = 3 * kRecord;
    options.disk.ops = faults;
    options.io_threads = 3;
    options.bounce_records = bounce;
    options.commit_records = commit;
  }
  void open(std::unique_ptr<Device> device = make_host_device()) {
    bank = std::make_unique<Bank>(options, std::move(device));
  }
  ~Rig() { bank.reset(); }

  // Of pages that are there at once, and spoilt when the commit returns.
  void commit(const std::vector<Frame>& frames, std::int64_t stamp = 0, bool replace = false) {
    std::vector<Source> sources(frames.size());
    std::vector<PageSource> pages;
    for (std::size_t i = 0; i < frames.size(); ++i) {
      sources[i].set(record_of(frames[i] + 1000 * stamp));
      pages.push_back(sources[i].pages());
    }
    bank->commit(frames, pages, 0, replace);
    for (Source& source : sources) source.spoil();
  }
  bool has(Frame frame, std::int64_t stamp = 0) const {
    Bytes got(kRecord, 0xAA);
    bank->read(frame, reinterpret_cast<std::byte*>(got.data()));
    return got == record_of(frame + 1000 * stamp);
  }
  bool in_slot(Frame frame, std::int64_t stamp = 0) const {
    const Slot slot = bank->where(frame).slot;
    return slot >= kFirst && slots.holds(slot, record_of(frame + 1000 * stamp));
  }
};

}  // namespace
