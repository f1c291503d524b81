#include "bank/copy_runs.h"

#include <algorithm>

namespace longlive::bank {

std::vector<Copy> join_copies(const std::vector<Copy>& copies, const MayJoin& to_may_join,
                              const MayJoin& from_may_join) {
  std::vector<Copy> joined;
  joined.reserve(copies.size());
  for (const Copy& copy : copies) {
    if (copy.bytes <= 0) continue;
    if (!joined.empty()) {
      Copy& last = joined.back();
      const auto length = static_cast<std::uintptr_t>(last.bytes);
      if (last.to + length == copy.to && last.from + length == copy.from && (!to_may_join || to_may_join(copy.to)) &&
          (!from_may_join || from_may_join(copy.from))) {
        last.bytes += copy.bytes;
        continue;
      }
    }
    joined.push_back(copy);
  }
  return joined;
}

std::vector<Copy> split_copies(const std::vector<Copy>& copies, const std::vector<std::uintptr_t>& cuts,
                               std::uintptr_t Copy::*member) {
  std::vector<Copy> pieces;
  pieces.reserve(copies.size());
  for (Copy rest : copies) {
    auto cut = std::upper_bound(cuts.begin(), cuts.end(), rest.*member);
    for (; cut != cuts.end() && *cut - rest.*member < static_cast<std::uintptr_t>(rest.bytes); ++cut) {
      const std::uintptr_t length = *cut - rest.*member;
      pieces.push_back({rest.to, rest.from, static_cast<std::int64_t>(length)});
      rest.to += length;
      rest.from += length;
      rest.bytes -= static_cast<std::int64_t>(length);
    }
    pieces.push_back(rest);
  }
  return pieces;
}

}  // namespace longlive::bank
