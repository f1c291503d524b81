// Bytes of a page, of a frame's record, and where pages lie in memory that is not the bank's.
#pragma once

#include <cstdint>
#include <vector>

namespace longlive::bank {

using Frame = std::int64_t;
using Slot = std::int32_t;

// Stored pages begin and end at multiples of this: what direct I/O asks for, and the size of a memory page.
inline constexpr std::int64_t kAlignment = 4096;

// A run of bytes that one copy moves: the keys, or the values, of a page; or all of a quantised page.
struct Segment {
  std::int64_t offset = 0;  // in the stored page
  std::int64_t bytes = 0;
};

// Page: one frame in one layer of one sample. Record: all pages of a frame, [layer][sample], without gaps.
struct PageLayout {
  std::int64_t layers = 0;
  std::int64_t samples = 0;
  std::int64_t page_bytes = 0;    // a multiple of kAlignment; what segments do not cover is zero
  std::vector<Segment> segments;  // in ascending order, without overlap

  std::int64_t pages() const { return layers * samples; }
  std::int64_t record_bytes() const { return pages() * page_bytes; }
  std::int64_t page_offset(std::int64_t layer, std::int64_t sample) const {
    return (layer * samples + sample) * page_bytes;
  }
};

// Where segment s of a frame's page (layer, sample) lies:
//   parts[s].base + layer * layer_stride + sample * sample_stride, strides in bytes.
// One part a segment of the layout.
struct PageSource {
  struct Part {
    std::uintptr_t base = 0;
    std::int64_t layer_stride = 0;
    std::int64_t sample_stride = 0;
  };
  std::vector<Part> parts;
};

// Device slots first .. first + count - 1 of a tensor: as PageSource, plus slot * slot_stride (slot counted from 0 of
// the tensor, not from first).
struct SlotGeometry {
  struct Part {
    std::uintptr_t base = 0;
    std::int64_t layer_stride = 0;
    std::int64_t sample_stride = 0;
    std::int64_t slot_stride = 0;
  };
  std::vector<Part> parts;
  Slot first = 0;
  Slot count = 0;
};

}  // namespace longlive::bank
