#include "machine.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <cstring>

namespace fake {
namespace {

// Each may be set as FAKE_CUDA_<NAME> in the environment, too.
const std::map<std::string, std::int64_t> kDefaults = {
    {"driver_version", 13000},  // below 12080: no batch copy
    {"proc_address", 1},        // 0: cuGetProcAddress finds nothing
    {"devices", 1},
    {"host_pointers", 1},       // 0: registered memory is not reached by its address
    {"init_result", 0},         // of cuInit
    {"register_oom", 0},        // from the n-th cuMemHostRegister on: out of memory
    {"batch_result", 0},        // of the batch call, which does nothing then
    {"batch_failed", -1},       // the copy that it names then
    {"batch_stream0", 0},       // 1: the batch call takes the legacy stream
    {"fail_copy", 0},           // the n-th copy call from now on fails with ILLEGAL_ADDRESS
    {"not_ready", 0},           // so many queries of events answer NOT_READY whatever the truth
    {"query_steps", 0},         // steps run by each query of an event
    {"poison", 1},              // 0xEE at the destination of a copy under way
    {"shut_down", 0},           // 1: every call returns DEINITIALIZED
    {"seed", 1},
};

const std::map<int, const char*> kNames = {
    {kSuccess, "CUDA_SUCCESS"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
    {kDeinitialized, "CUDA_ERROR_DEINITIALIZED"},
    {100, "CUDA_ERROR_NO_DEVICE"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND"},
    {kNotReady, "CUDA_ERROR_NOT_READY"},
    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {kAlreadyRegistered, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
    {kNotRegistered, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
    {801, "CUDA_ERROR_NOT_SUPPORTED"},
    {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {kCaptureImplicit, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"},
    {kCapturedEvent, "CUDA_ERROR_CAPTURED_EVENT"},
    {kUnknown, "CUDA_ERROR_UNKNOWN"},
};

bool overlap(std::uintptr_t a, std::uintptr_t a_end, std::uintptr_t b, std::uintptr_t b_end) {
  return a < b_end && b < a_end;
}

}  // namespace

Machine& machine() {
  static Machine* const only = new Machine;
  return *only;
}

const char* name_of(int result) {
  const auto found = kNames.find(result);
  return found == kNames.end() ? "" : found->second;
}

bool Operation::touches(std::uintptr_t begin, std::uintptr_t end) const {
  return std::any_of(parts.begin(), parts.end(), [&](const Part& part) {
    return (kind != kCheck && overlap(part.to, part.to + part.bytes, begin, end)) ||
           (kind != kFill && overlap(part.from, part.from + part.bytes, begin, end));
  });
}

void Machine::reset() {
  streams.clear();
  streams[0];
  events.clear();
  ranges.clear();
  counts.clear();
  violations.clear();
  next_handle = 0x1000;
  contexts = 0;
  options_ = kDefaults;
  for (auto& [name, value] : options_) {
    std::string variable = "FAKE_CUDA_" + name;
    for (char& letter : variable) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
    if (const char* text = std::getenv(variable.c_str())) value = std::atoll(text);
  }
  random.seed(static_cast<std::uint64_t>(option("seed")));
}

std::int64_t Machine::option(const std::string& name) const { return options_.at(name); }

bool Machine::set(const std::string& name, std::int64_t value) {
  const auto found = options_.find(name);
  if (found == options_.end()) return false;
  found->second = value;
  if (name == "seed") random.seed(static_cast<std::uint64_t>(value));
  return true;
}

bool Machine::captures() const {
  return std::any_of(streams.begin(), streams.end(), [](const auto& entry) { return entry.second.capturing; });
}

int Machine::enqueue(Handle handle, Operation operation) {
  const auto found = streams.find(handle);
  if (found == streams.end()) return kInvalidHandle;
  Stream& stream = found->second;
  if (handle == 0) {
    for (const auto& [other, state] : streams) {
      if (other == 0 || !state.blocking || !state.capturing) continue;
      violation("work on the legacy stream invalidates the capture of a stream that synchronises with it");
      return kCaptureImplicit;
    }
  }
  // Waiting for a captured event takes the waiting stream into the capture.
  if (operation.kind == Operation::kWait && operation.mark->captured) stream.capturing = true;
  if (stream.capturing) {
    if (operation.kind == Operation::kMark) operation.mark->captured = true;
    ++counts["captured"];
    return kSuccess;
  }
  stream.queue.push_back(std::move(operation));
  return kSuccess;
}

bool Machine::within_ranges(std::uintptr_t begin, std::size_t bytes, bool host) {
  const std::uintptr_t end = begin + bytes;
  for (const auto& [start, range] : ranges) {
    if (!overlap(begin, end, start, range.end)) continue;
    if (begin >= start && end <= range.end) return true;
    violation(range.host ? "a copy reaches beyond one registration" : "a copy reaches beyond one allocation");
    return false;
  }
  if (host) ++counts["pageable"];
  return true;
}

bool Machine::registered(std::uintptr_t address) const {
  return std::any_of(ranges.begin(), ranges.end(), [&](const auto& entry) {
    return entry.second.host && address >= entry.first && address < entry.second.end;
  });
}

int Machine::enqueue_copy(Handle stream, std::vector<Part> parts, bool host_to, bool host_from) {
  const std::int64_t left = option("fail_copy");
  if (left > 0) set("fail_copy", left - 1);
  if (left == 1) return kIllegalAddress;
  std::vector<Part> sorted = parts;
  std::sort(sorted.begin(), sorted.end(), [](const Part& a, const Part& b) { return a.to < b.to; });
  for (std::size_t i = 1; i < sorted.size(); ++i) {
    if (sorted[i - 1].to + sorted[i - 1].bytes > sorted[i].to) violation("copies of one batch overlap");
  }
  for (const Part& part : parts) {
    if (part.bytes == 0 || part.to == 0 || part.from == 0) return kInvalidValue;
    if (!within_ranges(part.to, part.bytes, host_to) || !within_ranges(part.from, part.bytes, host_from)) {
      return kInvalidValue;
    }
  }
  Operation operation;
  operation.kind = Operation::kMove;
  operation.by_copy_engine = true;
  operation.parts = std::move(parts);
  return enqueue(stream, std::move(operation));
}

void Machine::start(Operation& operation) {
  operation.started = true;
  for (const Part& part : operation.parts) {
    const std::size_t most = std::max<std::size_t>(64, (part.bytes + 3) / 4);
    for (std::size_t at = 0; at < part.bytes; at += most) {
      operation.pieces.push_back({part.to + at, part.from + at, std::min(most, part.bytes - at)});
    }
    if (operation.by_copy_engine && option("poison") != 0) {
      std::memset(reinterpret_cast<void*>(part.to), 0xEE, part.bytes);
    }
  }
  std::shuffle(operation.pieces.begin(), operation.pieces.end(), random);
}

void Machine::run_piece(Operation& operation) {
  const Part piece = operation.pieces.back();
  operation.pieces.pop_back();
  void* to = reinterpret_cast<void*>(piece.to);
  const void* from = reinterpret_cast<const void*>(piece.from);
  if (operation.kind == Operation::kMove) {
    std::memmove(to, from, piece.bytes);
  } else if (operation.kind == Operation::kFill) {
    std::memset(to, operation.byte, piece.bytes);
  } else {
    const std::size_t at = piece.from - operation.parts[0].from;
    if (std::memcmp(operation.expected.data() + at, from, piece.bytes) != 0) {
      std::size_t i = 0;
      while (operation.expected[at + i] == static_cast<const unsigned char*>(from)[i]) ++i;
      violation("a kernel read byte " + std::to_string(static_cast<const unsigned char*>(from)[i]) + ", not " +
                std::to_string(operation.expected[at + i]) + ", at offset " + std::to_string(at + i));
    }
  }
}

bool Machine::step() {
  std::vector<Stream*> ready;
  for (auto& [handle, stream] : streams) {
    if (stream.queue.empty() || stream.held) continue;
    const Operation& head = stream.queue.front();
    if (head.kind != Operation::kWait || head.mark->done) ready.push_back(&stream);
  }
  if (ready.empty()) return false;
  Stream& stream = *ready[random() % ready.size()];
  Operation& head = stream.queue.front();
  if (head.kind == Operation::kMark) head.mark->done = true;
  if (!head.started) {
    start(head);
  } else if (!head.pieces.empty()) {
    run_piece(head);
  }
  if (head.pieces.empty()) stream.queue.pop_front();
  changed.notify_all();
  return true;
}

int Machine::finish(std::unique_lock<std::mutex>& hold, const MarkRef& mark) {
  while (!mark->done) {
    if (step()) continue;
    const bool held = std::any_of(streams.begin(), streams.end(), [](const auto& entry) { return entry.second.held; });
    if (!held || changed.wait_for(hold, std::chrono::seconds(20)) == std::cv_status::timeout) {
      violation("the host waits for work that cannot run");
      return kUnknown;
    }
  }
  return kSuccess;
}

int Machine::finish_stream(std::unique_lock<std::mutex>& hold, Handle stream) {
  Operation operation;
  operation.mark = std::make_shared<Mark>();
  const MarkRef mark = operation.mark;
  const int result = enqueue(stream, std::move(operation));
  return result == kSuccess ? finish(hold, mark) : result;
}

std::int64_t Machine::touching(std::uintptr_t begin, std::uintptr_t end, bool copies_only) const {
  std::int64_t found = 0;
  for (const auto& [handle, stream] : streams) {
    for (const Operation& operation : stream.queue) {
      if ((operation.by_copy_engine || !copies_only) && operation.touches(begin, end)) ++found;
    }
  }
  return found;
}

}  // namespace fake
