#include "bank/copy_runs.h"

#include <algorithm>

namespace longlive::bank {

std::vector<Copy> join_copies(const std::vector<Copy>& copies, const std::vector<std::uintptr_t>& cuts, bool host_is_from) {
  std::vector<Copy> joined;
  joined.reserve(copies.size());
  for (const Copy& copy : copies) {
    if (copy.bytes <= 0) continue;
    if (!joined.empty()) {
      Copy& last = joined.back();
      const auto length = static_cast<std::uintptr_t>(last.bytes);
      const std::uintptr_t seam = host_is_from ? copy.from : copy.to;
      if (last.to + length == copy.to && last.from + length == copy.from &&
          !std::binary_search(cuts.begin(), cuts.end(), seam)) {
        last.bytes += copy.bytes;
        continue;
      }
    }
    joined.push_back(copy);
  }
  return joined;
}

}  // namespace longlive::bank
