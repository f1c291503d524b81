// Tests of how a bank ends: closed while jobs are under way, and in a process that was forked from its own.
#include <signal.h>
#include <sys/wait.h>

#include <chrono>
#include <thread>

#include "tests/bank_case.h"

namespace {

// Holds up the place of a shard.
struct SlowSpace : Faults {
  bool gate_space = true;  // by `mutex`
  int allocate(int fd, off_t offset, off_t bytes) override {
    pass(gate_space);
    return Faults::allocate(fd, offset, bytes);
  }
  void open_space() {
    const std::lock_guard lock(mutex);
    gate_space = false;
    changed.notify_all();
  }
};

}  // namespace

// A spill that has found its place submits the jobs that write, though the bank is being closed.
TEST_CASE(closed_while_a_spill_finds_its_place) {
  Rig rig(0, 4, 4, 0, 4);
  rig.options.layout.page_bytes = std::int64_t{2} << 20;  // a job a page
  const std::int64_t record = rig.options.layout.record_bytes();
  rig.options.host.limit_bytes = rig.options.disk.limit_bytes = 4 * record;
  rig.options.host.slab_bytes = rig.options.disk.shard_bytes = record;
  const auto space = std::make_shared<SlowSpace>();
  rig.options.disk.ops = space;
  rig.open();
  rig.commit({0});
  rig.commit({1});  // fewer than four records can be had now
  space->await(1);
  std::thread closing([&] { rig.bank->close(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // until it waits for the jobs
  space->open_space();
  closing.join();
  CHECK(rig.bank->closed());
}
