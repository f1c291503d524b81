// Host memory for records: grown in slabs, page-locked where the device can, never beyond its limit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bank/device.h"
#include "bank/host_memory.h"

namespace longlive::bank {

struct ArenaOptions {
  std::int64_t record_bytes = 0;  // a multiple of kAlignment
  std::int64_t limit_bytes = 0;   // of all slabs together
  std::int64_t slab_bytes = 0;    // rounded down to whole records, at least one
  bool lock = true;               // page-lock slabs
  int touch_threads = 0;          // that touch a new slab's pages; 0: as many as there are cores, at most 8
  std::function<HostMemory()> memory;  // what the system still has; null: host_memory()
};

struct ArenaStats {
  std::int64_t capacity = 0;       // records that fit below the limit (fewer once the system refused memory)
  std::int64_t used = 0;           // records given out
  std::int64_t reserved_bytes = 0; // of slabs
  std::int64_t locked_bytes = 0;
  std::int64_t pageable_slabs = 0; // slabs that could not be locked
  std::string pageable_reason;
  std::string refusal;             // why the last slab was refused, "" when none was
};

// Not thread-safe: the bank serialises the calls. Records are aligned to kAlignment and lie in one slab each, so that
// no copy spans two registrations. New memory is zero. Records are reused last in, first out.
class HostArena {
 public:
  // Throws std::invalid_argument for sizes that are not allowed. No memory is taken before the first record.
  HostArena(Device& device, const ArenaOptions& options);
  ~HostArena();
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  // A record, or nullptr when the limit is reached or the system refuses another slab (capacity shrinks then to what is
  // there, so that nobody waits for memory that does not come).
  std::byte* allocate();
  void free(std::byte* record);

  // Growth in three steps, for a caller whose lock is not to be held while memory is touched and locked, which takes a
  // tenth of a second for each GiB or more: the second is for any thread, beside other calls.
  class Growth;
  // Another slab; null when the limit is reached or a growth is under way.
  std::shared_ptr<Growth> begin_growth();
  static void make(Growth& growth);  // throws as allocate() does
  // Made or not. What the system has refused is told, and lowers the capacity, only if it was `needed`. Whether the
  // arena has grown.
  bool end_growth(Growth& growth, bool needed) noexcept;
  // Records that allocate() has without another slab.
  std::int64_t ready() const;
  const ArenaStats& stats() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace longlive::bank
