// Copies as few runs: the driver does not merge descriptors, and each costs it time.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "bank/device.h"

namespace longlive::bank {

// Whether one copy may reach across `address` on one of its sides: the byte before and the byte at it.
using MayJoin = std::function<bool(std::uintptr_t address)>;

// The same bytes moved by fewer copies, in the same order: neighbours that are contiguous on both sides become one
// where `to_may_join` and `from_may_join` (null: always) allow it. Empty copies go.
std::vector<Copy> join_copies(const std::vector<Copy>& copies, const MayJoin& to_may_join,
                              const MayJoin& from_may_join);

// The same bytes moved by copies none of which reaches across one of `cuts` (ascending addresses) on the side that
// `member` names.
std::vector<Copy> split_copies(const std::vector<Copy>& copies, const std::vector<std::uintptr_t>& cuts,
                               std::uintptr_t Copy::*member);

}  // namespace longlive::bank
