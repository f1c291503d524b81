// Whether sizes fit together.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bank/bank.h"

namespace longlive::bank {

// Throw std::invalid_argument that names the field, what it is and what is allowed.
void check_layout(const PageLayout& layout);
void check_slots(const PageLayout& layout, const SlotGeometry& slots);
void check_options(const BankOptions& options);

// Zeroes what no segment covers in `count` pages from page `first` of a record on.
void zero_gaps(const PageLayout& layout, std::byte* record, std::int64_t first, std::int64_t count);

}  // namespace longlive::bank
