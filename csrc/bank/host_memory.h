// How much memory the system still gives this process: of the machine, and of the control groups it runs in.
#pragma once

#include <cstdint>
#include <string>

namespace longlive::bank {

struct HostMemory {
  std::int64_t available = 0;  // bytes that can be taken without swapping or a kill; INT64_MAX when nobody says
  std::int64_t free = 0;       // bytes that nobody uses, not even as a cache; INT64_MAX when nobody says
  std::string bound;           // what bounds `available`: "MemAvailable" or a control group's file
};

// `root` goes before the paths of the system's files (for tests). Reads MemAvailable and MemFree, and limit and use of
// the process's memory control groups (versions 1 and 2) up to the root. Files that are missing bound nothing.
HostMemory host_memory(const std::string& root = "");

}  // namespace longlive::bank
