// The memory bank: pages of finished frames in device slots, host memory and on disk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bank/device.h"
#include "bank/disk_tier.h"
#include "bank/host_arena.h"
#include "bank/page_layout.h"

namespace longlive::bank {

// No room for what was asked, and nothing may be given up for it.
class BankFull : public std::runtime_error {
  using std::runtime_error::runtime_error;
};
// A stored page that failed its checksum, or could not be read. The frame is gone from the bank.
class Damaged : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct BankOptions {
  PageLayout layout;
  SlotGeometry slots;  // count may be 0: then nothing can be fetched
  ArenaOptions host;   // record_bytes is set by the bank
  DiskOptions disk;    // likewise; limit_bytes 0: no disk tier
  int io_threads = 8;  // also the queue depth on disk
  // Host records kept for frames on their way to the device, while there is a disk tier.
  std::int64_t bounce_records = 0;
  // Most frames of one commit.
  std::int64_t commit_records = 1;
};

// Why a prefetched frame cannot be had.
struct Lost {
  Frame frame = -1;
  std::string reason;  // "missing", "damaged: layer L, sample B: ...", "replaced"
};

struct Where {
  Slot slot = -1;     // device slot that holds, or is being filled with, the frame's present generation
  bool host = false;  // host memory holds it, or a copy to there is on its way
  bool disk = false;
  std::int64_t generation = -1;  // -1: the bank does not have the frame
};

struct BankStats {
  // frames per tier; a frame in several tiers counts in each
  std::int64_t frames = 0, device_frames = 0, host_frames = 0, disk_frames = 0;
  std::int64_t hits_device = 0, hits_host = 0, hits_disk = 0, misses = 0;  // prefetched frames, by the best tier
  std::int64_t stored_bytes = 0;    // device to host
  std::int64_t fetched_bytes = 0;   // host to device
  std::int64_t stall_us = 0;        // the host waited: for a spill before a commit, for a read before a settle
  std::int64_t late_layers = 0;     // wait() found the layer's copies unfinished
  std::int64_t evictions = 0;       // frames that lost their device slot to another
  std::int64_t host_drops = 0;      // frames that lost their host record because disk has them
  std::int64_t spilled = 0;         // frames written to disk
  std::int64_t failed_spills = 0;   // that could not be written; the frame stays in host memory
  std::int64_t damaged_pages = 0;
  std::int64_t replaced = 0;        // frames committed anew
  std::int64_t dropped_fetches = 0; // of a generation that was replaced, forgotten or damaged meanwhile
  ArenaStats host;
  DiskStats disk;
  DeviceStats device;
};

// A page is the bank's from commit on and never changes within its generation, so that every tier may hold a copy and
// dropping one costs nothing. All public calls may be made from any thread; they take turns. After close() every call
// but close() throws std::runtime_error ("closed"). So does every call in a process that was forked from the bank's
// own, where close() does nothing.
//
// Order. Copies to the host begin after everything on the compute stream at the time of commit(); wait(layer) makes a
// stream wait for all copies of that layer, in both directions, that were enqueued before: after it, pages that were
// fetched may be read, and what was committed may be overwritten. Layers are copied in ascending order, one point a
// layer. A slot is filled after the last release() of what it held, and after all that the streams which prefetched it,
// or waited since, had been given by then: reading on one stream and releasing on another, or replacing a frame that is
// being read, costs time and no bytes. Such a stream must live until the frame is released.
class Bank {
 public:
  // Throws std::invalid_argument when the options cannot hold one commit and one fetch.
  Bank(const BankOptions& options, std::unique_ptr<Device> device);
  ~Bank();  // closes
  Bank(const Bank&) = delete;
  Bank& operator=(const Bank&) = delete;

  // Stores frames, whose pages lie at `pages` (one a frame, one part a segment) when `stream` gets there. They go to
  // host memory and, as far as slots are free (never by evicting), to device slots as well. All or nothing: throws
  // BankFull when they do not fit (see room()), std::invalid_argument for a frame that is there (with `replace`: that
  // is not), or named twice; std::runtime_error while `stream` is being captured.
  //
  // With `replace` the pages are a new generation: the old one is in no tier and no slot when the call returns, pins of
  // it are gone, and fetches of it that are under way are dropped (settle() names them as "replaced").
  void commit(const std::vector<Frame>& frames, const std::vector<PageSource>& pages, Stream stream, bool replace);
  // Stores one frame from a record in host memory, copied before the call returns. For opening a saved bank.
  void insert(Frame frame, const std::byte* record, std::int64_t generation);
  // Copies a frame's record to host memory, from host or disk, checked. Throws std::out_of_range for a frame that is
  // not there, Damaged.
  void read(Frame frame, std::byte* record);

  // Brings frames into device slots and pins them there: those that are not resident are copied layer by layer from
  // host memory; reads from disk begin. Frames the bank does not have are misses (see settle). Counts as a use in every
  // tier. All or nothing: throws BankFull when slots or host records do not suffice beside what is pinned;
  // std::runtime_error while `stream` is captured.
  void prefetch(const std::vector<Frame>& frames, Stream stream);
  // Waits (on the host) for reads from disk, enqueues their copies to the device, and names the frames of the
  // prefetches since the last settle that cannot be had. Those are not pinned, and their slots are never valid.
  std::vector<Lost> settle();
  // `stream` waits for the copies of a layer; see Order. Settles first when a prefetch has not been. Throws while
  // captured. With `fetched_only` it waits for copies into slots alone, so not for the work that wrote committed pages:
  // then pages that were fetched may be read, and what was committed must not be overwritten.
  void wait(std::int64_t layer, Stream stream, bool fetched_only = false);
  // `stream` has been given its last read of these frames' slots: takes back one pin each. A frame that was lost,
  // replaced or forgotten is passed over.
  void release(const std::vector<Frame>& frames, Stream stream);

  // Drops frames from every tier. Throws std::invalid_argument for a frame that is not there or is pinned; nothing is
  // dropped then.
  void forget(const std::vector<Frame>& frames);
  void clear();  // drops everything, pinned or not, counters excepted

  // Frames that can be committed before some must be forgotten; < 0 when a tier lost capacity below what it holds.
  std::int64_t room() const;
  Where where(Frame frame) const;
  std::vector<Frame> frames() const;  // ascending
  // Waits until all copies and spills under way are done.
  void flush();
  BankStats stats() const;
  void close() noexcept;  // waits for what is under way, then gives everything back
  bool closed() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace longlive::bank
