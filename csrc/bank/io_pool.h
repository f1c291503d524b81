// Threads that carry out disk jobs: reads before writes, each kind in the order submitted.
#pragma once

#include <functional>
#include <memory>

namespace longlive::bank {

class IoPool {
 public:
  enum class Kind { kRead, kWrite };

  explicit IoPool(int threads);  // 1 .. 64; throws std::invalid_argument
  ~IoPool();                     // finishes
  IoPool(const IoPool&) = delete;
  IoPool& operator=(const IoPool&) = delete;

  // `job` must not throw. Jobs may submit jobs.
  void submit(Kind kind, std::function<void()> job);
  // Carries out what is queued and what that submits, then joins. Nobody else may submit from here on.
  void finish() noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace longlive::bank
