// A device whose queues run when they are told to: copies read and write their bytes late, in any order that the points
// allow. What is not ordered by a point shows as wrong bytes.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bank/device.h"

namespace {

using namespace longlive::bank;

class ScriptedDevice final : public Device {
 public:
  explicit ScriptedDevice(unsigned seed) : random_(seed) {}

  // For the test: work on a compute stream.
  void compute(Stream stream, std::function<void()> run) {
    const std::lock_guard lock(mutex_);
    push(key(stream), {std::move(run)}, {});
  }
  void drain() {
    const std::lock_guard lock(mutex_);
    while (step()) {
    }
  }
  // Runs at most `count` operations of any queues.
  void some(int count) {
    const std::lock_guard lock(mutex_);
    while (count-- > 0 && step()) {
    }
  }
  // Nothing of this direction runs until somebody on the host waits for it and nothing else is left to run.
  void hold(Direction direction, bool held) {
    const std::lock_guard lock(mutex_);
    held ? static_cast<void>(held_.insert(key(direction))) : static_cast<void>(held_.erase(key(direction)));
  }
  // The next copy but `after` of this direction throws, with half of it enqueued.
  void refuse(Direction direction, int after) {
    const std::lock_guard lock(mutex_);
    refuse_[key(direction)] = after;
  }
  void capture(Stream stream, bool capturing) {
    const std::lock_guard lock(mutex_);
    capturing ? static_cast<void>(captured_.insert(stream)) : static_cast<void>(captured_.erase(stream));
  }
  int waits() const { return waits_; }  // of the host

  EventRef record(Stream stream) override {
    const std::lock_guard lock(mutex_);
    return point(push(key(stream), {}, {}));
  }
  void wait(Stream stream, const EventRef& event) override {
    const std::lock_guard lock(mutex_);
    push(key(stream), {}, {event});
  }
  EventRef copy(Direction direction, const std::vector<Copy>& copies, const std::vector<EventRef>& after) override {
    const std::lock_guard lock(mutex_);
    const auto refused = refuse_.find(key(direction));
    const bool failing = refused != refuse_.end() && refused->second-- == 0;
    std::vector<std::function<void()>> runs;
    const std::size_t count = failing ? copies.size() / 2 : copies.size();
    for (std::size_t i = 0; i < count; ++i) runs.push_back(mover(copies[i]));
    std::shuffle(runs.begin(), runs.end(), random_);
    const auto op = push(key(direction), std::move(runs), after);
    if (failing) {
      refuse_.erase(refused);
      throw std::runtime_error("the device refuses");
    }
    return point(op);
  }
  void copy_on(Stream stream, const std::vector<Copy>& copies) override {
    const std::lock_guard lock(mutex_);
    std::vector<std::function<void()>> runs;
    for (const Copy& copy : copies) runs.push_back(mover(copy));
    push(key(stream), std::move(runs), {});
  }

  bool done(const EventRef& event) override {
    const std::lock_guard lock(mutex_);
    if (!event) return true;
    if (random_() % 4 == 0) step();
    return op_of(event)->done;
  }
  void synchronize(const EventRef& event) override {
    const std::lock_guard lock(mutex_);
    if (!event) return;
    ++waits_;
    while (!op_of(event)->done) {
      if (step()) continue;
      if (held_.empty()) throw std::logic_error("this point is never reached");
      held_.clear();
    }
  }
  bool capturing(Stream stream) override {
    const std::lock_guard lock(mutex_);
    return captured_.count(stream) > 0;
  }
  bool lock(void*, std::size_t, std::string* reason) override {
    if (reason != nullptr) *reason = "not here";
    return false;
  }
  void unlock(void*) noexcept override {}
  DeviceStats stats() const override { return {}; }

 private:
  struct Op {
    std::vector<std::function<void()>> runs;
    std::vector<std::shared_ptr<Op>> after;
    bool done = false;
  };
  struct Point final : Event {
    std::shared_ptr<Op> op;
  };
  static int key(Stream stream) { return static_cast<int>(stream); }
  static int key(Direction direction) { return direction == Direction::kToHost ? -1 : -2; }
  static std::function<void()> mover(const Copy& copy) {
    return [copy] {
      std::memmove(reinterpret_cast<void*>(copy.to), reinterpret_cast<const void*>(copy.from),
                   static_cast<std::size_t>(copy.bytes));
    };
  }
  static std::shared_ptr<Op> op_of(const EventRef& event) { return static_cast<const Point&>(*event).op; }
  static EventRef point(std::shared_ptr<Op> op) {
    auto made = std::make_shared<Point>();
    made->op = std::move(op);
    return made;
  }
  std::shared_ptr<Op> push(int queue, std::vector<std::function<void()>> runs, const std::vector<EventRef>& after) {
    auto op = std::make_shared<Op>();
    op->runs = std::move(runs);
    for (const EventRef& event : after) {
      if (event) op->after.push_back(op_of(event));
    }
    queues_[queue].push_back(op);
    return op;
  }
  // Runs one operation that may run, of a queue chosen at random.
  bool step() {
    std::vector<std::deque<std::shared_ptr<Op>>*> ready;
    for (auto& [number, queue] : queues_) {
      if (queue.empty() || held_.count(number) > 0) continue;
      const auto& after = queue.front()->after;
      if (std::all_of(after.begin(), after.end(), [](const auto& op) { return op->done; })) ready.push_back(&queue);
    }
    if (ready.empty()) return false;
    auto& queue = *ready[random_() % ready.size()];
    const std::shared_ptr<Op> op = queue.front();
    queue.pop_front();
    for (const auto& run : op->runs) run();
    op->runs.clear();
    op->after.clear();
    op->done = true;
    return true;
  }

  std::mutex mutex_;
  std::mt19937 random_;
  std::map<int, std::deque<std::shared_ptr<Op>>> queues_;
  std::set<int> held_;
  std::map<int, int> refuse_;
  std::set<Stream> captured_;
  int waits_ = 0;
};

}  // namespace
