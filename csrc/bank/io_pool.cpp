#include "bank/io_pool.h"

#include <condition_variable>
#include <csignal>
#include <deque>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace longlive::bank {

struct IoPool::State {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> reads, writes;
  int running = 0;
  bool stopping = false;
  std::vector<std::thread> threads;

  void work() {
    // What an exception needs is made for each thread at its first, and the process ends when there is no memory for it
    // then: so the first is thrown now.
    try {
      throw std::bad_alloc();
    } catch (const std::bad_alloc&) {
    }
    std::unique_lock lock(mutex);
    for (;;) {
      // A job that still runs may submit others: nobody leaves before the last one is done.
      changed.wait(lock, [&] { return !reads.empty() || !writes.empty() || (stopping && running == 0); });
      if (reads.empty() && writes.empty()) return;
      auto& queue = reads.empty() ? writes : reads;
      ++running;
      {
        const std::function<void()> job = std::move(queue.front());
        queue.pop_front();
        lock.unlock();
        job();
      }  // what the job holds is given back without the lock
      lock.lock();
      --running;
      if (stopping && running == 0) changed.notify_all();
    }
  }

  void stop() {
    {
      const std::lock_guard lock(mutex);
      stopping = true;
    }
    changed.notify_all();
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  }
};

IoPool::IoPool(int threads) {
  if (threads < 1 || threads > 64) {
    throw std::invalid_argument("io_threads = " + std::to_string(threads) + ", allowed: 1 .. 64");
  }
  state_ = std::make_unique<State>();
  // Signals are the program's threads' business: new threads inherit a mask that blocks them all.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    state_->threads.reserve(static_cast<std::size_t>(threads));
    for (int i = 0; i < threads; ++i) state_->threads.emplace_back([state = state_.get()] { state->work(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    state_->stop();
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

IoPool::~IoPool() { finish(); }

void IoPool::finish() noexcept { state_->stop(); }

void IoPool::submit(Kind kind, std::function<void()> job) {
  {
    const std::lock_guard lock(state_->mutex);
    (kind == Kind::kRead ? state_->reads : state_->writes).push_back(std::move(job));
  }
  state_->changed.notify_one();
}

}  // namespace longlive::bank
