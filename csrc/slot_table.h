// Which slot of a pool holds which frame.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

namespace longlive {

// Maps frames to the slots first .. first + capacity - 1, one slot a frame.
//
// A frame that is not there gets the lowest free slot; when none is free, the slot of the least recently used frame that
// nobody has pinned. Used means acquired, touched, or unpinned for the last time. The slots given depend on the sequence
// of calls alone. Every call that throws leaves the table as it was.
//
// Every operation on one frame takes constant time, except that a slot freed by release() is found again in
// O(log(slots freed)). Not thread-safe: the owner (in Python, the interpreter lock) serialises the calls.
//
// Throws std::invalid_argument for an argument that is not allowed or a frame that is not there, std::runtime_error when
// the state of the table forbids the call. Frames are >= 0.
class SlotTable {
 public:
  using Frame = std::int64_t;
  using Slot = std::int32_t;

  struct Acquired {
    Slot slot = -1;
    bool is_new = false;           // the frame was not there: its page must be written
    std::optional<Frame> evicted;  // the frame that lost this slot
  };

  // capacity >= 1, first >= 0, first + capacity - 1 <= 2^31 - 1.
  explicit SlotTable(std::int64_t capacity, std::int64_t first = 0);

  // The frame's slot, given now if it has none; counts as a use. Throws when every slot is pinned.
  Acquired acquire(Frame frame);
  // All of them or, when they do not all fit, none. No frame of the request is evicted for another one of it. A frame
  // named twice gets one slot. Afterwards the last of the request is the most recently used.
  std::vector<Acquired> acquire_many(const std::vector<Frame>& frames);

  Slot lookup(Frame frame) const;  // -1 when absent; not a use
  Slot touch(Frame frame);         // as lookup, and a use

  // A pinned frame is neither evicted nor released. Pins count. Both return the pins the frame has now.
  std::int64_t pin(Frame frame);
  std::int64_t unpin(Frame frame);
  std::int64_t pins(Frame frame) const;  // 0 when absent

  // Frees the frame's slot and returns it.
  Slot release(Frame frame);
  // Forgets every frame, pinned or not: the table is as new (of its present capacity).
  void clear();
  // Adds slots at the end. new_capacity >= capacity().
  void grow(std::int64_t new_capacity);

  std::size_t size() const { return slots_.size(); }
  std::int64_t capacity() const { return static_cast<std::int64_t>(entries_.size()); }
  Slot first() const { return first_; }
  // In the order in which they would be evicted, least recently used first; then the pinned ones, least recently used
  // first.
  std::vector<Frame> frames() const;

 private:
  using Index = std::int32_t;  // slot - first_
  static constexpr Index kNone = -1;

  struct Entry {
    Frame frame = -1;
    std::int64_t pins = 0;
    std::uint64_t request = 0;  // last acquire_many that named the frame
    Index previous = kNone;     // neighbours in idle_ or pinned_
    Index next = kNone;
  };
  // Oldest use at the head. The links are in the entries, so that moving one costs nothing and cannot fail.
  struct List {
    Index head = kNone;
    Index tail = kNone;
  };

  static std::size_t checked_capacity(const char* name, std::int64_t capacity, std::int64_t first);
  Index find(Frame frame) const;
  Index require(Frame frame, const char* action) const;
  void append(List& list, Index index) noexcept;
  void remove(List& list, Index index) noexcept;
  void use(Index index) noexcept;
  std::int64_t free_count() const;
  Index take_free() noexcept;

  Slot first_ = 0;
  std::vector<Entry> entries_;                // by index
  std::unordered_map<Frame, Index> slots_;    // frame -> index
  std::vector<Index> freed_;                  // min-heap of slots that were released, all < unused_
  Index unused_ = 0;                          // slots from here on were never given
  List idle_;
  List pinned_;
  std::int64_t pinned_count_ = 0;             // frames in pinned_
  std::uint64_t request_ = 0;                 // acquire_many calls so far
};

}  // namespace longlive
