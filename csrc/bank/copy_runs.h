// Copies as few runs: the driver does not merge descriptors, and each costs it time.
#pragma once

#include <cstdint>
#include <vector>

#include "bank/device.h"

namespace longlive::bank {

// The same bytes moved by fewer copies: what is contiguous on both sides in neighbouring entries becomes one, empty copies
// go. `cuts` are host addresses, ascending, that no joined copy may span (the ends of registrations); `host_is_from` says
// which side of the copies is host memory.
std::vector<Copy> join_copies(const std::vector<Copy>& copies, const std::vector<std::uintptr_t>& cuts, bool host_is_from);

}  // namespace longlive::bank
