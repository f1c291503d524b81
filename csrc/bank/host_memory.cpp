#include "bank/host_memory.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <limits>

namespace longlive::bank {
namespace {

constexpr std::int64_t kNoLimit = std::numeric_limits<std::int64_t>::max();

// The number after `key` in a file of lines "key number"; with no key, the file's only number. -1: none, or "max".
std::int64_t number_in(const std::string& path, const std::string& key = "") {
  std::ifstream file(path);
  std::string word;
  while (file >> word) {
    if (!key.empty()) {
      const bool found = word == key;
      if (!(file >> word)) break;
      if (!found) {
        file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
        continue;
      }
    }
    char* end = nullptr;
    const long long value = std::strtoll(word.c_str(), &end, 10);
    return end != word.c_str() && *end == '\0' && value >= 0 ? value : -1;
  }
  return -1;
}

struct GroupFiles {
  const char *limit, *use, *inactive;
};
constexpr GroupFiles kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};
constexpr GroupFiles kVersion2 = {"memory.max", "memory.current", "inactive_file"};
constexpr GroupFiles kVersion2Throttled = {"memory.high", "memory.current", "inactive_file"};

void bound_by(HostMemory& memory, const std::string& folder, const GroupFiles& files) {
  const std::int64_t limit = number_in(folder + "/" + files.limit), use = number_in(folder + "/" + files.use);
  if (limit < 0 || use < 0) return;
  // A file cache that nobody touched lately counts as use, and is given up before anything is refused.
  const std::int64_t inactive = std::max<std::int64_t>(0, number_in(folder + "/memory.stat", files.inactive));
  const std::int64_t left = std::max<std::int64_t>(0, limit - std::max<std::int64_t>(0, use - inactive));
  if (left < memory.available) {
    memory.available = left;
    memory.bound = folder + "/" + files.limit;
  }
  memory.free = std::min(memory.free, std::max<std::int64_t>(0, limit - use));
}

// The group and all above it. In a container the group's path may be the host's, which is not mounted: then the walk
// ends at the mounted root, which is the container's own group.
void bound_by_groups(HostMemory& memory, const std::string& mount, std::string group, bool version2) {
  for (;;) {
    while (!group.empty() && group.back() == '/') group.pop_back();
    if (version2) {
      bound_by(memory, mount + group, kVersion2);
      bound_by(memory, mount + group, kVersion2Throttled);
    } else {
      bound_by(memory, mount + group, kVersion1);
    }
    if (group.empty()) return;
    group.resize(group.find_last_of('/') == std::string::npos ? 0 : group.find_last_of('/'));
  }
}

}  // namespace

HostMemory host_memory(const std::string& root) {
  HostMemory memory;
  const std::int64_t available = number_in(root + "/proc/meminfo", "MemAvailable:");
  const std::int64_t free = number_in(root + "/proc/meminfo", "MemFree:");
  memory.available = available < 0 ? kNoLimit : available * 1024;
  memory.free = free < 0 ? kNoLimit : free * 1024;
  memory.bound = available < 0 ? "" : "MemAvailable";

  // lines "number:controllers:group"; version 2 has number 0 and no controllers
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string group = line.substr(second + 1);
    if (controllers == ",,") {
      bound_by_groups(memory, root + "/sys/fs/cgroup", group, true);
    } else if (controllers.find(",memory,") != std::string::npos) {
      bound_by_groups(memory, root + "/sys/fs/cgroup/memory", group, false);
    }
  }
  return memory;
}

}  // namespace longlive::bank
