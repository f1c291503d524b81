// Records of host memory that frames, and what is under way for them, hold.
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <memory>
#include <vector>

#include "bank/device.h"
#include "bank/host_arena.h"

namespace longlive::bank {

struct Entry;

// Points of copies, the last of which says that all are done; empty once that is known. Shared by the frames of a call.
using Points = std::shared_ptr<std::vector<EventRef>>;

struct Record {
  std::byte* memory = nullptr;
  Entry* owner = nullptr;  // the frame whose `host` this is
  int users = 0;           // threads and jobs of the host that read or write it
  Points written;          // copies from the device into it, one a layer; null: done
  Points fetched;          // the last copy from it to the device, earlier ones lie before; null: done
  std::uint64_t used = 0;  // when its frame was used
  enum class Place { kLoose, kOnly, kBoth } place = Place::kLoose;
  std::list<Record>::iterator self;  // in the list of that place
};

// Not thread-safe: the bank serialises the calls.
//
// Every record that the arena gave out is in one of three lists: `only` (a frame that disk does not have) and `both`
// (one that it has, so that the record may be dropped), in order of use; `loose`: no frame's. A loose record without
// users is given back as soon as the device is done with it.
class HostRecords {
 public:
  using List = std::list<Record>;

  HostRecords(Device& device, const ArenaOptions& options);

  // Records that can be had now without waiting.
  struct Choice {
    std::vector<Record*> loose;  // without users
    std::vector<Record*> drops;  // of `both`, least recently used first
    std::int64_t fresh = 0;      // of the arena
    std::int64_t size() const { return static_cast<std::int64_t>(loose.size() + drops.size()) + fresh; }
  };
  // At most `count`. `idle`: the host will write them, so that nothing may be under way in them; else copies of the
  // device may be, and the next ones are put behind. `may_drop` says which frames may lose their record, and is asked
  // for no more than are needed.
  template <typename MayDrop>
  Choice choose(std::int64_t count, bool idle, MayDrop may_drop) {
    Choice choice;
    choose_free(choice, count, idle);
    for (Record& record : both) {
      if (choice.size() >= count) break;
      if (record.users == 0 && (!idle || quiet(record)) && may_drop(record)) choice.drops.push_back(&record);
    }
    return choice;
  }
  void choose_free(Choice& choice, std::int64_t count, bool idle);

  // The chosen records, loose, each with one user: the caller. Calls lose(record) before a frame loses its record.
  // Fewer than chosen when the system refuses memory. Throws std::bad_alloc; what was taken is loose without users
  // then.
  template <typename Lose>
  std::vector<Record*> take(const Choice& choice, Lose lose) {
    std::vector<Record*> taken;
    taken.reserve(static_cast<std::size_t>(choice.size()));
    take_fresh(choice.fresh, taken);
    for (Record* record : choice.loose) taken.push_back(record);
    for (Record* record : choice.drops) {
      lose(*record);
      move(*record, Record::Place::kLoose);
      record->owner = nullptr;
      taken.push_back(record);
    }
    for (Record* record : taken) ++record->users;
    return taken;
  }

  // Moves a record to the end (most recently used) of a list.
  void move(Record& record, Record::Place place) noexcept;
  // To `both`, where its last use belongs.
  void move_by_use(Record& record) noexcept;
  void touch(Record& record) noexcept;

  // Takes over a list of one: its points are dropped as soon as they have been reached, be the records asked for or
  // not, so that no more of the device's events are held than copies are under way. Each queue in the order of its
  // copies.
  void watch(Direction direction, std::list<Points>& points) noexcept;
  void drop_reached() noexcept;
  // How often points were found to have been reached: the device may get on between two looks at the same record.
  std::uint64_t arrivals() const { return arrivals_; }

  bool stored(Record& record) noexcept;                    // copies from the device into it are done
  bool fetched(Record& record) noexcept;                   // copies from it to the device are done
  bool quiet(Record& record) noexcept;                     // both
  void reap() noexcept;                                    // gives loose records back
  // Whether so many records, or all that are free, can be had without growth.
  bool ready(std::int64_t count) const { return arena_.ready() >= std::min(count, free_count()); }
  HostArena& arena() { return arena_; }
  std::int64_t free_count() const { return arena_.stats().capacity - arena_.stats().used; }
  const ArenaStats& stats() const { return arena_.stats(); }

  List only, both, loose;

 private:
  void take_fresh(std::int64_t count, std::vector<Record*>& taken);
  List& list(Record::Place place);
  bool passed(Points& points) noexcept;

  Device& device_;
  HostArena arena_;
  std::uint64_t uses_ = 0, arrivals_ = 0;
  std::list<Points> to_host_, to_device_;
};

}  // namespace longlive::bank
