#include "bank/disk_tier.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include "bank/page_layout.h"

namespace longlive::bank {

int open_unlinked(const char* folder, int flags) {
  std::string name = std::string(folder) + "/.longlive-bank-XXXXXX";
  const int named = ::mkostemp(name.data(), O_CLOEXEC);
  if (named < 0) return -1;
  ::unlink(name.c_str());
  // Afterwards, because some file systems make the file first and then refuse the flags.
  if (flags != 0 && ::fcntl(named, F_SETFL, ::fcntl(named, F_GETFL) | flags) != 0) {
    const int code = errno;
    ::close(named);
    errno = code;
    return -1;
  }
  return named;
}

int FileOps::open_unnamed(const char* folder, int flags) {
  // O_EXCL: nobody can give the file a name later.
  const int fd = ::open(folder, O_TMPFILE | O_RDWR | O_EXCL | O_CLOEXEC | flags, 0600);
  return fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR) ? fd : open_unlinked(folder, flags);
}
int FileOps::allocate(int fd, off_t offset, off_t bytes) { return ::posix_fallocate(fd, offset, bytes); }
ssize_t FileOps::pread(int fd, void* to, std::size_t bytes, off_t offset) { return ::pread(fd, to, bytes, offset); }
ssize_t FileOps::pwrite(int fd, const void* from, std::size_t bytes, off_t offset) {
  return ::pwrite(fd, from, bytes, offset);
}
int FileOps::close(int fd) { return ::close(fd); }

namespace {

// Transfers in a row that bring nothing before it is an error.
constexpr int kTries = 16;

std::string text_of(int code) { return std::generic_category().message(code); }

// What says that a file system does not take direct I/O (or not so), rather than that something broke.
bool refuses_direct(int code) { return code == EINVAL || code == EOPNOTSUPP || code == ENOTSUP; }

[[noreturn]] void fail(const std::string& what, int code) { throw IoError(what + ": " + text_of(code), code); }

void check(const char* name, std::int64_t got, bool allowed, const char* what) {
  if (!allowed) throw std::invalid_argument(std::string(name) + " = " + std::to_string(got) + ", allowed: " + what);
}

// One shard's file.
class File {
 public:
  // Throws IoError. When direct I/O is refused, `direct` becomes false and `reason` says why.
  File(std::shared_ptr<FileOps> ops, const std::string& folder, bool* direct, std::string* reason)
      : ops_(std::move(ops)) {
    if (*direct) {
      open(folder, O_DIRECT);
      const int code = fd_ < 0 ? errno : probe();
      if (code == 0) {
        direct_ = true;
        return;
      }
      const std::string step = fd_ < 0 ? "open" : "first transfer";
      close();
      if (!refuses_direct(code)) fail(step + " with O_DIRECT in " + folder, code);
      *direct = false;
      *reason = step + " with O_DIRECT in " + folder + ": " + text_of(code);
    }
    open(folder, 0);
    const int code = fd_ < 0 ? errno : probe();
    const std::string step = fd_ < 0 ? "open" : "first transfer";
    if (code != 0) {
      close();
      fail(step + " in " + folder, code);
    }
  }
  ~File() { close(); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // An errno.
  int allocate(std::int64_t bytes) {
    for (;;) {
      const int code = ops_->allocate(fd_, 0, static_cast<off_t>(bytes));
      if (code != EINTR) return code;
    }
  }

  bool direct() const { return direct_; }

  // Moves `bytes` bytes by `call(done)`, which transfers what is left after `done` bytes. An IoError says `what`.
  template <typename Call>
  void transfer(std::int64_t bytes, const std::string& what, bool reading, const Call& call) {
    std::int64_t done = 0;
    for (int tries = 0; done < bytes;) {
      const ssize_t got = call(done);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(what, errno);
      if (got == 0 && reading) throw IoError(what + ": end of file after " + std::to_string(done) + " bytes", 0);
      std::int64_t next = std::min(bytes, done + static_cast<std::int64_t>(got));
      // Direct I/O goes on at a multiple of the alignment only: the bytes after the last one are moved again.
      if (direct_ && next < bytes) next -= next % kAlignment;
      tries = next > done ? 0 : tries + 1;
      if (tries == kTries) fail(what + ": no progress after " + std::to_string(done) + " bytes", EIO);
      done = next;
    }
  }

  void read(std::int64_t at, std::byte* to, std::int64_t bytes, const std::string& what) {
    transfer(bytes, what, true, [&](std::int64_t done) {
      return ops_->pread(fd_, to + done, static_cast<std::size_t>(bytes - done), static_cast<off_t>(at + done));
    });
  }
  void write(std::int64_t at, const std::byte* from, std::int64_t bytes, const std::string& what) {
    transfer(bytes, what, false, [&](std::int64_t done) {
      return ops_->pwrite(fd_, from + done, static_cast<std::size_t>(bytes - done), static_cast<off_t>(at + done));
    });
  }

 private:
  void open(const std::string& folder, int flags) {
    do {
      fd_ = ops_->open_unnamed(folder.c_str(), flags);
    } while (fd_ < 0 && errno == EINTR);
  }

  void close() {
    if (fd_ >= 0) ops_->close(fd_);
    fd_ = -1;
  }

  // Writes the first kAlignment bytes and reads them again. An errno, EIO when something else comes back.
  int probe() {
    constexpr auto size = static_cast<std::size_t>(kAlignment);
    const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(size, 2 * size), std::free);
    if (memory == nullptr) return ENOMEM;
    auto* const wrote = static_cast<std::byte*>(memory.get());
    std::byte* const came = wrote + size;
    std::memset(wrote, 0x5a, size);
    std::memset(came, 0, size);
    try {
      write(0, wrote, kAlignment, "");
      read(0, came, kAlignment, "");
    } catch (const IoError& error) {
      return error.code == 0 ? EIO : error.code;
    }
    return std::memcmp(wrote, came, size) == 0 ? 0 : EIO;
  }

  const std::shared_ptr<FileOps> ops_;
  int fd_ = -1;
  bool direct_ = false;
};

}  // namespace

struct DiskTier::State {
  DiskOptions options;
  std::int64_t shard_records = 0;

  std::mutex growing;  // held while a shard is made; taken before `mutex`
  std::mutex mutex;    // for all below
  DiskStats stats;
  std::vector<std::shared_ptr<File>> shards;
  std::vector<Extent> unused;  // room for all records, so that free does not allocate
  std::vector<bool> given;

  std::atomic<std::int64_t> read_bytes{0}, written_bytes{0};

  bool is_given(Extent extent) const {
    return extent >= 0 && extent < static_cast<Extent>(given.size()) && given[static_cast<std::size_t>(extent)];
  }

  // A place that is free now, -1 for none.
  Extent take() {
    if (unused.empty()) return -1;
    const Extent extent = unused.back();
    unused.pop_back();
    given[static_cast<std::size_t>(extent)] = true;
    ++stats.used;
    return extent;
  }

  // Makes another shard, or shrinks the capacity to what there is. With `growing` held.
  void grow() {
    std::int64_t first, records;
    {
      const std::lock_guard lock(mutex);
      first = stats.reserved_bytes / options.record_bytes;
      records = std::min(shard_records, stats.capacity - first);
    }
    if (records <= 0) return;
    const std::int64_t bytes = records * options.record_bytes;
    bool direct = options.direct;
    std::string reason, refusal;
    std::shared_ptr<File> file;
    try {
      file = std::make_shared<File>(options.ops, options.folder, &direct, &reason);
      int code = file->allocate(bytes);
      if (file->direct() && refuses_direct(code)) {
        // posix_fallocate stands in for file systems that cannot by writing single bytes, which direct I/O refuses.
        direct = false;
        reason = "preallocation with O_DIRECT in " + options.folder + ": " + text_of(code);
        file = std::make_shared<File>(options.ops, options.folder, &direct, &reason);
        code = file->allocate(bytes);
      }
      if (code != 0) refusal = text_of(code);
    } catch (const IoError& error) {
      refusal = error.what();
    }

    const std::lock_guard lock(mutex);
    if (!refusal.empty()) {
      stats.refusal = "shard of " + std::to_string(bytes) + " bytes in " + options.folder + ": " + refusal;
      stats.capacity = first;
      return;
    }
    shards.reserve(shards.size() + 1);
    unused.reserve(static_cast<std::size_t>(first + records));
    given.resize(static_cast<std::size_t>(first + records), false);
    shards.push_back(std::move(file));
    for (Extent extent = first + records - 1; extent >= first; --extent) unused.push_back(extent);
    stats.reserved_bytes += bytes;
    if (!direct) {
      ++stats.buffered_shards;
      stats.buffered_reason = options.direct ? reason : "direct I/O was not asked for";
    }
  }

  // The file that holds an extent, and where. Throws for arguments that are not allowed.
  std::shared_ptr<File> find(Extent extent, std::int64_t offset, const std::byte* memory, std::int64_t bytes,
                             std::int64_t* at, std::string* what) {
    check("offset", offset, offset >= 0 && offset % kAlignment == 0 && offset <= options.record_bytes,
          "multiples of 4096 within the record");
    check("bytes", bytes, bytes >= 0 && bytes % kAlignment == 0 && bytes <= options.record_bytes - offset,
          "multiples of 4096 within the record");
    if (reinterpret_cast<std::uintptr_t>(memory) % static_cast<std::uintptr_t>(kAlignment) != 0) {
      throw std::invalid_argument("memory: must be aligned to 4096 bytes");
    }
    *at = extent % shard_records * options.record_bytes + offset;
    const std::lock_guard lock(mutex);
    check("extent", extent, is_given(extent), "those that allocate() gave");
    const Extent shard = extent / shard_records;
    *what += " of " + std::to_string(bytes) + " bytes at " + std::to_string(*at) + " of shard " +
             std::to_string(shard) + " in " + options.folder;
    return shards[static_cast<std::size_t>(shard)];
  }
};

DiskTier::DiskTier(const DiskOptions& options) : state_(std::make_unique<State>()) {
  check("record_bytes", options.record_bytes, options.record_bytes > 0 && options.record_bytes % kAlignment == 0,
        "a positive multiple of 4096");
  check("limit_bytes", options.limit_bytes, options.limit_bytes >= 0, "0 or more");
  check("shard_bytes", options.shard_bytes, options.shard_bytes > 0, "1 or more");
  if (options.folder.empty()) throw std::invalid_argument("folder: must not be empty");
  state_->options = options;
  if (state_->options.ops == nullptr) state_->options.ops = std::make_shared<FileOps>();
  state_->shard_records = std::max<std::int64_t>(1, options.shard_bytes / options.record_bytes);
  state_->stats.capacity = options.limit_bytes / options.record_bytes;

  // Whether the folder can be written to shows now; each shard is probed again, which costs two small transfers.
  bool direct = options.direct;
  std::string reason;
  const File probe(state_->options.ops, options.folder, &direct, &reason);
}

DiskTier::~DiskTier() = default;

DiskTier::Extent DiskTier::allocate() {
  State& state = *state_;
  {
    const std::lock_guard lock(state.mutex);
    if (const Extent extent = state.take(); extent >= 0) return extent;
  }
  const std::lock_guard one_grows(state.growing);
  for (;;) {
    {
      // Another thread may have made a shard meanwhile, and others may have taken all of the last one made here.
      const std::lock_guard lock(state.mutex);
      if (const Extent extent = state.take(); extent >= 0) return extent;
      if (state.stats.reserved_bytes / state.options.record_bytes >= state.stats.capacity) return -1;
    }
    state.grow();  // adds a shard, or lowers the capacity to what there is
  }
}

void DiskTier::free(Extent extent) {
  const std::lock_guard lock(state_->mutex);
  check("extent", extent, state_->is_given(extent), "those that allocate() gave");
  state_->given[static_cast<std::size_t>(extent)] = false;
  state_->unused.push_back(extent);
  --state_->stats.used;
}

void DiskTier::read(Extent extent, std::int64_t offset, std::byte* to, std::int64_t bytes) {
  std::int64_t at;
  std::string what = "read";
  state_->find(extent, offset, to, bytes, &at, &what)->read(at, to, bytes, what);
  state_->read_bytes += bytes;
}

void DiskTier::write(Extent extent, std::int64_t offset, const std::byte* from, std::int64_t bytes) {
  std::int64_t at;
  std::string what = "write";
  state_->find(extent, offset, from, bytes, &at, &what)->write(at, from, bytes, what);
  state_->written_bytes += bytes;
}

DiskStats DiskTier::stats() const {
  const std::lock_guard lock(state_->mutex);
  DiskStats stats = state_->stats;
  stats.read_bytes = state_->read_bytes;
  stats.written_bytes = state_->written_bytes;
  return stats;
}

}  // namespace longlive::bank
