// Records on disk: preallocated files ("shards") without names, direct I/O where the file system takes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <sys/types.h>

namespace longlive::bank {

// A read or write that did not go through; `code` is errno, 0 for an end of file where data should be.
class IoError : public std::runtime_error {
 public:
  IoError(const std::string& what, int error) : std::runtime_error(what), code(error) {}
  int code;
};

// An empty file of a name that is removed at once, for file systems that make none without. A file descriptor, or -1
// and errno. A process killed in between leaves the empty file.
int open_unlinked(const char* folder, int flags);

// The system calls the tier makes. Tests replace them.
class FileOps {
 public:
  virtual ~FileOps() = default;
  virtual int open_unnamed(const char* folder, int flags);  // O_TMPFILE, else open_unlinked; flags: O_DIRECT or 0
  virtual int allocate(int fd, off_t offset, off_t bytes);  // posix_fallocate: an errno
  virtual ssize_t pread(int fd, void* to, std::size_t bytes, off_t offset);
  virtual ssize_t pwrite(int fd, const void* from, std::size_t bytes, off_t offset);
  virtual int close(int fd);
};

struct DiskOptions {
  std::string folder;             // must exist
  std::int64_t record_bytes = 0;  // a multiple of kAlignment
  std::int64_t limit_bytes = 0;   // of all shards together
  std::int64_t shard_bytes = 0;   // rounded down to whole records, at least one
  bool direct = true;             // try direct I/O
  std::shared_ptr<FileOps> ops;   // null: the system's
};

struct DiskStats {
  std::int64_t capacity = 0;        // records that fit below the limit (fewer once the file system refused space)
  std::int64_t used = 0;            // records given out
  std::int64_t reserved_bytes = 0;  // of shards
  std::int64_t read_bytes = 0;
  std::int64_t written_bytes = 0;
  std::int64_t buffered_shards = 0; // shards without direct I/O
  std::string buffered_reason;
  std::string refusal;              // why the last shard was refused, "" when none was
};

// allocate, free and stats serialise themselves; read and write may be called by many threads at once, on different
// records or on different parts of one.
//
// The files have no names, so that a killed process leaves nothing behind and nobody can open them; a saved bank is
// what outlives a process.
class DiskTier {
 public:
  using Extent = std::int64_t;  // number of a record's place, < 0 for none

  explicit DiskTier(const DiskOptions& options);  // std::invalid_argument; IoError when the folder cannot be written to
  ~DiskTier();
  DiskTier(const DiskTier&) = delete;
  DiskTier& operator=(const DiskTier&) = delete;

  // A place for a record, -1 when the limit is reached or the file system refuses another shard (capacity shrinks
  // then).
  Extent allocate();
  void free(Extent extent);
  // `offset` (in the record) and `bytes` are multiples of kAlignment, memory is aligned to it. Short transfers are
  // continued, EINTR is retried. Throws IoError.
  void read(Extent extent, std::int64_t offset, std::byte* to, std::int64_t bytes);
  void write(Extent extent, std::int64_t offset, const std::byte* from, std::int64_t bytes);
  DiskStats stats() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace longlive::bank
