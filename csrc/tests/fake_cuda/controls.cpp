// fake_*: with which a test drives the stand-in, and sees what the bank asked of it.
#include <string>

#include "machine.h"

using namespace fake;

namespace {

int launch(Handle stream, Operation operation) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  return m.enqueue(stream, std::move(operation));
}

}  // namespace

// A caller's compute stream (flags 1: non-blocking); launches are kernels on it.
API Handle fake_stream(unsigned flags) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  const Handle stream = m.next_handle += 16;
  m.streams[stream].blocking = flags != 1;
  return stream;
}

API int fake_launch_write(Handle stream, std::uintptr_t to, int byte, std::size_t bytes) {
  Operation operation;
  operation.kind = Operation::kFill;
  operation.byte = byte;
  operation.parts = {{to, 0, bytes}};
  return launch(stream, std::move(operation));
}

API int fake_launch_copy(Handle stream, std::uintptr_t to, std::uintptr_t from, std::size_t bytes) {
  Operation operation;
  operation.kind = Operation::kMove;
  operation.parts = {{to, from, bytes}};
  return launch(stream, std::move(operation));
}

// A violation when the kernel does not find `expected` (taken now) at `from`.
API int fake_launch_check(Handle stream, std::uintptr_t from, const unsigned char* expected, std::size_t bytes) {
  Operation operation;
  operation.kind = Operation::kCheck;
  operation.expected.assign(expected, expected + bytes);
  operation.parts = {{0, from, bytes}};
  return launch(stream, std::move(operation));
}

// Up to `steps` steps, all that can be done when negative; starts the drawing anew unless seed is negative. Steps done.
API std::int64_t fake_run(std::int64_t steps, std::int64_t seed) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  if (seed >= 0) m.random.seed(static_cast<std::uint64_t>(seed));
  std::int64_t done = 0;
  while (done != steps && m.step()) ++done;
  return done;
}

// Operations not finished, of one stream or, with -1, of all.
API std::int64_t fake_pending(std::int64_t stream) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  std::int64_t pending = 0;
  for (const auto& [handle, state] : m.streams) {
    if (stream < 0 || handle == static_cast<Handle>(stream)) pending += static_cast<std::int64_t>(state.queue.size());
  }
  return pending;
}

// Operations not finished that read or write these bytes.
API std::int64_t fake_touching(std::uintptr_t address, std::size_t bytes) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  return m.touching(address, address + bytes, false);
}

// One a line, "" when there are none; valid until this thread asks again.
API const char* fake_violations() {
  thread_local std::string text;
  Machine& m = machine();
  const Hold hold(m.mutex);
  text.clear();
  for (const std::string& violation : m.violations) text += (text.empty() ? "" : "\n") + violation;
  return text.c_str();
}

// Calls ("batches", "h2d", "d2h", "d2d", "register_calls", "events_made"), "captured" operations, copies of "pageable"
// memory, "batch_flags" of the last batch; and what there is now: "streams" (the legacy one included), "events",
// "contexts", "ranges"; and of the calling thread: contexts it has "current", its "capture_mode" (0: global).
API std::int64_t fake_count(const char* name) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  const std::string what = name;
  if (what == "streams") return static_cast<std::int64_t>(m.streams.size());
  if (what == "events") return static_cast<std::int64_t>(m.events.size());
  if (what == "ranges") return static_cast<std::int64_t>(m.ranges.size());
  if (what == "contexts") return m.contexts;
  if (what == "current") return context_depth;
  if (what == "capture_mode") return capture_mode;
  return m.counts[what];
}

// Options: the list at the top of machine.cpp. -1 when there is none of that name.
API int fake_set(const char* name, std::int64_t value) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  return m.set(name, value) ? 0 : -1;
}

// A stream that is held does not run: a long kernel at its head.
API void fake_hold(Handle stream, int held) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  m.streams[stream].held = held != 0;
  m.changed.notify_all();
}

// Begins a capture on a stream, or ends it on all streams it has reached. Operations captured so far.
API std::int64_t fake_capture(Handle stream, int on) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  if (on != 0) m.streams[stream].capturing = true;
  for (auto& [handle, state] : m.streams) {
    if (on == 0) state.capturing = false;
  }
  return m.counts["captured"];
}

// Declares a device allocation, or with 0 bytes forgets one.
API void fake_allocation(std::uintptr_t address, std::size_t bytes) {
  Machine& m = machine();
  const Hold hold(m.mutex);
  if (bytes == 0) {
    m.ranges.erase(address);
  } else {
    m.ranges[address] = {address + bytes, false};
  }
}

// As new; not while a device is open.
API void fake_reset() {
  Machine& m = machine();
  const Hold hold(m.mutex);
  m.reset();
}
