#include "bank/host_arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "bank/page_layout.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace longlive::bank {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
// Pages one thread touches at a time.
constexpr std::size_t kStretch = std::size_t{16} << 20;
// Left to everyone else on the machine.
constexpr std::int64_t kMargin = std::int64_t{256} << 20;
constexpr char kOutOfMemory[] = "host slab: out of memory";

std::string text_of(int code) { return std::generic_category().message(code); }

// Memory of one slab, and its lock.
class Slab {
 public:
  Slab(Device& device, std::size_t bytes) : device_(device), bytes_(bytes) {}
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
  ~Slab() {
    if (locked_) device_.unlock(memory_);
    if (memory_ != nullptr) munmap(memory_, bytes_);
  }

  // An errno.
  int map() {
    // Huge pages begin at multiples of their size, which mmap alone does not promise.
    const std::size_t spare = bytes_ >= kHugePage ? kHugePage : 0;
    void* const got = mmap(nullptr, bytes_ + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) return errno;
    auto* const begin = static_cast<std::byte*>(got);
    const std::size_t beyond = reinterpret_cast<std::uintptr_t>(begin) % kHugePage;
    const std::size_t before = spare == 0 || beyond == 0 ? 0 : kHugePage - beyond;
    memory_ = begin + before;
    if (before != 0) munmap(begin, before);
    // mmap rounds up to pages, which may be larger than kAlignment
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t end = (bytes_ + page - 1) / page * page;
    const std::size_t whole = (bytes_ + spare + page - 1) / page * page;
    if (before + end < whole) munmap(memory_ + end, whole - before - end);
    // Not for forked processes: they may not use the bank, and memory that both share until one of them writes may be
    // moved away under copies of the device.
    madvise(memory_, bytes_, MADV_DONTFORK);
    return 0;
  }

  void ask_for_huge_pages() {
    if (bytes_ >= kHugePage) madvise(memory_, bytes_, MADV_HUGEPAGE);  // a refusal changes speed alone
  }

  // Takes every page now, so that locking finds them and no copy stumbles later. An errno.
  int touch(int threads) {
    std::atomic<std::size_t> next{0};
    std::atomic<int> error{0};
    const auto work = [&] {
      for (std::size_t at; error == 0 && (at = next.fetch_add(kStretch)) < bytes_;) {
        const int code = touch_stretch(memory_ + at, std::min(kStretch, bytes_ - at));
        if (code != 0) error = code;
      }
    };
    std::vector<std::thread> helpers;
    const auto useful = static_cast<std::size_t>(threads);
    while (helpers.size() + 1 < std::min(useful, (bytes_ + kStretch - 1) / kStretch)) {
      try {
        helpers.emplace_back(work);
      } catch (const std::exception&) {
        break;  // fewer threads do as well
      }
    }
    work();
    for (std::thread& helper : helpers) helper.join();
    return error;
  }

  bool lock(std::string* reason) { return locked_ = device_.lock(memory_, bytes_, reason); }

  std::byte* begin() const { return memory_; }
  std::byte* end() const { return memory_ + bytes_; }

 private:
  static int touch_stretch(std::byte* from, std::size_t bytes) {
    while (madvise(from, bytes, MADV_POPULATE_WRITE) != 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      if (errno != EINVAL) return errno;
      // a kernel before 5.14
      for (std::size_t at = 0; at < bytes; at += static_cast<std::size_t>(kAlignment)) {
        const_cast<volatile std::byte*>(from)[at] = std::byte{0};
      }
      break;
    }
    return 0;
  }

  Device& device_;
  const std::size_t bytes_;
  std::byte* memory_ = nullptr;
  bool locked_ = false;
};

void check(const char* name, std::int64_t got, bool allowed, const char* what) {
  if (!allowed) throw std::invalid_argument(std::string(name) + " = " + std::to_string(got) + ", allowed: " + what);
}

}  // namespace

class HostArena::Growth {
 public:
  std::int64_t records = 0, bytes = 0;
  ArenaOptions options;
  std::unique_ptr<Slab> slab;
  std::vector<bool> marks;
  bool locked = false;
  std::string pageable_reason;
  std::string refusal;  // of the system, "" for none

  explicit Growth(Device& the_device) : device(the_device) { refusal.reserve(sizeof kOutOfMemory); }

  void make() {
    try {
      try_to_make();
    } catch (const std::bad_alloc&) {  // of a few bytes beside the slab, where the system has none left
      refusal = kOutOfMemory;  // for which there is room
    }
  }

 private:
  void try_to_make() {
    const HostMemory memory = options.memory ? options.memory() : host_memory();
    if (bytes > memory.available - std::min(kMargin, memory.available / 8)) {
      return refuse(memory.bound + " leaves " + std::to_string(memory.available) + " bytes");
    }
    auto made = std::make_unique<Slab>(device, static_cast<std::size_t>(bytes));
    if (const int code = made->map(); code != 0) return refuse("mmap: " + text_of(code));
    // Where memory is scarce the kernel would move pages about to make huge ones, which can take minutes.
    if (memory.free / 2 >= bytes) made->ask_for_huge_pages();
    int threads = options.touch_threads;
    if (threads == 0) threads = std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, 8);
    if (const int code = made->touch(threads); code != 0) return refuse("first touch: " + text_of(code));
    locked = options.lock && made->lock(&pageable_reason);
    slab = std::move(made);
  }

  void refuse(const std::string& why) { refusal = "host slab of " + std::to_string(bytes) + " bytes: " + why; }

  Device& device;
};

struct HostArena::State {
  Device& device;
  ArenaOptions options;
  ArenaStats stats;
  std::vector<std::unique_ptr<Slab>> slabs;  // in ascending order of address
  std::vector<std::byte*> unused;            // room for all records, so that free does not allocate
  std::vector<std::vector<bool>> given;      // by slab and record
  bool growing = false;

  std::shared_ptr<Growth> begin_growth() {
    const std::int64_t reserved = stats.reserved_bytes / options.record_bytes;
    if (growing || reserved >= stats.capacity) return nullptr;
    auto growth = std::make_shared<Growth>(device);
    growth->options = options;
    growth->records =
        std::min(std::max<std::int64_t>(1, options.slab_bytes / options.record_bytes), stats.capacity - reserved);
    growth->bytes = growth->records * options.record_bytes;
    // Whatever can throw comes before anything is counted.
    growth->marks.assign(static_cast<std::size_t>(growth->records), false);
    unused.reserve(static_cast<std::size_t>(reserved + growth->records));
    slabs.reserve(slabs.size() + 1);
    given.reserve(given.size() + 1);
    growing = true;
    return growth;
  }

  bool end_growth(Growth& growth, bool needed) noexcept {
    growing = false;
    if (needed && !growth.refusal.empty()) {
      stats.refusal = std::move(growth.refusal);
      stats.capacity = stats.reserved_bytes / options.record_bytes;
    }
    if (growth.slab == nullptr) return false;
    if (growth.locked) {
      stats.locked_bytes += growth.bytes;
    } else if (options.lock) {
      ++stats.pageable_slabs;
      stats.pageable_reason = std::move(growth.pageable_reason);
    }
    stats.reserved_bytes += growth.bytes;
    std::byte* const begin = growth.slab->begin();
    const auto place =
        std::upper_bound(slabs.begin(), slabs.end(), begin,
                         [](const std::byte* at, const auto& slab) { return at < slab->begin(); }) -
        slabs.begin();
    // The new records come last: what was used before is in the processor's caches and tables.
    std::vector<std::byte*>& records = unused;
    for (std::int64_t i = growth.records - 1; i >= 0; --i) records.push_back(begin + i * options.record_bytes);
    std::rotate(records.begin(), records.end() - growth.records, records.end());
    slabs.insert(slabs.begin() + place, std::move(growth.slab));
    given.insert(given.begin() + place, std::move(growth.marks));
    return true;
  }

  // The mark of a record. Throws when there is none at this address.
  std::vector<bool>::reference mark_of(std::byte* record) {
    const auto after = std::upper_bound(slabs.begin(), slabs.end(), record,
                                        [](const std::byte* at, const auto& slab) { return at < slab->begin(); });
    if (after != slabs.begin()) {
      const auto& slab = *(after - 1);
      const std::int64_t offset = record - slab->begin();
      if (record < slab->end() && offset % options.record_bytes == 0) {
        auto& marks = given[static_cast<std::size_t>(after - slabs.begin() - 1)];
        return marks[static_cast<std::size_t>(offset / options.record_bytes)];
      }
    }
    throw std::invalid_argument("record: not an address of this arena's records");
  }
};

HostArena::HostArena(Device& device, const ArenaOptions& options) {
  check("record_bytes", options.record_bytes, options.record_bytes > 0 && options.record_bytes % kAlignment == 0,
        "a positive multiple of 4096");
  check("limit_bytes", options.limit_bytes, options.limit_bytes >= 0, "0 or more");
  check("slab_bytes", options.slab_bytes, options.slab_bytes > 0, "1 or more");
  check("touch_threads", options.touch_threads, options.touch_threads >= 0 && options.touch_threads <= 256, "0 .. 256");
  state_.reset(new State{device, options, {}, {}, {}, {}, false});
  state_->stats.capacity = options.limit_bytes / options.record_bytes;
}

HostArena::~HostArena() = default;

std::byte* HostArena::allocate() {
  State& state = *state_;
  if (state.unused.empty()) {
    const std::shared_ptr<Growth> growth = begin_growth();
    if (growth == nullptr) return nullptr;
    try {
      make(*growth);
    } catch (...) {
      end_growth(*growth, true);
      throw;
    }
    end_growth(*growth, true);
    if (state.unused.empty()) return nullptr;
  }
  std::byte* const record = state.unused.back();
  state.mark_of(record) = true;
  state.unused.pop_back();
  ++state.stats.used;
  return record;
}

void HostArena::free(std::byte* record) {
  auto mark = state_->mark_of(record);
  if (!mark) throw std::invalid_argument("record: is free already");
  mark = false;
  state_->unused.push_back(record);
  --state_->stats.used;
}

std::shared_ptr<HostArena::Growth> HostArena::begin_growth() { return state_->begin_growth(); }
void HostArena::make(Growth& growth) { growth.make(); }
bool HostArena::end_growth(Growth& growth, bool needed) noexcept { return state_->end_growth(growth, needed); }
std::int64_t HostArena::ready() const { return static_cast<std::int64_t>(state_->unused.size()); }

const ArenaStats& HostArena::stats() const { return state_->stats; }

}  // namespace longlive::bank
