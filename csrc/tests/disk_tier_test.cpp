// Tests of records on disk: contents, accounting, and every way in which the file system can let the tier down.
#include "bank/disk_tier.h"

#include "tests/test_case.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include "bank/io_pool.h"
#include "bank/page_layout.h"

using namespace longlive::bank;

namespace {

constexpr std::int64_t kRecord = 4 * kAlignment;

class Folder {
 public:
  Folder() {
    path = (std::filesystem::temp_directory_path() / "longlive-disk-XXXXXX").string();
    CHECK(mkdtemp(path.data()) != nullptr);
  }
  ~Folder() { std::filesystem::remove_all(path); }
  bool empty() const { return std::filesystem::is_empty(path); }
  std::string path;
};

// A file system that is as strict about direct I/O as any, and fails where it is told to. Knows what is open.
class Faults : public FileOps {
 public:
  // What becomes of a transfer: the bytes that are moved at most, or an errno below zero.
  using Cut = std::function<std::int64_t(std::size_t bytes, off_t offset)>;
  Cut on_read, on_write;
  int refuse_direct_open = 0;      // an errno
  int refuse_direct_transfer = 0;  // an errno
  std::function<int(int shard, bool direct)> on_allocate;  // an errno; shards counted from 0
  std::function<int()> on_open;

  std::atomic<int> opened{0}, allocated{0}, transfers{0};

  std::size_t still_open() {
    const std::lock_guard lock(mutex_);
    return direct_.size();
  }

  int open_unnamed(const char* folder, int flags) override {
    ++opened;
    int code = on_open ? on_open() : 0;
    if (code == 0 && flags != 0) code = refuse_direct_open;
    if (code != 0) {
      errno = code;
      return -1;
    }
    const int fd = FileOps::open_unnamed(folder, 0);
    const std::lock_guard lock(mutex_);
    CHECK(direct_.emplace(fd, flags != 0).second);
    return fd;
  }
  int allocate(int fd, off_t offset, off_t bytes) override {
    const int code = on_allocate ? on_allocate(allocated++, is_direct(fd)) : 0;
    return code != 0 ? code : FileOps::allocate(fd, offset, bytes);
  }
  ssize_t pread(int fd, void* to, std::size_t bytes, off_t offset) override {
    const std::int64_t most = allow(fd, to, bytes, offset, on_read);
    return most < 0 ? -1 : FileOps::pread(fd, to, static_cast<std::size_t>(most), offset);
  }
  ssize_t pwrite(int fd, const void* from, std::size_t bytes, off_t offset) override {
    const std::int64_t most = allow(fd, from, bytes, offset, on_write);
    return most < 0 ? -1 : FileOps::pwrite(fd, from, static_cast<std::size_t>(most), offset);
  }
  int close(int fd) override {
    {
      const std::lock_guard lock(mutex_);
      CHECK(direct_.erase(fd) == 1);
    }
    return FileOps::close(fd);
  }

 private:
  bool is_direct(int fd) {
    const std::lock_guard lock(mutex_);
    return direct_.at(fd);
  }
  std::int64_t allow(int fd, const void* memory, std::size_t bytes, off_t offset, const Cut& cut) {
    ++transfers;
    std::int64_t most = cut ? std::min<std::int64_t>(cut(bytes, offset), static_cast<std::int64_t>(bytes))
                            : static_cast<std::int64_t>(bytes);
    if (is_direct(fd)) {
      const auto aligned = [](std::uint64_t value) { return value % kAlignment == 0; };
      const bool fits = aligned(reinterpret_cast<std::uintptr_t>(memory)) && aligned(bytes) &&
                        aligned(static_cast<std::uint64_t>(offset));
      if (refuse_direct_transfer != 0) most = -refuse_direct_transfer;
      if (!fits) most = -EINVAL;
    }
    if (most < 0) errno = static_cast<int>(-most);
    return most;
  }

  std::mutex mutex_;
  std::map<int, bool> direct_;  // by what is open
};

DiskOptions options_of(const Folder& folder, std::int64_t records, std::int64_t shard_records,
                       std::shared_ptr<FileOps> ops = nullptr) {
  DiskOptions options;
  options.folder = folder.path;
  options.record_bytes = kRecord;
  options.limit_bytes = records * kRecord;
  options.shard_bytes = shard_records * kRecord;
  options.ops = std::move(ops);
  return options;
}

// Aligned memory of a record.
class Buffer {
 public:
  Buffer() : data_(static_cast<std::byte*>(std::aligned_alloc(kAlignment, kRecord))) { fill(0); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void fill(std::uint32_t seed) {
    std::minstd_rand random(seed + 1);
    for (std::int64_t i = 0; i < kRecord; ++i) data_[i] = static_cast<std::byte>(random() >> 8);
  }
  std::byte* data() const { return data_; }
  bool operator==(const Buffer& other) const { return std::memcmp(data_, other.data_, kRecord) == 0; }

 private:
  std::byte* data_;
};

void write(DiskTier& tier, DiskTier::Extent extent, std::uint32_t seed) {
  Buffer buffer;
  buffer.fill(seed);
  tier.write(extent, 0, buffer.data(), kRecord);
}
bool holds(DiskTier& tier, DiskTier::Extent extent, std::uint32_t seed) {
  Buffer expected, got;
  expected.fill(seed);
  tier.read(extent, 0, got.data(), kRecord);
  return got == expected;
}

int code_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const IoError& error) {
    return error.code;
  }
  return -1;
}

std::vector<DiskTier::Extent> fill(DiskTier& tier) {
  std::vector<DiskTier::Extent> extents;
  for (;;) {
    const auto extent = tier.allocate();
    if (extent < 0) return extents;
    extents.push_back(extent);
  }
}

// 7 records in shards of 3, with random reads, writes, allocations and frees of records and of parts, against a map.
void run_against_a_model(const DiskOptions& options, unsigned seed, int rounds) {
  DiskTier tier(options);
  std::map<DiskTier::Extent, std::vector<std::byte>> model;
  std::mt19937 random(seed);
  Buffer buffer;
  std::int64_t written = 0, read = 0;
  for (int i = 0; i < rounds; ++i) {
    const unsigned kind = random() % 8;
    if (kind == 0) {
      const auto extent = tier.allocate();
      CHECK((extent < 0) == (model.size() == 7));
      if (extent >= 0) {
        CHECK(model.count(extent) == 0);
        buffer.fill(random());
        tier.write(extent, 0, buffer.data(), kRecord);
        written += kRecord;
        model[extent].assign(buffer.data(), buffer.data() + kRecord);
      }
    } else if (!model.empty()) {
      const auto place = std::next(model.begin(), random() % model.size());
      const std::int64_t offset = random() % 4 * kAlignment;
      const std::int64_t bytes = random() % ((kRecord - offset) / kAlignment + 1) * kAlignment;
      if (kind == 1 && random() % 2 == 0) {
        tier.free(place->first);
        model.erase(place);
      } else if (kind < 4) {
        buffer.fill(random());
        tier.write(place->first, offset, buffer.data(), bytes);
        written += bytes;
        std::copy(buffer.data(), buffer.data() + bytes, place->second.begin() + offset);
      } else {
        tier.read(place->first, offset, buffer.data(), bytes);
        read += bytes;
        CHECK(std::equal(buffer.data(), buffer.data() + bytes, place->second.begin() + offset));
      }
    }
    const DiskStats stats = tier.stats();
    CHECK(stats.used == static_cast<std::int64_t>(model.size()) && stats.capacity == 7);
    CHECK(stats.reserved_bytes <= 7 * kRecord && stats.reserved_bytes >= stats.used * kRecord);
    CHECK(stats.written_bytes == written && stats.read_bytes == read && stats.refusal.empty());
  }
}

}  // namespace

TEST_CASE(options_that_are_not_allowed) {
  const Folder folder;
  const auto with = [&](auto change) {
    DiskOptions options = options_of(folder, 4, 2);
    change(options);
    return options;
  };
  CHECK_THROWS(std::invalid_argument, "record_bytes = 0", DiskTier(with([](auto& o) { o.record_bytes = 0; })));
  CHECK_THROWS(std::invalid_argument, "record_bytes = 512, allowed: a positive multiple of 4096",
               DiskTier(with([](auto& o) { o.record_bytes = 512; })));
  CHECK_THROWS(std::invalid_argument, "limit_bytes = -1", DiskTier(with([](auto& o) { o.limit_bytes = -1; })));
  CHECK_THROWS(std::invalid_argument, "shard_bytes = 0", DiskTier(with([](auto& o) { o.shard_bytes = 0; })));
  CHECK_THROWS(std::invalid_argument, "folder", DiskTier(with([](auto& o) { o.folder = ""; })));
}

TEST_CASE(folders_that_cannot_be_written_to) {
  const Folder folder;
  DiskOptions options = options_of(folder, 4, 2);
  options.folder += "/missing";
  CHECK(code_of([&] { DiskTier tier(options); }) == ENOENT);
  CHECK_THROWS(IoError, options.folder, DiskTier(options));
  for (const int code : {EACCES, EROFS, EMFILE, ENOSPC}) {
    const auto ops = std::make_shared<Faults>();
    ops->on_open = [code] { return code; };
    CHECK(code_of([&] { DiskTier tier(options_of(folder, 4, 2, ops)); }) == code);
    ops->on_open = nullptr;
    ops->on_write = [code](std::size_t, off_t) { return -code; };
    CHECK(code_of([&] { DiskTier tier(options_of(folder, 4, 2, ops)); }) == code);
    CHECK(ops->still_open() == 0);
  }
}

TEST_CASE(a_disk_that_brings_something_else_back) {
  class Forgetful : public FileOps {
   public:
    ssize_t pwrite(int, const void*, std::size_t bytes, off_t) override { return static_cast<ssize_t>(bytes); }
    ssize_t pread(int, void*, std::size_t bytes, off_t) override { return static_cast<ssize_t>(bytes); }
  };
  const Folder folder;
  CHECK(code_of([&] { DiskTier tier(options_of(folder, 4, 2, std::make_shared<Forgetful>())); }) == EIO);
}

TEST_CASE(random_use_of_this_file_system) {
  const Folder folder;
  DiskOptions options = options_of(folder, 7, 3);
  run_against_a_model(options, 1, 3000);
  options.direct = false;
  run_against_a_model(options, 2, 3000);
}

TEST_CASE(random_use_with_short_transfers_and_interruptions) {
  const Folder folder;
  for (const bool direct : {true, false}) {
    const auto ops = std::make_shared<Faults>();
    std::mt19937 random(9);
    int cuts = 0;
    const auto cut = [&](std::size_t bytes, off_t) -> std::int64_t {
      switch (random() % 4) {
        case 0: return -EINTR;
        case 1: ++cuts; return 1 + random() % bytes;  // at any byte
        case 2: ++cuts; return 1;
        default: return static_cast<std::int64_t>(bytes);
      }
    };
    ops->on_read = ops->on_write = cut;
    DiskOptions options = options_of(folder, 7, 3, ops);
    options.direct = direct;
    run_against_a_model(options, 3, 2000);
    CHECK(cuts > 1000 && ops->still_open() == 0);
  }
}

// 10 records and 100 bytes; shards of 4 records and a half: 4 + 4 + 2.
TEST_CASE(shards_are_whole_records_and_end_at_the_limit) {
  const Folder folder;
  std::vector<std::int64_t> sizes;
  class Sizes : public Faults {
   public:
    explicit Sizes(std::vector<std::int64_t>* sizes) : sizes_(sizes) {}
    int allocate(int fd, off_t offset, off_t bytes) override {
      CHECK(offset == 0);
      sizes_->push_back(bytes);
      return Faults::allocate(fd, offset, bytes);
    }

   private:
    std::vector<std::int64_t>* sizes_;
  };
  DiskOptions options = options_of(folder, 10, 4, std::make_shared<Sizes>(&sizes));
  options.limit_bytes += 100;
  options.shard_bytes += kRecord / 2;
  DiskTier tier(options);
  CHECK(tier.stats().capacity == 10 && tier.stats().reserved_bytes == 0 && sizes.empty());
  std::set<DiskTier::Extent> seen;
  for (const std::int64_t reserved : {4, 4, 4, 4, 8, 8, 8, 8, 10, 10}) {
    CHECK(seen.insert(tier.allocate()).second);
    CHECK(tier.stats().reserved_bytes == reserved * kRecord);
    CHECK(tier.stats().used == static_cast<std::int64_t>(seen.size()));
  }
  CHECK(tier.allocate() == -1 && tier.stats().capacity == 10 && tier.stats().refusal.empty());
  CHECK((sizes == std::vector<std::int64_t>{4 * kRecord, 4 * kRecord, 2 * kRecord}));
  for (const auto extent : seen) write(tier, extent, static_cast<std::uint32_t>(extent));
  for (const auto extent : seen) CHECK(holds(tier, extent, static_cast<std::uint32_t>(extent)));
}

TEST_CASE(a_limit_below_one_record_holds_none) {
  const Folder folder;
  DiskOptions options = options_of(folder, 1, 1);
  options.limit_bytes = kRecord - 1;
  DiskTier tier(options);
  CHECK(tier.stats().capacity == 0 && tier.allocate() == -1 && tier.stats().refusal.empty());
}

TEST_CASE(arguments_that_are_not_allowed) {
  const Folder folder;
  DiskTier tier(options_of(folder, 4, 2));
  const auto extent = tier.allocate();
  const Buffer buffer;
  std::byte* const data = buffer.data();
  CHECK_THROWS(std::invalid_argument, "extent = -1", tier.read(-1, 0, data, kRecord));
  CHECK_THROWS(std::invalid_argument, "extent = 99", tier.write(99, 0, data, kRecord));
  CHECK_THROWS(std::invalid_argument, "extent = 1", tier.write(1, 0, data, kRecord));  // reserved, not given out
  CHECK_THROWS(std::invalid_argument, "offset = 1", tier.read(extent, 1, data, kAlignment));
  CHECK_THROWS(std::invalid_argument, "offset = -4096", tier.read(extent, -kAlignment, data, kAlignment));
  CHECK_THROWS(std::invalid_argument, "bytes = 16384", tier.read(extent, kAlignment, data, kRecord));
  CHECK_THROWS(std::invalid_argument, "bytes = 5000", tier.read(extent, 0, data, 5000));
  CHECK_THROWS(std::invalid_argument, "memory", tier.read(extent, 0, data + 512, kAlignment));
  tier.read(extent, kRecord, data, 0);
  tier.free(extent);
  CHECK_THROWS(std::invalid_argument, "extent = 0", tier.free(extent));
  CHECK_THROWS(std::invalid_argument, "extent = 0", tier.read(extent, 0, data, kRecord));
  CHECK(tier.stats().used == 0 && tier.stats().read_bytes == 0 && tier.stats().written_bytes == 0);
}

TEST_CASE(no_name_is_left) {
  const Folder folder;
  {
    DiskTier tier(options_of(folder, 4, 2));
    const auto extent = tier.allocate();
    write(tier, extent, 1);
    CHECK(folder.empty());
  }
  CHECK(folder.empty());
}

TEST_CASE(no_name_is_left_by_a_killed_process) {
  const Folder folder;
  const pid_t child = fork();
  if (child == 0) {
    DiskTier tier(options_of(folder, 4, 2));
    write(tier, tier.allocate(), 1);
    raise(SIGKILL);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  CHECK(folder.empty());
}

// What a file system without unnamed files gets.
TEST_CASE(a_name_that_is_removed_at_once) {
  class Named : public FileOps {
   public:
    int open_unnamed(const char* folder, int flags) override { return open_unlinked(folder, flags); }
  };
  const Folder folder;
  for (const bool direct : {true, false}) {
    DiskOptions options = options_of(folder, 7, 3, std::make_shared<Named>());
    options.direct = direct;
    run_against_a_model(options, 4, 500);
    CHECK(folder.empty());
  }
  CHECK(open_unlinked((folder.path + "/missing").c_str(), 0) == -1 && errno == ENOENT);
}

TEST_CASE(direct_io_not_asked_for) {
  const Folder folder;
  const auto ops = std::make_shared<Faults>();
  ops->refuse_direct_open = EINVAL;
  DiskOptions options = options_of(folder, 4, 2, ops);
  options.direct = false;
  DiskTier tier(options);
  CHECK(fill(tier).size() == 4 && tier.stats().buffered_shards == 2);
  CHECK(tier.stats().buffered_reason.find("not asked for") != std::string::npos);
}

TEST_CASE(direct_io_taken) {
  const Folder folder;
  DiskTier tier(options_of(folder, 4, 2, std::make_shared<Faults>()));
  CHECK(fill(tier).size() == 4);
  CHECK(tier.stats().buffered_shards == 0 && tier.stats().buffered_reason.empty());
}

TEST_CASE(direct_io_refused) {
  const Folder folder;
  const std::vector<std::pair<std::string, std::function<void(Faults&)>>> ways = {
      {"open with O_DIRECT", [](Faults& ops) { ops.refuse_direct_open = EINVAL; }},
      {"first transfer with O_DIRECT", [](Faults& ops) { ops.refuse_direct_transfer = EINVAL; }},
      {"first transfer with O_DIRECT", [](Faults& ops) { ops.refuse_direct_transfer = EOPNOTSUPP; }},
      {"preallocation with O_DIRECT",
       [](Faults& ops) { ops.on_allocate = [](int, bool direct) { return direct ? EINVAL : 0; }; }},
  };
  for (const auto& [reason, refuse] : ways) {
    const auto ops = std::make_shared<Faults>();
    refuse(*ops);
    {
      DiskTier tier(options_of(folder, 7, 3, ops));
      const auto extents = fill(tier);
      CHECK(extents.size() == 7);
      for (const auto extent : extents) write(tier, extent, static_cast<std::uint32_t>(extent));
      for (const auto extent : extents) CHECK(holds(tier, extent, static_cast<std::uint32_t>(extent)));
      CHECK(tier.stats().buffered_shards == 3 && tier.stats().refusal.empty());
      CHECK(tier.stats().buffered_reason.find(reason) == 0);
      CHECK(tier.stats().buffered_reason.find(folder.path) != std::string::npos);
      CHECK(ops->still_open() == 3);
    }
    run_against_a_model(options_of(folder, 7, 3, ops), 5, 300);
    CHECK(ops->still_open() == 0);
  }
}

// Errors of one transfer are that transfer's alone.
TEST_CASE(transfers_that_fail) {
  const Folder folder;
  const auto ops = std::make_shared<Faults>();
  DiskTier tier(options_of(folder, 4, 2, ops));
  const auto extents = fill(tier);
  for (const auto extent : extents) write(tier, extent, static_cast<std::uint32_t>(extent));
  const std::int64_t written = tier.stats().written_bytes;
  for (const int code : {EIO, ENOSPC, EDQUOT, EINVAL}) {
    ops->on_write = ops->on_read = [code](std::size_t, off_t) { return -code; };
    CHECK(code_of([&] { write(tier, extents[1], 77); }) == code);
    CHECK(code_of([&] { holds(tier, extents[1], 1); }) == code);
  }
  // a part went through before
  ops->on_read = [&](std::size_t bytes, off_t) -> std::int64_t { return bytes == kRecord ? kAlignment + 5 : -EIO; };
  CHECK(code_of([&] { holds(tier, extents[1], 1); }) == EIO);
  CHECK_THROWS(IoError, "read of 16384 bytes at 16384 of shard 0 in " + folder.path, holds(tier, extents[1], 1));
  CHECK(tier.stats().written_bytes == written && tier.stats().read_bytes == 0);
  ops->on_write = ops->on_read = nullptr;
  for (const auto extent : extents) CHECK(holds(tier, extent, static_cast<std::uint32_t>(extent)));
  CHECK(tier.stats().used == 4 && tier.stats().capacity == 4);
}

TEST_CASE(end_of_file_where_data_should_be) {
  const Folder folder;
  for (const bool direct : {true, false}) {
    const auto ops = std::make_shared<Faults>();
    DiskOptions options = options_of(folder, 4, 2, ops);
    options.direct = direct;
    DiskTier tier(options);
    const auto extent = tier.allocate();
    write(tier, extent, 1);
    ops->on_read = [](std::size_t, off_t) { return 0; };
    CHECK(code_of([&] { holds(tier, extent, 1); }) == 0);
    ops->on_read = [](std::size_t bytes, off_t) -> std::int64_t { return bytes == kRecord ? 2 * kAlignment : 0; };
    CHECK_THROWS(IoError, "end of file after 8192 bytes", holds(tier, extent, 1));
  }
}

// A file that someone made shorter, as far as that is possible: it ends within the record.
TEST_CASE(a_file_that_became_shorter) {
  class Shortened : public FileOps {
   public:
    int open_unnamed(const char* folder, int flags) override { return last = FileOps::open_unnamed(folder, flags); }
    int last = -1;
  };
  const Folder folder;
  for (const bool direct : {true, false}) {
    for (const std::int64_t left : {std::int64_t{0}, kAlignment, kAlignment + 100, kRecord - 1}) {
      const auto ops = std::make_shared<Shortened>();
      DiskOptions options = options_of(folder, 4, 2, ops);
      options.direct = direct;
      DiskTier tier(options);
      const auto extent = tier.allocate();
      write(tier, extent, 1);
      CHECK(ftruncate(ops->last, left) == 0);
      const int code = code_of([&] { holds(tier, extent, 1); });
      CHECK(code == 0 || code == EIO);
    }
  }
}

TEST_CASE(transfers_that_never_move) {
  const Folder folder;
  for (const bool direct : {true, false}) {
    const auto ops = std::make_shared<Faults>();
    DiskOptions options = options_of(folder, 4, 2, ops);
    options.direct = direct;
    DiskTier tier(options);
    const auto extent = tier.allocate();
    ops->on_write = [](std::size_t, off_t) { return 0; };
    const int before = ops->transfers;
    CHECK(code_of([&] { write(tier, extent, 1); }) == EIO);
    CHECK(ops->transfers - before < 100);
    ops->on_write = nullptr;
    write(tier, extent, 1);
    CHECK(holds(tier, extent, 1));
  }
}

TEST_CASE(the_second_shard_is_refused) {
  const Folder folder;
  for (const int code : {ENOSPC, EDQUOT, EFBIG}) {
    const auto ops = std::make_shared<Faults>();
    ops->on_allocate = [code](int shard, bool) { return shard == 1 ? code : 0; };
    DiskTier tier(options_of(folder, 7, 3, ops));
    const auto extents = fill(tier);
    CHECK(extents.size() == 3);
    for (const auto extent : extents) write(tier, extent, static_cast<std::uint32_t>(extent));
    DiskStats stats = tier.stats();
    CHECK(stats.capacity == 3 && stats.used == 3 && stats.reserved_bytes == 3 * kRecord);
    CHECK(stats.refusal.find("shard of " + std::to_string(3 * kRecord) + " bytes in " + folder.path) == 0);
    CHECK(ops->still_open() == 1);
    // it is not asked again, and what there is goes on
    CHECK(tier.allocate() == -1 && ops->allocated == 2);
    for (const auto extent : extents) CHECK(holds(tier, extent, static_cast<std::uint32_t>(extent)));
    tier.free(extents[1]);
    CHECK(tier.allocate() == extents[1] && tier.allocate() == -1 && ops->allocated == 2);
  }
}

TEST_CASE(the_second_shard_cannot_be_opened) {
  const Folder folder;
  const auto ops = std::make_shared<Faults>();
  DiskTier tier(options_of(folder, 7, 3, ops));
  CHECK(tier.allocate() == 0);
  ops->on_open = [] { return EMFILE; };
  CHECK(fill(tier).size() == 2);
  CHECK(tier.stats().capacity == 3 && !tier.stats().refusal.empty() && ops->still_open() == 1);
}

TEST_CASE(preallocation_is_interrupted) {
  const Folder folder;
  const auto ops = std::make_shared<Faults>();
  ops->on_allocate = [](int call, bool) { return call < 5 ? EINTR : 0; };
  DiskTier tier(options_of(folder, 3, 3, ops));
  CHECK(fill(tier).size() == 3 && tier.stats().refusal.empty() && ops->allocated == 6);
}

// The system's own limit of the size of a file.
TEST_CASE(files_may_not_grow_that_large) {
  const Folder folder;
  signal(SIGXFSZ, SIG_IGN);  // as Python does
  rlimit before;
  CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
  {
    DiskTier tier(options_of(folder, 7, 3));
    CHECK(tier.allocate() == 0);
    rlimit lower = before;
    lower.rlim_cur = 2 * kRecord;
    CHECK(setrlimit(RLIMIT_FSIZE, &lower) == 0);
    CHECK(tier.allocate() == 1 && tier.allocate() == 2 && tier.allocate() == -1);
    CHECK(tier.stats().capacity == 3 && tier.stats().refusal.find("File too large") != std::string::npos);
    write(tier, 0, 5);
    CHECK(holds(tier, 0, 5));
    CHECK(code_of([&] { write(tier, 2, 6); }) == EFBIG);  // beyond the limit, though it was preallocated
    CHECK(holds(tier, 0, 5));
  }
  CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
}

TEST_CASE(many_threads) {
  const Folder folder;
  for (const bool faulty : {false, true}) {
    const auto ops = std::make_shared<Faults>();
    std::atomic<unsigned> calls{0};
    if (faulty) {
      ops->on_read = ops->on_write = [&](std::size_t bytes, off_t) -> std::int64_t {
        const unsigned call = ++calls;
        return call % 5 == 0 ? -EINTR : call % 7 == 0 ? static_cast<std::int64_t>(bytes) / 2 + 1 : bytes;
      };
    }
    DiskTier tier(options_of(folder, 40, 3, ops));
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 8; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937 random(t);
        std::map<DiskTier::Extent, std::uint32_t> mine;
        for (int i = 0; i < 150; ++i) {
          if (mine.size() < 5 && random() % 2 == 0) {
            const auto extent = tier.allocate();
            CHECK(extent >= 0);  // 8 * 5 fit
            mine[extent] = t * 1000 + static_cast<unsigned>(i);
            write(tier, extent, mine[extent]);
          } else if (!mine.empty()) {
            const auto place = std::next(mine.begin(), random() % mine.size());
            CHECK(holds(tier, place->first, place->second));
            if (random() % 2 == 0) {
              tier.free(place->first);
              mine.erase(place);
            }
          }
          CHECK(tier.stats().reserved_bytes <= 40 * kRecord);
        }
        for (const auto& [extent, seed] : mine) tier.free(extent);
      });
    }
    for (auto& thread : threads) thread.join();
    CHECK(tier.stats().used == 0 && tier.stats().capacity == 40);
  }
}

// Different parts of one record at the same time.
TEST_CASE(parts_of_a_record_at_once) {
  const Folder folder;
  DiskTier tier(options_of(folder, 2, 2));
  const auto extent = tier.allocate();
  Buffer source, got;
  source.fill(3);
  {
    IoPool pool(4);
    for (std::int64_t at = 0; at < kRecord; at += kAlignment) {
      pool.submit(IoPool::Kind::kWrite, [&, at] {
        tier.write(extent, at, source.data() + at, kAlignment);
        pool.submit(IoPool::Kind::kRead, [&, at] { tier.read(extent, at, got.data() + at, kAlignment); });
      });
    }
  }
  CHECK(got == source);
}
