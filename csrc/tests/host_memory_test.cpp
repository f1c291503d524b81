// Tests of how much memory the system is said to have, on files made for it.
#include "bank/host_memory.h"

#include "tests/test_case.h"

#include <stdlib.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>

using longlive::bank::host_memory;
using longlive::bank::HostMemory;

namespace {

constexpr std::int64_t kNoLimit = std::numeric_limits<std::int64_t>::max();

// A folder that takes the place of the system's root.
class Root {
 public:
  Root() {
    std::string name = (std::filesystem::temp_directory_path() / "longlive-memory-XXXXXX").string();
    CHECK(mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~Root() { std::filesystem::remove_all(path_); }
  void write(const std::string& name, const std::string& text) const {
    const std::filesystem::path file = path_ + name;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  HostMemory read() const { return host_memory(path_); }

 private:
  std::string path_;
};

const char* const kMeminfo =
    "MemTotal:       1000 kB\nMemFree:         300 kB\nMemAvailable:    800 kB\nHugePages_Total:  0\n";

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

TEST_CASE(of_this_machine) {
  const HostMemory memory = host_memory();
  CHECK(memory.available > 0 && memory.available < kNoLimit && !memory.bound.empty());
  CHECK(memory.free >= 0);
}

TEST_CASE(nobody_says) {
  const HostMemory memory = Root().read();
  CHECK(memory.available == kNoLimit && memory.free == kNoLimit && memory.bound.empty());
}

TEST_CASE(of_the_machine) {
  const Root root;
  root.write("/proc/meminfo", kMeminfo);
  const HostMemory memory = root.read();
  CHECK(memory.available == 800 * 1024 && memory.free == 300 * 1024 && memory.bound == "MemAvailable");
}

TEST_CASE(the_tightest_group_counts) {
  const Root root;
  root.write("/proc/meminfo", kMeminfo);
  root.write("/proc/self/cgroup", "0::/a/b\n");
  root.write("/sys/fs/cgroup/a/b/memory.max", "max\n");
  root.write("/sys/fs/cgroup/a/b/memory.current", "1000\n");
  CHECK(root.read().bound == "MemAvailable");
  // the parent's limit, with the cache that can be given up not counted as use
  root.write("/sys/fs/cgroup/a/memory.max", "500000\n");
  root.write("/sys/fs/cgroup/a/memory.current", "400000\n");
  root.write("/sys/fs/cgroup/a/memory.stat", "anon 300000\nfile 100000\ninactive_file 60000\nactive_file 40000\n");
  HostMemory memory = root.read();
  CHECK(memory.available == 160000 && memory.free == 100000 && ends_with(memory.bound, "/a/memory.max"));
  // where the group is slowed down comes before where it is killed
  root.write("/sys/fs/cgroup/a/memory.high", "450000\n");
  memory = root.read();
  CHECK(memory.available == 110000 && ends_with(memory.bound, "/a/memory.high"));
  // more in use than allowed, for instance because the limit was lowered
  root.write("/sys/fs/cgroup/a/b/memory.max", "10\n");
  CHECK(root.read().available == 0);
}

TEST_CASE(groups_of_version_1) {
  const Root root;
  root.write("/proc/meminfo", kMeminfo);
  root.write("/proc/self/cgroup", "9:name=systemd:/\n5:cpu,memory:/jobs/1\n0::/\n");
  root.write("/sys/fs/cgroup/memory/jobs/1/memory.limit_in_bytes", "9223372036854771712\n");
  root.write("/sys/fs/cgroup/memory/jobs/1/memory.usage_in_bytes", "4096\n");
  CHECK(root.read().bound == "MemAvailable");
  root.write("/sys/fs/cgroup/memory/jobs/memory.limit_in_bytes", "10000\n");
  root.write("/sys/fs/cgroup/memory/jobs/memory.usage_in_bytes", "4096\n");
  root.write("/sys/fs/cgroup/memory/jobs/memory.stat", "inactive_file 1\ntotal_inactive_file 96\n");
  const HostMemory memory = root.read();
  CHECK(memory.available == 6000 && ends_with(memory.bound, "/memory/jobs/memory.limit_in_bytes"));
}

// A container sees the host's path of its group, and its own group mounted as the root.
TEST_CASE(a_group_whose_path_is_not_mounted) {
  const Root root;
  root.write("/proc/self/cgroup", "0::/docker/123\n");
  root.write("/sys/fs/cgroup/memory.max", "70000\n");
  root.write("/sys/fs/cgroup/memory.current", "20000\n");
  CHECK(root.read().available == 50000);
}

TEST_CASE(files_that_make_no_sense_bound_nothing) {
  const Root root;
  root.write("/proc/meminfo", "MemAvailable: lots\nMemFree");
  root.write("/proc/self/cgroup", "nonsense\n0:\n0::relative\n");
  root.write("/sys/fs/cgroup/memory.max", "12x\n");
  root.write("/sys/fs/cgroup/memory.current", "\n");
  CHECK(root.read().available == kNoLimit);
}
