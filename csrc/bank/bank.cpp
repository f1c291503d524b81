#include "bank/bank.h"

#include <utility>

#include "bank/bank_state.h"

namespace longlive::bank {
namespace {

constexpr std::int64_t kChunkBytes = std::int64_t{2} << 20;

BankOptions checked(BankOptions options) {
  // What slots take from disk passes through one at least.
  if (options.slots.count > 0) options.bounce_records = std::max<std::int64_t>(1, options.bounce_records);
  if (options.disk.limit_bytes <= 0) options.bounce_records = 0;
  check_options(options);
  options.host.record_bytes = options.disk.record_bytes = options.layout.record_bytes();
  return options;
}

}  // namespace

Bank::State::State(const BankOptions& given, std::unique_ptr<Device> the_device)
    : options(checked(given)), device(std::move(the_device)), slots(options.slots) {
  if (!device) throw std::invalid_argument("device must not be null");
  records = std::make_unique<HostRecords>(*device, options.host);
  grower = std::make_unique<IoPool>(1);
  if (options.disk.limit_bytes > 0) {
    disk = std::make_unique<DiskTier>(options.disk);
    pool = std::make_unique<IoPool>(options.io_threads);
  }
  to_host.resize(static_cast<std::size_t>(options.layout.layers));
  to_device.resize(static_cast<std::size_t>(options.layout.layers));
}

std::int64_t Bank::State::chunk_pages() const {
  return std::max<std::int64_t>(1, kChunkBytes / options.layout.page_bytes);
}

Bank::State::Turn::Turn(State& state) : lock(state.enter()), state_(state) {
  state.check_open();
  ++state.callers;
}

Bank::State::Turn::~Turn() {
  if (!lock.owns_lock()) lock.lock();
  state_.send(lock);
  --state_.callers;
  if (state_.closing) state_.changed.notify_all();
}

// Jobs go to the pool without the mutex, which their ends need. One that the pool has no memory for is done here.
void Bank::State::send(Lock& lock) noexcept {
  while (!outbox.empty()) {
    std::vector<Job> jobs;
    jobs.swap(outbox);
    lock.unlock();
    submit(jobs, 0);
    jobs.clear();
    lock.lock();
  }
}

void Bank::State::submit(const std::vector<Job>& jobs, std::size_t first) noexcept {
  for (; first < jobs.size(); ++first) {
    try {
      jobs[first].pool->submit(jobs[first].kind, jobs[first].run);
    } catch (...) {
      jobs[first].run();
    }
  }
}

void Bank::State::wait_change(Lock& lock) {
  const std::uint64_t seen = changes;
  send(lock);
  changed.wait(lock, [&] { return changes != seen || closing; });
  check_open();
}

void Bank::State::wait_point(Lock& lock, const EventRef& point) {
  send(lock);
  lock.unlock();
  try {
    device->synchronize(point);
  } catch (...) {
    lock.lock();
    throw;
  }
  lock.lock();
  check_open();
}

void Bank::State::check_capture(Stream stream, const char* what) {
  if (device->capturing(stream)) {
    throw std::runtime_error(std::string(what) + " while a CUDA graph is being captured from the stream");
  }
}

// After a device that refused half-way: waits until nothing is under way that has no point.
void Bank::State::repair() {
  const auto wait = [&](Direction direction, bool& unmarked) {
    if (!unmarked) return;
    device->synchronize(device->copy(direction, {}, {}));
    unmarked = false;
  };
  wait(Direction::kToHost, unmarked_to_host);
  wait(Direction::kToDevice, unmarked_to_device);
}

// Gives back what nothing uses any more.
void Bank::State::tend() noexcept {
  records->drop_reached();
  if (!unmarked_to_host && !unmarked_to_device) records->reap();
}

void Bank::State::wait(std::int64_t layer, Stream stream, bool fetched_only) {
  if (layer < 0 || layer >= options.layout.layers) {
    throw std::invalid_argument("layer must be in 0 .. " + std::to_string(options.layout.layers - 1) + ", got " +
                                std::to_string(layer));
  }
  Turn turn(*this);
  check_capture(stream, "wait");
  if (!fetches.empty()) {
    wait_for_reads(turn.lock);
    copy_settled();
  }
  slots.read_by(stream);
  const auto at = static_cast<std::size_t>(layer);
  bool late = false;
  for (EventRef* point : {&to_host[at], &to_device[at]}) {
    if ((fetched_only && point == &to_host[at]) || reached(*device, *point)) continue;
    late = true;
    device->wait(stream, *point);
  }
  prune(*device, fills);
  for (const StreamPoint& fill : fills) {
    if (!fetched_only || slots.pinned_fill(fill.point)) device->wait(stream, fill.point);
  }
  if (late) ++counts.late_layers;
  spill_ahead(false);
}

void Bank::State::release(const std::vector<Frame>& wanted, Stream stream) {
  Turn turn(*this);
  check_capture(stream, "release");
  for (const Frame frame : wanted) {
    if (frame >= 0) slots.expect_release(frame);
  }
  const EventRef point = device->record(stream);
  std::vector<StreamPoint> others;
  for (const Frame frame : wanted) {
    if (frame >= 0) slots.release(*device, frame, {stream, point}, others);
  }
  spill_ahead(false);
  tend();
}

void Bank::State::flush() {
  Turn turn(*this);
  for (;;) {
    repair();
    start_spills(options.bounce_records + options.commit_records, false);
    if (working > 0) {
      wait_change(turn.lock);
      continue;
    }
    std::vector<EventRef> points;
    for (const EventRef& point : {to_host.back(), to_device.back()}) {
      if (point && !device->done(point)) points.push_back(point);
    }
    prune(*device, fills);
    for (const StreamPoint& fill : fills) points.push_back(fill.point);
    if (points.empty()) break;
    for (const EventRef& point : points) wait_point(turn.lock, point);
  }
  tend();
}

void Bank::State::close() noexcept {
  if (forked()) return;
  Lock lock(mutex);
  if (closing) {
    changed.wait(lock, [&] { return closed; });
    return;
  }
  closing = true;
  abandoned.store(true, std::memory_order_relaxed);
  changed.notify_all();
  changed.wait(lock, [&] { return callers == 0; });
  lock.unlock();
  grower->finish();
  if (pool) pool->finish();  // does what is queued, or leaves it undone quickly; jobs may still submit others
  grower.reset();
  pool.reset();
  lock.lock();
  const auto quietly = [](auto call) {
    try {
      call();
    } catch (...) {  // nobody can be told, and a device that refuses does not copy
    }
  };
  quietly([&] { repair(); });
  // The points of the last layers: a queue keeps its order.
  for (const EventRef& point : {to_host.back(), to_device.back()}) quietly([&] { device->synchronize(point); });
  for (const StreamPoint& fill : fills) quietly([&] { device->synchronize(fill.point); });
  fetches.clear();
  frames.clear();
  fills.clear();
  to_host.clear();
  to_device.clear();
  slots = DeviceSlots(SlotGeometry{});
  records.reset();
  disk.reset();
  device.reset();
  closed = true;
  changed.notify_all();
}

Bank::Bank(const BankOptions& options, std::unique_ptr<Device> device)
    : state_(std::make_unique<State>(options, std::move(device))) {}
Bank::~Bank() {
  close();
  if (state_->forked()) static_cast<void>(state_.release());  // joining threads that are not there would not end
}

void Bank::commit(const std::vector<Frame>& frames, const std::vector<PageSource>& pages, Stream stream, bool replace) {
  state_->commit(frames, pages, stream, replace);
}
void Bank::insert(Frame frame, const std::byte* record, std::int64_t generation) {
  state_->insert(frame, record, generation);
}
void Bank::read(Frame frame, std::byte* record) { state_->read(frame, record); }
void Bank::prefetch(const std::vector<Frame>& frames, Stream stream) { state_->prefetch(frames, stream); }

std::vector<Lost> Bank::settle() {
  State::Turn turn(*state_);
  state_->wait_for_reads(turn.lock);
  state_->copy_settled();
  state_->spill_ahead(false);
  return state_->take_lost();
}

void Bank::wait(std::int64_t layer, Stream stream, bool fetched_only) { state_->wait(layer, stream, fetched_only); }
void Bank::release(const std::vector<Frame>& frames, Stream stream) { state_->release(frames, stream); }
void Bank::forget(const std::vector<Frame>& frames) { state_->forget(frames); }
void Bank::clear() { state_->clear(); }

std::int64_t Bank::room() const {
  const State::Turn turn(*state_);
  return state_->room();
}

Where Bank::where(Frame frame) const {
  const State::Turn turn(*state_);
  Where where;
  const Entry* entry = state_->find(frame);
  if (entry == nullptr) return where;
  where.slot = state_->slots.lookup(frame);
  where.host = entry->host != nullptr;
  where.disk = entry->disk != nullptr;
  where.generation = entry->generation;
  return where;
}

std::vector<Frame> Bank::frames() const {
  const State::Turn turn(*state_);
  std::vector<Frame> found;
  found.reserve(state_->frames.size());
  for (const auto& [frame, entry] : state_->frames) found.push_back(frame);
  return found;
}

void Bank::flush() { state_->flush(); }

BankStats Bank::stats() const {
  const State::Turn turn(*state_);
  return state_->snapshot();
}

void Bank::close() noexcept { state_->close(); }

bool Bank::closed() const {
  if (state_->forked()) return true;
  const State::Lock lock(state_->mutex);
  return state_->closing;
}

}  // namespace longlive::bank
