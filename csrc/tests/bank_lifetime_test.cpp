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

// Copies at once, and counts the points that somebody still has.
class CountingDevice final : public Device {
 public:
  explicit CountingDevice(std::shared_ptr<std::atomic<int>> points) : points_(std::move(points)) {}
  EventRef record(Stream) override { return std::make_shared<Point>(points_); }
  void wait(Stream, const EventRef&) override {}
  EventRef copy(Direction, const std::vector<Copy>& copies, const std::vector<EventRef>&) override {
    copy_on(0, copies);
    return record(0);
  }
  void copy_on(Stream, const std::vector<Copy>& copies) override {
    for (const Copy& copy : copies) {
      std::memmove(reinterpret_cast<void*>(copy.to), reinterpret_cast<const void*>(copy.from),
                   static_cast<std::size_t>(copy.bytes));
    }
  }
  bool done(const EventRef&) override { return true; }
  void synchronize(const EventRef&) override {}
  bool capturing(Stream) override { return false; }
  bool lock(void*, std::size_t, std::string*) override { return false; }
  void unlock(void*) noexcept override {}
  DeviceStats stats() const override { return {}; }

 private:
  struct Point final : Event {
    explicit Point(std::shared_ptr<std::atomic<int>> the_points) : points(std::move(the_points)) { ++*points; }
    ~Point() override { --*points; }
    std::shared_ptr<std::atomic<int>> points;
  };
  std::shared_ptr<std::atomic<int>> points_;
};

}  // namespace

// A data loader's worker, say, gets a copy of the bank without its threads.
TEST_CASE(a_forked_process_leaves_the_bank_alone) {
  Rig rig(2, 4, 4);
  rig.open();
  rig.commit({0, 1});
  rig.bank->prefetch({1}, 0);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    alarm(20);
    CHECK(rig.bank->closed());
    CHECK_THROWS(std::runtime_error, "forked", rig.bank->room());
    CHECK_THROWS(std::runtime_error, "forked", rig.has(0));
    rig.bank->close();
    rig.bank.reset();
    _exit(0);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(rig.bank->settle().empty() && rig.has(0) && rig.in_slot(1));
}

// A driver has no million events to spare: frames that nobody asks for hold none.
TEST_CASE(frames_at_rest_hold_no_points) {
  const auto points = std::make_shared<std::atomic<int>>(0);
  Rig rig(2, 200, 0);
  rig.open(std::make_unique<CountingDevice>(points));
  for (Frame frame = 0; frame < 200; ++frame) {
    rig.commit({frame});
    rig.bank->prefetch({frame}, 0);
    CHECK(rig.bank->settle().empty());
    for (std::int64_t layer = 0; layer < kLayers; ++layer) rig.bank->wait(layer, 0);
    rig.bank->release({frame}, 0);
    CHECK(*points <= 40);
  }
  for (Frame frame = 0; frame < 200; ++frame) CHECK(rig.has(frame));
  rig.bank->close();
  CHECK(*points == 0);
}

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
