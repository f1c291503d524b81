// Tests of the threads that carry out disk jobs.
#include "bank/io_pool.h"

#include "tests/test_case.h"

#include <atomic>
#include <condition_variable>
#include <csignal>
#include <future>
#include <mutex>
#include <stdexcept>
#include <thread>

using longlive::bank::IoPool;
using Kind = IoPool::Kind;

namespace {

// Jobs wait in it until it is opened.
class Gate {
 public:
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void pass() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

}  // namespace

TEST_CASE(numbers_of_threads) {
  CHECK_THROWS(std::invalid_argument, "io_threads = 0, allowed: 1 .. 64", IoPool(0));
  CHECK_THROWS(std::invalid_argument, "io_threads = -1", IoPool(-1));
  CHECK_THROWS(std::invalid_argument, "io_threads = 65", IoPool(65));
  IoPool one(1);
  IoPool many(64);
}

TEST_CASE(reads_go_before_writes_each_in_order) {
  Gate gate;
  std::promise<void> started;
  std::vector<int> order;  // of one thread
  {
    IoPool pool(1);
    pool.submit(Kind::kWrite, [&] {
      started.set_value();
      gate.pass();
    });
    started.get_future().wait();
    for (int i = 0; i < 5; ++i) {
      pool.submit(Kind::kWrite, [&, i] { order.push_back(100 + i); });
      pool.submit(Kind::kRead, [&, i] {
        order.push_back(i);
        // a read that is submitted while writes wait overtakes them
        if (i == 4) pool.submit(Kind::kRead, [&] { order.push_back(5); });
      });
    }
    gate.open();
  }
  CHECK((order == std::vector<int>{0, 1, 2, 3, 4, 5, 100, 101, 102, 103, 104}));
}

TEST_CASE(destruction_carries_out_what_is_queued) {
  std::atomic<int> ran{0};
  {
    IoPool pool(3);
    for (int i = 0; i < 1000; ++i) pool.submit(i % 2 == 0 ? Kind::kRead : Kind::kWrite, [&] { ++ran; });
  }
  CHECK(ran == 1000);
}

TEST_CASE(destruction_carries_out_what_jobs_submit) {
  for (int threads = 1; threads <= 4; ++threads) {
    std::atomic<int> ran{0};
    IoPool* open = nullptr;
    const std::function<void(int)> tree = [&](int depth) {
      ++ran;
      if (depth == 0) return;
      open->submit(Kind::kWrite, [&, depth] { tree(depth - 1); });
      open->submit(Kind::kRead, [&, depth] { tree(depth - 1); });
    };
    {
      IoPool pool(threads);
      open = &pool;
      pool.submit(Kind::kRead, [&] { tree(8); });
    }
    CHECK(ran == 511);
  }
}

// The pool is being destroyed when the only job makes others: they still run, and on all threads, since each of them
// returns only when all are there.
TEST_CASE(a_job_submits_while_the_pool_is_destroyed) {
  Gate gate, all_there;
  std::atomic<int> ran{0};
  std::thread opener;
  {
    IoPool pool(4);
    pool.submit(Kind::kWrite, [&] {
      gate.pass();
      for (int i = 0; i < 4; ++i) {
        pool.submit(Kind::kWrite, [&] {
          if (++ran == 4) all_there.open();
          all_there.pass();
        });
      }
    });
    opener = std::thread([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      gate.open();
    });
  }
  opener.join();
  CHECK(ran == 4);
}

TEST_CASE(as_many_jobs_at_once_as_threads) {
  constexpr int kThreads = 8;
  std::mutex mutex;
  std::condition_variable changed;
  int inside = 0;
  {
    IoPool pool(kThreads);
    for (int i = 0; i < kThreads; ++i) {
      pool.submit(i % 2 == 0 ? Kind::kRead : Kind::kWrite, [&] {
        std::unique_lock lock(mutex);
        ++inside;
        changed.notify_all();
        // returns only when all of them are here at the same time
        changed.wait(lock, [&] { return inside == kThreads; });
      });
    }
  }
  CHECK(inside == kThreads);
}

TEST_CASE(what_a_job_holds_is_given_back_when_it_is_done) {
  auto held = std::make_shared<int>(1);
  const std::weak_ptr<int> watched = held;
  IoPool pool(1);
  pool.submit(Kind::kRead, [held = std::move(held)] {});
  std::promise<bool> gone;
  pool.submit(Kind::kRead, [&] { gone.set_value(watched.expired()); });
  CHECK(gone.get_future().get());
}

TEST_CASE(signals_are_for_other_threads) {
  sigset_t before, after;
  pthread_sigmask(SIG_SETMASK, nullptr, &before);
  std::promise<bool> blocked;
  IoPool pool(1);
  pool.submit(Kind::kRead, [&] {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    blocked.set_value(sigismember(&mask, SIGINT) == 1 && sigismember(&mask, SIGTERM) == 1);
  });
  CHECK(blocked.get_future().get());
  pthread_sigmask(SIG_SETMASK, nullptr, &after);
  CHECK(sigismember(&before, SIGINT) == sigismember(&after, SIGINT));
}

TEST_CASE(submitted_by_many_threads) {
  std::atomic<int> ran{0};
  {
    IoPool pool(4);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < 500; ++i) pool.submit((i + t) % 3 == 0 ? Kind::kRead : Kind::kWrite, [&] { ++ran; });
      });
    }
    for (auto& thread : threads) thread.join();
  }
  CHECK(ran == 2000);
}
