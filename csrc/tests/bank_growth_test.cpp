// Tests of how a bank's host memory grows: ahead of need, in the background, and out of everybody's way.
#include <chrono>
#include <future>
#include <thread>

#include "tests/bank_case.h"

namespace {

constexpr auto kLong = std::chrono::seconds(10);

// Says what the system's memory is, one question after another as `let` allows them.
class Gate {
 public:
  HostMemory pass() {
    std::unique_lock lock(mutex_);
    ++asked_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return allowed_ > 0; });
    --allowed_;
    if (broken_) throw std::runtime_error("no answer");
    HostMemory memory;
    memory.available = memory.free = left_;
    memory.bound = "the test";
    return memory;
  }
  void let(int count) {
    const std::lock_guard lock(mutex_);
    allowed_ += count;
    changed_.notify_all();
  }
  void await(int asked) {
    std::unique_lock lock(mutex_);
    CHECK(changed_.wait_for(lock, kLong, [&] { return asked_ >= asked; }));
  }
  int asked() {
    const std::lock_guard lock(mutex_);
    return asked_;
  }
  void leave(std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    left_ = bytes;
  }
  void broken(bool yes) {
    const std::lock_guard lock(mutex_);
    broken_ = yes;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int asked_ = 0, allowed_ = 0;
  bool broken_ = false;
  std::int64_t left_ = std::int64_t{1} << 40;
};

struct Growing : Rig {
  Gate gate;
  Growing(std::int64_t host, std::int64_t disk, std::int64_t commit_records = 2)
      : Rig(2, host, disk, 2, commit_records) {
    options.host.memory = [this] { return gate.pass(); };
    open();
  }
  ~Growing() {
    gate.let(1000);
    bank.reset();
  }
  void await_bytes(std::int64_t records) const {
    for (int i = 0; bank->stats().host.reserved_bytes != records * kRecord; ++i) {
      CHECK(i < 5000);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
};

}  // namespace

TEST_CASE(other_calls_go_on_while_a_slab_is_made) {
  Growing rig(8, 0);
  auto commit = std::async(std::launch::async, [&] { rig.commit({0, 1}); });
  rig.gate.await(1);
  auto others = std::async(std::launch::async, [&] {
    for (std::int64_t layer = 0; layer < kLayers; ++layer) rig.bank->wait(layer, 0);
    CHECK(rig.bank->where(0).generation == -1 && rig.bank->stats().host.reserved_bytes == 0);
    CHECK(rig.bank->settle().empty());
  });
  const bool free = others.wait_for(kLong) == std::future_status::ready;
  rig.gate.let(1);
  commit.get();
  CHECK(free);
  CHECK(rig.has(0) && rig.has(1));
}

TEST_CASE(the_next_slab_is_made_ahead) {
  Growing rig(8, 0);
  CHECK(rig.gate.asked() == 0 && rig.bank->stats().host.reserved_bytes == 0);  // nothing ahead of the first frame
  rig.gate.let(2);
  rig.commit({0, 1});
  rig.await_bytes(4);
  CHECK(rig.gate.asked() == 2);
  rig.commit({2, 3});  // needs no slab
  CHECK(rig.has(3));
  rig.gate.let(100);
  rig.commit({4, 5});
  rig.commit({6, 7});
  rig.await_bytes(8);
  CHECK(rig.gate.asked() == 4 && rig.bank->room() == 0);
  CHECK_THROWS(BankFull, "room for 0", rig.commit({8}));
  CHECK(rig.gate.asked() == 4);
}

// As many as a commit and a fetch take.
TEST_CASE(slabs_are_made_ahead_until_there_are_enough) {
  Growing rig(20, 4, 7);
  rig.gate.let(100);
  rig.commit({0});
  rig.await_bytes(10);
  CHECK(rig.gate.asked() == 5);
}

// Room is lost only when memory is refused that somebody needs; nor is the system asked again before that.
TEST_CASE(memory_that_is_refused_ahead_may_be_there_when_it_is_needed) {
  Growing rig(8, 0);
  rig.gate.let(1);
  rig.commit({0, 1});
  rig.gate.await(2);
  rig.gate.leave(0);
  rig.gate.let(1);
  for (int i = 0; i < 50; ++i) {
    rig.bank->wait(0, 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK(rig.gate.asked() == 2 && rig.bank->room() == 6 && rig.bank->stats().host.refusal.empty());
  rig.gate.leave(std::int64_t{1} << 40);
  rig.gate.let(2);
  rig.commit({3});
  rig.await_bytes(6);
  rig.commit({4, 5});
  rig.gate.leave(0);
  rig.gate.let(1);
  rig.commit({6});
  rig.gate.let(1);
  CHECK_THROWS(BankFull, "room for 0", rig.commit({7, 8}));
  CHECK(rig.bank->stats().host.refusal.find("the test leaves 0") != std::string::npos);
  CHECK_THROWS(BankFull, "room for 0", rig.commit({2}));
  CHECK(rig.has(0) && rig.has(1) && rig.has(6));
}

// What breaks is told to the caller who waits for it, and is tried again.
TEST_CASE(growth_that_breaks) {
  Growing rig(8, 0);
  rig.gate.broken(true);
  rig.gate.let(1);
  CHECK_THROWS(std::runtime_error, "no answer", rig.commit({0}));
  CHECK(rig.bank->frames().empty() && rig.bank->room() == 8);
  rig.gate.broken(false);
  rig.gate.let(1);
  rig.commit({0});
  rig.gate.await(3);
  rig.gate.broken(true);  // ahead: nobody waits
  rig.gate.let(1);
  rig.commit({1});
  CHECK(rig.has(0) && rig.has(1));
  rig.gate.broken(false);
  rig.gate.let(100);
  rig.commit({2, 3});
  CHECK(rig.has(3) && rig.bank->room() == 4);
}

TEST_CASE(closed_while_a_slab_is_made) {
  Growing rig(8, 0);
  rig.gate.let(1);
  rig.commit({0, 1});
  rig.gate.await(2);
  std::thread closing([&] { rig.bank->close(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  rig.gate.let(1);
  closing.join();
  CHECK(rig.bank->closed());
}

TEST_CASE(closed_under_a_commit_that_waits_for_a_slab) {
  Growing rig(8, 0);
  auto commit = std::async(std::launch::async, [&] { CHECK_THROWS(std::runtime_error, "closed", rig.commit({0})); });
  rig.gate.await(1);
  std::thread closing([&] { rig.bank->close(); });
  commit.get();  // does not wait for the slab
  rig.gate.let(1);
  closing.join();
}
