// Growth of host memory: touching and locking a slab takes long, so a thread of its own does it, ahead of need.
#include <utility>

#include "bank/bank_state.h"

namespace longlive::bank {

// Whether the next commit and the next fetch would wait for a slab. Nothing is taken ahead of the first record.
bool Bank::State::short_of_slabs() const {
  return !growth_refused && records->stats().reserved_bytes > 0 &&
         !records->ready(options.commit_records + options.bounce_records);
}

void Bank::State::start_growth() {
  outbox.reserve(outbox.size() + 1);
  std::function<void()> run;
  auto growth = records->arena().begin_growth();
  if (!growth) return;
  try {
    run = [this, growth] { grow(growth); };
  } catch (...) {
    records->arena().end_growth(*growth, false);
    throw;
  }
  growth_error = nullptr;
  outbox.push_back({IoPool::Kind::kWrite, std::move(run), grower.get()});
}

void Bank::State::grow_ahead() noexcept {
  if (closing || !short_of_slabs()) return;
  try {
    start_growth();
  } catch (...) {  // no memory: another time
  }
}

// A job: one slab after another, until there are enough.
void Bank::State::grow(std::shared_ptr<HostArena::Growth> growth) noexcept {
  while (growth) {
    std::exception_ptr error;
    try {
      if (!abandoned.load(std::memory_order_relaxed)) HostArena::make(*growth);
    } catch (...) {
      error = std::current_exception();
    }
    const Lock lock(mutex);
    growth_refused = !records->arena().end_growth(*growth, growth_waiters > 0);
    growth.reset();
    const bool failed = error != nullptr;
    growth_error = std::move(error);  // no copy stays here: whoever waits may be the last to let it go
    ++changes;
    changed.notify_all();
    if (failed || closing || !short_of_slabs()) continue;
    try {
      growth = records->arena().begin_growth();
    } catch (...) {  // no memory: another time
    }
  }
}

// Returns when a growth has ended, throws what it threw.
void Bank::State::wait_for_growth(Lock& lock) {
  start_growth();
  struct Waiter {
    std::int64_t& count;
    explicit Waiter(std::int64_t& the_count) : count(the_count) { ++count; }
    ~Waiter() { --count; }
  };
  {
    const Waiter waiter(growth_waiters);
    wait_change(lock);
  }
  if (growth_error) std::rethrow_exception(std::exchange(growth_error, nullptr));
}

}  // namespace longlive::bank
