// A GPU that is none: streams whose work is put off until something forces it, and then done in an order drawn at
// random from those that the streams and events allow. What lacks a dependency comes out as wrong bytes.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace fake {

constexpr int kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kDeinitialized = 4, kInvalidDevice = 101,
              kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500, kNotReady = 600, kIllegalAddress = 700,
              kAlreadyRegistered = 712, kNotRegistered = 713, kCaptureUnsupported = 900, kCaptureImplicit = 906,
              kCapturedEvent = 907, kUnknown = 999;
const char* name_of(int result);  // "" for a number that is not the driver's

using Handle = std::uintptr_t;

// One recording of an event.
struct Mark {
  bool done = false;
  bool captured = false;
};
using MarkRef = std::shared_ptr<Mark>;

struct Part {
  std::uintptr_t to = 0, from = 0;
  std::size_t bytes = 0;
};

struct Operation {
  enum Kind { kMark, kWait, kMove, kFill, kCheck } kind = kMark;
  MarkRef mark;
  std::vector<Part> parts;              // unordered among themselves
  std::vector<unsigned char> expected;  // kCheck: what is to be found at parts[0].from
  int byte = 0;                         // kFill
  bool by_copy_engine = false;
  bool started = false;
  std::vector<Part> pieces;  // still to be done, once started

  bool touches(std::uintptr_t begin, std::uintptr_t end) const;
};

struct Stream {
  std::deque<Operation> queue;
  bool blocking = true;    // synchronises with the legacy stream as far as captures are concerned
  bool capturing = false;
  bool held = false;       // the test keeps it from running
};

struct Range {
  std::uintptr_t end = 0;
  bool host = false;
};

// Every member but `mutex` needs the mutex to be held.
class Machine {
 public:
  Machine() { reset(); }
  void reset();

  std::int64_t option(const std::string& name) const;
  bool set(const std::string& name, std::int64_t value);
  void violation(const std::string& what) { violations.push_back(what); }

  // Appends, or takes note of a captured operation. Returns the driver's result.
  int enqueue(Handle stream, Operation operation);
  // Copies by the copy engine: looks after ranges and overlaps first.
  int enqueue_copy(Handle stream, std::vector<Part> parts, bool host_to, bool host_from);
  // One operation's start, or one piece of it, of a stream drawn at random. False when nothing can run.
  bool step();
  // Runs until the mark is done; waits while all that could run is held.
  int finish(std::unique_lock<std::mutex>& hold, const MarkRef& mark);
  int finish_stream(std::unique_lock<std::mutex>& hold, Handle stream);
  bool captures() const;
  bool registered(std::uintptr_t address) const;
  std::int64_t touching(std::uintptr_t begin, std::uintptr_t end, bool copies_only) const;

  std::mutex mutex;
  std::condition_variable changed;
  std::map<Handle, Stream> streams;
  std::map<Handle, MarkRef> events;        // with their latest recording, null before the first
  std::map<std::uintptr_t, Range> ranges;  // registered host memory, declared device allocations
  std::map<std::string, std::int64_t> counts;
  std::vector<std::string> violations;
  std::mt19937_64 random;
  Handle next_handle = 0;
  int contexts = 0;  // retained

 private:
  bool within_ranges(std::uintptr_t begin, std::size_t bytes, bool host);
  void start(Operation& operation);
  void run_piece(Operation& operation);

  std::map<std::string, std::int64_t> options_;
};

// The process's one machine. Never destroyed: calls may come at the end of the process.
Machine& machine();
// Of the calling thread.
inline thread_local int context_depth = 0;
inline thread_local int capture_mode = 0;  // 0: global, 2: relaxed
using Hold = std::unique_lock<std::mutex>;

}  // namespace fake

#define API extern "C" __attribute__((visibility("default")))
