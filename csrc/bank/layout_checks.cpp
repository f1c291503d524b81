#include "bank/layout_checks.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace longlive::bank {
namespace {

[[noreturn]] void refuse(const std::string& name, std::int64_t got, const std::string& allowed) {
  throw std::invalid_argument(name + " must be " + allowed + ", got " + std::to_string(got));
}

}  // namespace

void check_layout(const PageLayout& layout) {
  if (layout.layers < 1) refuse("layers", layout.layers, ">= 1");
  if (layout.samples < 1) refuse("samples", layout.samples, ">= 1");
  if (layout.page_bytes < 1 || layout.page_bytes % kAlignment != 0) {
    refuse("page_bytes", layout.page_bytes, "a positive multiple of " + std::to_string(kAlignment));
  }
  std::int64_t bytes = 0;
  if (__builtin_mul_overflow(layout.layers, layout.samples, &bytes) ||
      __builtin_mul_overflow(bytes, layout.page_bytes, &bytes)) {
    throw std::invalid_argument("layers * samples * page_bytes must fit into 63 bits");
  }
  if (layout.segments.empty()) throw std::invalid_argument("segments must have at least one entry, got none");
  std::int64_t end = 0;
  for (std::size_t i = 0; i < layout.segments.size(); ++i) {
    const Segment& segment = layout.segments[i];
    const std::string name = "segments[" + std::to_string(i) + "]";
    if (segment.bytes < 1) refuse(name + ".bytes", segment.bytes, ">= 1");
    if (segment.offset < end) refuse(name + ".offset", segment.offset, ">= " + std::to_string(end));
    if (segment.bytes > layout.page_bytes || segment.offset > layout.page_bytes - segment.bytes) {
      refuse(name + "'s end", segment.offset + segment.bytes, "<= page_bytes = " + std::to_string(layout.page_bytes));
    }
    end = segment.offset + segment.bytes;
  }
}

void check_slots(const PageLayout& layout, const SlotGeometry& slots) {
  if (slots.count < 0) refuse("slot_count", slots.count, ">= 0");
  if (slots.first < 0) refuse("first_slot", slots.first, ">= 0");
  if (slots.count == 0) return;
  if (slots.parts.size() != layout.segments.size()) {
    refuse("slots", static_cast<std::int64_t>(slots.parts.size()),
           "one entry for each of the " + std::to_string(layout.segments.size()) + " segments");
  }
}

void check_options(const BankOptions& options) {
  check_layout(options.layout);
  check_slots(options.layout, options.slots);
  if (options.commit_records < 1) refuse("commit_records", options.commit_records, ">= 1");
  if (options.bounce_records < 0) refuse("bounce_records", options.bounce_records, ">= 0");
  if (options.disk.limit_bytes < 0) refuse("disk_bytes", options.disk.limit_bytes, ">= 0");
  const bool disk = options.disk.limit_bytes > 0;
  const std::int64_t record = options.layout.record_bytes();
  const std::int64_t held = options.host.limit_bytes / record;
  if (held < options.commit_records || (disk && held - options.commit_records < options.bounce_records)) {
    const std::string bounce = disk ? " and " + std::to_string(options.bounce_records) + " on their way from disk" : "";
    refuse("host_bytes", options.host.limit_bytes,
           "enough for the " + std::to_string(options.commit_records) + " frame(s) of a commit" + bounce + ", " +
               std::to_string(record) + " bytes each");
  }
  if (disk && options.disk.limit_bytes < record) {
    refuse("disk_bytes", options.disk.limit_bytes, "0, or at least one frame of " + std::to_string(record) + " bytes");
  }
}

void zero_gaps(const PageLayout& layout, std::byte* record, std::int64_t first, std::int64_t count) {
  for (std::int64_t page = first; page < first + count; ++page) {
    std::byte* begin = record + page * layout.page_bytes;
    std::int64_t end = 0;
    for (const Segment& segment : layout.segments) {
      std::memset(begin + end, 0, static_cast<std::size_t>(segment.offset - end));
      end = segment.offset + segment.bytes;
    }
    std::memset(begin + end, 0, static_cast<std::size_t>(layout.page_bytes - end));
  }
}

}  // namespace longlive::bank
