// What the files of the bank's core share: the state behind Bank, guarded by one mutex.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bank/bank.h"
#include "bank/device_slots.h"
#include "bank/host_records.h"
#include "bank/io_pool.h"
#include "bank/layout_checks.h"

namespace longlive::bank {

// A place on disk, given back when nobody uses it any more: neither its frame nor a job that reads or writes it.
struct DiskPlace {
  DiskPlace(DiskTier& the_tier, std::int64_t pages)
      : tier(the_tier), checksums(static_cast<std::size_t>(pages)), extent(the_tier.allocate()) {}
  ~DiskPlace() {
    if (extent >= 0) tier.free(extent);
  }
  DiskPlace(const DiskPlace&) = delete;
  DiskPlace& operator=(const DiskPlace&) = delete;

  DiskTier& tier;
  std::vector<std::uint32_t> checksums;  // one a page; set by the jobs that write, each its own pages
  const DiskTier::Extent extent;         // < 0: there was no room
};

struct Entry;

// A frame on its way from host memory to disk. `entry` is null once the frame, or this generation of it, is gone.
struct Spill {
  Entry* entry = nullptr;
  Record* record = nullptr;
  std::shared_ptr<DiskPlace> place;  // null until there is one
  std::int64_t jobs = 0;             // that have not ended
  bool failed = false;
  bool refused = false;              // there was no place: failed, but the tier says so itself by its capacity
};

// A frame on its way from disk to host memory, and from there to its slot when settle() comes.
struct Fetch {
  Entry* entry = nullptr;    // null: as in Spill
  Record* record = nullptr;  // null once it is the entry's, or given back
  std::shared_ptr<DiskPlace> place;
  std::int64_t jobs = 0;
  std::uint64_t number = 0;  // ascending in the order of prefetches
  std::int64_t damaged = 0;  // pages
  std::string reason;        // of the first of them
  bool skipped = false;      // not read, because the bank was being closed

  bool done() const { return jobs == 0; }
};

// What the bank knows of a frame. Its slot is in DeviceSlots.
struct Entry {
  Frame frame = -1;
  std::int64_t generation = 0;
  Record* host = nullptr;  // complete, or the copy to it is under way
  std::shared_ptr<DiskPlace> disk;
  std::shared_ptr<Spill> spill;
  std::shared_ptr<Fetch> fetch;  // until settled
  bool filled = false;           // copies into its slot, if it has one, have been enqueued
};

// The disk tier counts as out of order after so many spills in a row that failed.
inline constexpr int kMostSpillFailures = 3;

struct Job {
  IoPool::Kind kind;
  std::function<void()> run;
  IoPool* pool;
};

struct Bank::State {
  using Lock = std::unique_lock<std::mutex>;
  class Turn;

  State(const BankOptions& given, std::unique_ptr<Device> the_device);

  // commit.cpp
  void commit(const std::vector<Frame>& frames, const std::vector<PageSource>& pages, Stream stream, bool replace);
  struct Storing;
  void check_sources(const std::vector<Frame>& frames, const std::vector<PageSource>& pages) const;
  void check_presence(const std::vector<Frame>& frames, bool replace) const;
  bool choose_records(Storing& storing, bool replace);
  void store(Storing& storing, const std::vector<PageSource>& pages, Stream stream);
  void abandon(Storing& storing) noexcept;
  void publish(Storing& storing, bool replace) noexcept;
  void fill_free_slots(const std::vector<Frame>& frames, const std::vector<PageSource>& pages, Stream stream) noexcept;

  // insertion.cpp
  void insert(Frame frame, const std::byte* bytes, std::int64_t generation);

  // fetch.cpp
  void prefetch(const std::vector<Frame>& frames, Stream stream);
  struct Fetching;
  bool choose_fetch(Fetching& fetching);
  void begin_fetch(Fetching& fetching, Stream stream);
  void wait_for_reads(Lock& lock);
  void copy_settled();
  void copy_in(const std::vector<Entry*>& entries);
  std::vector<Lost> take_lost();

  // disk_reads.cpp
  void queue_reads(const std::shared_ptr<Fetch>& fetch, std::vector<Job>& jobs);
  void read_pages(Fetch& fetch, std::int64_t first, std::int64_t count);
  void end_read(Fetch& fetch) noexcept;
  void read(Frame frame, std::byte* to);
  void read_host(Lock& lock, Record& record, std::byte* to);
  std::int64_t read_disk(Lock& lock, const std::shared_ptr<DiskPlace>& place, std::byte* to, std::string& reason);

  // spill.cpp
  void start_spills(std::int64_t wanted, bool probe);
  void start_spill(Entry& entry);
  void place_spill(const std::shared_ptr<Spill>& spill);
  void spill_ahead(bool probe) noexcept;
  void spill_pages(Spill& spill, std::int64_t first, std::int64_t count);
  void end_spill(Spill& spill) noexcept;
  void make_room(Lock& lock, std::int64_t records, bool idle, const char* what);

  // growth.cpp
  void start_growth();
  void grow_ahead() noexcept;
  bool short_of_slabs() const;
  void grow(std::shared_ptr<HostArena::Growth> growth) noexcept;
  void wait_for_growth(Lock& lock);

  // frame_table.cpp
  Entry* find(Frame frame);
  const Entry* find(Frame frame) const;
  Entry& require(Frame frame, const char* what);
  void retire(Entry& entry, const char* reason) noexcept;
  void drop(Entry& entry, const char* reason) noexcept;
  void drop_damaged(Entry& entry, std::string reason) noexcept;
  void forget(const std::vector<Frame>& frames);
  void clear();
  std::int64_t kept_back() const;
  std::int64_t room() const;
  BankStats snapshot() const;

  // bank.cpp
  void wait(std::int64_t layer, Stream stream, bool fetched_only);
  void release(const std::vector<Frame>& frames, Stream stream);
  void flush();
  void close() noexcept;
  void check_capture(Stream stream, const char* what);
  void repair();
  void tend() noexcept;
  void send(Lock& lock) noexcept;
  void submit(const std::vector<Job>& jobs, std::size_t first) noexcept;
  void wait_change(Lock& lock);
  void wait_point(Lock& lock, const EventRef& point);
  // In a process forked from the bank's own there are no threads, slabs and copies, and the mutex may be held for ever.
  bool forked() const { return getpid() != process; }
  Lock enter() {
    if (forked()) throw std::runtime_error("the bank belongs to the process that made it, not to one forked from it");
    return Lock(mutex);
  }
  void check_open() const {
    if (closing) throw std::runtime_error("the bank is closed");
  }
  // Pages of one I/O job: big enough to be worth a system call, small enough that frames are read by several threads.
  std::int64_t chunk_pages() const;
  template <typename Run>
  void split(Run run) const {
    const std::int64_t pages = options.layout.pages(), chunk = chunk_pages();
    for (std::int64_t first = 0; first < pages; first += chunk) run(first, std::min(chunk, pages - first));
  }
  std::int64_t chunks() const { return (options.layout.pages() + chunk_pages() - 1) / chunk_pages(); }

  const pid_t process = getpid();
  BankOptions options;
  std::unique_ptr<Device> device;
  std::unique_ptr<HostRecords> records;
  std::unique_ptr<DiskTier> disk;  // null: no disk tier
  std::unique_ptr<IoPool> pool;    // likewise
  std::unique_ptr<IoPool> grower;  // one thread: host memory

  mutable std::mutex mutex;             // of everything below, and of records and slots
  std::condition_variable changed;      // a job, a reader or a call ended
  std::uint64_t changes = 0;            // how often
  std::uint64_t arrivals = 0;           // of the device's points, when a call last gave up looking for a record
  bool closing = false, closed = false;
  std::atomic<bool> abandoned{false};   // as closing, for jobs: what has not begun is left undone
  std::int64_t callers = 0;             // public calls under way
  std::int64_t working = 0;             // spills, fetches and readers under way
  std::int64_t spilling = 0;            // spills alone
  std::int64_t placing = 0;             // of those, without a place on disk yet
  std::exception_ptr growth_error;      // of the last growth
  std::int64_t growth_waiters = 0;      // calls that need one
  bool growth_refused = false;          // the last one, ahead of need: not tried again until somebody needs it
  std::vector<Job> outbox;              // handed to the pool without the mutex, see send()

  std::map<Frame, Entry> frames;
  DeviceSlots slots;
  std::int64_t disk_frames = 0;
  std::list<std::shared_ptr<Fetch>> fetches;  // under way, or done and not settled
  std::uint64_t fetch_number = 0;
  std::map<Frame, std::string> asked;         // prefetched since the last settle; why it cannot be had, "" when it can
  int spill_failures = 0;                     // in a row

  // Points of the last copies of each layer; earlier ones lie before them, for both queues keep their order.
  std::vector<EventRef> to_host, to_device;
  std::vector<StreamPoint> fills;             // of slots, on compute streams
  // The device refused in the middle of a direction's copies: some may be under way without a point. Until repair() has
  // waited for them, nothing of what they touch is used again.
  bool unmarked_to_host = false, unmarked_to_device = false;
  mutable BankStats counts;                   // the counters; the rest is filled in by snapshot()
};

// A public call: has the mutex, refuses a closed bank, hands jobs to the pool when it ends.
class Bank::State::Turn {
 public:
  explicit Turn(State& state);
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  Lock lock;

 private:
  State& state_;
};

}  // namespace longlive::bank
