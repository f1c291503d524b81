// The device through the driver, over the stand-in: what is ordered, what is batched, what a refusal does.
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bank/device.h"
#include "stand_in.h"
#include "test_case.h"

using namespace longlive::bank;

namespace {

constexpr std::size_t kPage = 4096;

struct Memory {
  explicit Memory(std::size_t pages, char byte = '-') : bytes(pages * kPage, byte) {}
  char* page(std::size_t i) { return bytes.data() + i * kPage; }
  std::uintptr_t at(std::size_t i) { return reinterpret_cast<std::uintptr_t>(page(i)); }
  bool holds(std::size_t i, char byte) const { return bytes.compare(i * kPage, kPage, std::string(kPage, byte)) == 0; }
  std::string bytes;
};

void lock(const std::unique_ptr<Device>& device, Memory& memory) {
  std::string reason;
  if (!device->lock(memory.page(0), memory.bytes.size(), &reason)) fail(__LINE__, reason, __FILE__);
}

std::unique_ptr<Device> open() { return make_cuda_device(0, LONGLIVE_FAKE_CUDA); }

Copy one(Memory& to, std::size_t to_page, Memory& from, std::size_t from_page, std::int64_t bytes = kPage) {
  return {to.at(to_page), from.at(from_page), bytes};
}

// Everything the device took was given back, no rule broken.
void check_clean(StandIn& fake, const std::unique_ptr<Device>& closed) {
  CHECK(closed == nullptr);
  if (!fake.violations().empty()) fail(__LINE__, fake.violations(), __FILE__);
  CHECK(fake.count("contexts") == 0);
  CHECK(fake.count("events") == 0);
  CHECK(fake.count("current") == 0 && fake.count("capture_mode") == 0);
}

}  // namespace

TEST_CASE(a_copy_waits_for_what_writes_its_source) {
  for (int seed = 0; seed < 50; ++seed) {
    StandIn fake;
    fake.set("seed", seed);
    Memory pool(4), host(4);
    std::unique_ptr<Device> device = open();
    lock(device, host);
    const std::uintptr_t compute = seed % 2 == 0 ? fake.stream() : 0;
    fake.write(compute, pool.page(1), 'k', kPage);
    EventRef stored = device->copy(Direction::kToHost, {one(host, 2, pool, 1)}, {device->record(compute)});
    CHECK(!device->done(stored));
    CHECK(host.holds(2, '-'));
    // Out and back in again: the other direction's stream waits, too, and compute for that.
    device->wait(compute, device->copy(Direction::kToDevice, {one(pool, 3, host, 2)}, {stored, nullptr}));
    fake.check(compute, pool.page(3), std::string(kPage, 'k'));
    device->synchronize(device->record(compute));
    CHECK(device->done(stored));
    CHECK(host.holds(2, 'k') && pool.holds(3, 'k') && host.holds(1, '-'));
    stored.reset();
    device.reset();
    check_clean(fake, device);
  }
}

TEST_CASE(the_stand_in_shows_a_missing_wait) {
  int wrong = 0;
  for (int seed = 0; seed < 20; ++seed) {
    StandIn fake;
    fake.set("seed", seed);
    Memory pool(2), host(1);
    std::unique_ptr<Device> device = open();
    lock(device, host);
    const std::uintptr_t compute = fake.stream();
    fake.write(compute, pool.page(0), 'k', kPage);
    device->synchronize(device->copy(Direction::kToHost, {one(host, 0, pool, 0)}, {}));
    wrong += host.holds(0, 'k') ? 0 : 1;
    // And one that overwrites what a kernel still reads.
    fake.run();
    fake.check(compute, pool.page(0), std::string(kPage, 'k'));
    device->synchronize(device->copy(Direction::kToDevice, {one(pool, 0, host, 0)}, {}));
    wrong += fake.violations().empty() ? 0 : 1;
    fake.run();
  }
  CHECK(wrong >= 10);
}

TEST_CASE(copies_of_one_direction_keep_their_order) {
  for (int seed = 0; seed < 30; ++seed) {
    StandIn fake;
    fake.set("seed", seed);
    Memory pool(1), first(1, 'a'), second(1, 'b');
    std::unique_ptr<Device> device = open();
    lock(device, first);
    const EventRef a = device->copy(Direction::kToDevice, {one(pool, 0, first, 0)}, {});
    const EventRef b = device->copy(Direction::kToDevice, {one(pool, 0, second, 0)}, {});
    device->synchronize(b);
    CHECK(device->done(a));
    CHECK(pool.holds(0, 'b'));
  }
}

TEST_CASE(one_call_of_the_driver_for_a_batch) {
  StandIn fake;
  Memory pool(8), host(8);
  std::unique_ptr<Device> device = open();
  lock(device, host);
  for (std::size_t i = 0; i < 8; ++i) host.bytes.replace(i * kPage, kPage, kPage, static_cast<char>('a' + i));
  // 0 and 1 join, 3 and 2 are in the wrong order; nothing for the empty one.
  const std::vector<Copy> copies = {one(pool, 4, host, 0), one(pool, 5, host, 1),
                                    one(pool, 1, host, 3), one(pool, 0, host, 2),
                                    one(pool, 7, host, 7, 0)};
  device->synchronize(device->copy(Direction::kToDevice, copies, {}));
  CHECK(pool.holds(4, 'a') && pool.holds(5, 'b') && pool.holds(1, 'd'));
  CHECK(pool.holds(0, 'c') && pool.holds(7, '-'));
  CHECK(fake.count("batches") == 1 && fake.count("h2d") == 0);
  CHECK(fake.count("batch_flags") == 1);
  const DeviceStats stats = device->stats();
  CHECK(stats.copies == 3 && stats.batches == 1 && stats.copy_loops == 0 && stats.copy_loop_reason.empty());
  // Without copies: only the point after those given.
  const std::uintptr_t compute = fake.stream();
  fake.write(compute, pool.page(0), 'z', kPage);
  EventRef point = device->copy(Direction::kToHost, {}, {device->record(compute)});
  CHECK(!device->done(point));
  device->synchronize(point);
  point.reset();
  CHECK(pool.holds(0, 'z'));
  CHECK(fake.count("batches") == 1);
  device.reset();
  check_clean(fake, device);
}

TEST_CASE(no_copy_reaches_across_a_registration_or_an_allocation) {
  StandIn fake;
  Memory pool(8), host(8, 'h');
  std::unique_ptr<Device> device = open();
  std::string reason;
  CHECK(device->lock(host.page(0), 2 * kPage, &reason));
  CHECK(device->lock(host.page(2), 2 * kPage, &reason));
  CHECK(fake.count("ranges") == 2);
  std::vector<Copy> copies;
  for (std::size_t i = 0; i < 6; ++i) copies.push_back(one(pool, i, host, i));
  device->synchronize(device->copy(Direction::kToDevice, copies, {}));
  CHECK(device->stats().copies == 3);  // two registrations, and what is in none
  // One descriptor across all of them, out again.
  device->synchronize(device->copy(Direction::kToHost, {one(host, 0, pool, 0, 6 * kPage)}, {}));
  CHECK(device->stats().copies == 6);
  device->unlock(host.page(0));
  device->unlock(host.page(2));
  CHECK(fake.count("ranges") == 0);
  device->synchronize(device->copy(Direction::kToDevice, copies, {}));
  CHECK(device->stats().copies == 7);
  // Device allocations that happen to be neighbours.
  fake.allocation(pool.page(0), 3 * kPage);
  fake.allocation(pool.page(3), 5 * kPage);
  device->synchronize(device->copy(Direction::kToDevice, copies, {}));
  CHECK(device->stats().copies == 9);
  Memory other(8);
  std::vector<Copy> within;
  for (std::size_t i = 0; i < 6; ++i) within.push_back(one(other, i, pool, i));
  device->copy_on(0, within);
  CHECK(device->stats().copies == 11);
  fake.run();
  CHECK(other.holds(5, 'h'));
  device.reset();
  check_clean(fake, device);
}

TEST_CASE(single_copies_where_the_driver_has_no_batch) {
  StandIn fake;
  fake.set("driver_version", 12040);
  Memory pool(4), host(4, 'h');
  std::unique_ptr<Device> device = open();
  device->synchronize(device->copy(Direction::kToDevice, {one(pool, 0, host, 1), one(pool, 2, host, 0)}, {}));
  CHECK(pool.holds(0, 'h') && pool.holds(2, 'h') && pool.holds(1, '-'));
  host.bytes.assign(4 * kPage, '-');
  device->synchronize(device->copy(Direction::kToHost, {one(host, 3, pool, 0)}, {}));
  CHECK(host.holds(3, 'h'));
  CHECK(fake.count("batches") == 0 && fake.count("h2d") == 2 && fake.count("d2h") == 1);
  const DeviceStats stats = device->stats();
  CHECK(stats.copies == 3 && stats.batches == 0 && stats.copy_loops == 2);
  CHECK(stats.copy_loop_reason.find("12.8") != std::string::npos);
  device.reset();
  check_clean(fake, device);
}

TEST_CASE(only_page_locked_memory_is_batched) {
  StandIn fake;
  Memory pool(4), host(4, 'h');
  std::unique_ptr<Device> device = open();
  std::string reason;
  CHECK(device->lock(host.page(0), kPage, &reason));
  device->synchronize(device->copy(Direction::kToDevice, {one(pool, 0, host, 0), one(pool, 3, host, 1)}, {}));
  CHECK(pool.holds(0, 'h') && pool.holds(3, 'h'));
  CHECK(fake.count("batches") == 0 && fake.count("h2d") == 2);
  CHECK(device->stats().copy_loop_reason == "host memory is not page-locked");
  device->synchronize(device->copy(Direction::kToDevice, {one(pool, 1, host, 0)}, {}));
  CHECK(device->stats().batches == 1);
  device.reset();
  // A device that cannot use the addresses of page-locked memory faults on a batch.
  fake.set("host_pointers", 0);
  device = open();
  CHECK(device->lock(host.page(0), kPage, &reason));
  device->synchronize(device->copy(Direction::kToHost, {one(host, 0, pool, 2)}, {}));
  CHECK(host.holds(0, '-') && device->stats().batches == 0);
  CHECK(device->stats().copy_loop_reason == "the device does not reach page-locked memory by its address");
  device.reset();
  check_clean(fake, device);
}

TEST_CASE(a_refused_batch_goes_out_as_single_copies) {
  for (const int refusal : {1, 801}) {
    StandIn fake;
    fake.set("batch_result", refusal);
    Memory pool(2), host(2, 'h');
    std::unique_ptr<Device> device = open();
    lock(device, host);
    const std::vector<Copy> copies = {one(pool, 0, host, 1), one(pool, 1, host, 0)};
    device->synchronize(device->copy(Direction::kToDevice, copies, {}));
    CHECK(pool.holds(0, 'h') && pool.holds(1, 'h'));
    // Remembered: not asked again.
    device->synchronize(device->copy(Direction::kToDevice, copies, {}));
    CHECK(fake.count("batches") == 1 && fake.count("h2d") == 4);
    const DeviceStats stats = device->stats();
    CHECK(stats.copies == 4 && stats.batches == 0 && stats.copy_loops == 2);
    CHECK(stats.copy_loop_reason.find("cuMemcpyBatchAsync failed: CUDA_ERROR_") == 0);
    device.reset();
    check_clean(fake, device);
  }
}

TEST_CASE(a_refusal_of_one_copy_is_not_remembered) {
  StandIn fake;
  fake.set("batch_result", 1);
  fake.set("batch_failed", 0);
  Memory pool(1), host(1, 'h');
  std::unique_ptr<Device> device = open();
  lock(device, host);
  device->synchronize(device->copy(Direction::kToDevice, {one(pool, 0, host, 0)}, {}));
  CHECK(pool.holds(0, 'h'));
  fake.set("batch_result", 0);
  device->synchronize(device->copy(Direction::kToDevice, {one(pool, 0, host, 0)}, {}));
  CHECK(device->stats().batches == 1 && device->stats().copy_loops == 1);
}

TEST_CASE(a_failed_copy_throws_and_leaves_nothing_under_way) {
  for (const bool batches : {true, false}) {
    StandIn fake;
    if (!batches) fake.set("driver_version", 12040);
    Memory pool(2), host(2, 'h');
    std::unique_ptr<Device> device = open();
    lock(device, host);
    fake.set("fail_copy", batches ? 1 : 2);
    const std::vector<Copy> copies = {one(pool, 0, host, 1), one(pool, 1, host, 0)};
    const char* text = batches ? "cuMemcpyBatchAsync failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)"
                               : "cuMemcpyHtoDAsync failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)";
    CHECK_THROWS(std::runtime_error, text, device->copy(Direction::kToDevice, copies, {}));
    CHECK(fake.touching(host.page(0), 2 * kPage) == 0);
    CHECK(device->stats().copies == 0);
    device->synchronize(device->copy(Direction::kToDevice, copies, {}));
    CHECK(pool.holds(0, 'h') && pool.holds(1, 'h'));
    fake.set("fail_copy", 1);
    CHECK_THROWS(std::runtime_error, "cuMemcpyDtoDAsync failed", device->copy_on(0, {one(pool, 0, pool, 1)}));
    device.reset();
    check_clean(fake, device);
  }
}

TEST_CASE(copies_within_the_device_are_ordered_on_their_stream) {
  for (int seed = 0; seed < 20; ++seed) {
    StandIn fake;
    fake.set("seed", seed);
    Memory pool(3);
    std::unique_ptr<Device> device = open();
    const std::uintptr_t compute = seed % 2 == 0 ? fake.stream() : 0;
    fake.write(compute, pool.page(0), 'k', kPage);
    device->copy_on(compute, {one(pool, 2, pool, 0)});
    fake.write(compute, pool.page(0), 'x', kPage);
    device->synchronize(device->record(compute));
    CHECK(pool.holds(2, 'k') && pool.holds(0, 'x'));
    CHECK(fake.count("batches") == 0 && fake.count("d2d") == 1);
    CHECK(device->stats().copies == 1);
  }
}

TEST_CASE(nothing_is_batched_into_a_capture) {
  StandIn fake;
  Memory pool(2), host(2, 'h');
  std::unique_ptr<Device> device = open();
  lock(device, host);
  const std::uintptr_t compute = fake.stream();
  CHECK(!device->capturing(compute));
  fake.capture(compute, true);
  CHECK(device->capturing(compute));
  // A point on a stream being captured takes the copies that wait for it into the graph.
  const std::vector<Copy> copies = {one(pool, 0, host, 0), one(pool, 1, host, 0)};
  device->copy(Direction::kToDevice, copies, {device->record(compute)});
  device->copy_on(compute, {one(pool, 0, pool, 1)});
  CHECK(fake.count("batches") == 0 && fake.count("h2d") == 2 && fake.count("d2d") == 1);
  CHECK(device->stats().copy_loop_reason == "a CUDA graph is being captured");
  CHECK(fake.capture(compute, false) > 0);
  CHECK(!device->capturing(compute));
  device->synchronize(device->copy(Direction::kToDevice, {one(pool, 0, host, 0)}, {}));
  CHECK(device->stats().batches == 1);
  device.reset();
  check_clean(fake, device);
}

TEST_CASE(another_streams_capture_is_left_alone) {
  StandIn fake;
  Memory pool(1), host(2, 'h');
  std::unique_ptr<Device> device = open();
  const std::uintptr_t graph = fake.stream(), blocking = fake.stream(0);
  std::string reason;
  EventRef before = device->copy(Direction::kToDevice, {one(pool, 0, host, 0)}, {});
  fake.capture(graph, true);
  CHECK(!device->capturing(0));
  // Queries, waits and registrations would invalidate the capture but for the thread's relaxed mode.
  CHECK(!device->done(before));
  device->synchronize(before);
  before.reset();
  CHECK(device->lock(host.page(0), kPage, &reason));
  device->synchronize(device->copy(Direction::kToDevice, {one(pool, 0, host, 0)}, {device->record(0)}));
  device->unlock(host.page(0));
  fake.capture(graph, false);
  // While a stream that synchronises with the legacy one is captured, that one must not be used either.
  fake.capture(blocking, true);
  CHECK(device->capturing(0));
  fake.capture(blocking, false);
  device.reset();
  check_clean(fake, device);
}

TEST_CASE(events_are_used_again) {
  StandIn fake;
  Memory pool(2), host(2, 'h');
  std::unique_ptr<Device> device = open();
  const std::uintptr_t compute = fake.stream();
  for (int i = 0; i < 100; ++i) device->record(compute);
  CHECK(fake.count("events_made") == 1);
  // Given back while a stream still waits for its earlier recording: that wait is not changed.
  fake.hold(compute, true);
  fake.write(compute, pool.page(0), 'k', kPage);
  const EventRef stored = device->copy(Direction::kToHost, {one(host, 0, pool, 0)}, {device->record(compute)});
  const std::uintptr_t idle = fake.stream();
  const EventRef again = device->record(idle);
  CHECK(fake.count("events_made") == 2);
  fake.run();
  CHECK(device->done(again) && !device->done(stored));
  fake.hold(compute, false);
  device->synchronize(stored);
  CHECK(host.holds(0, 'k'));
  device.reset();
  // Two events are still out: they keep the context.
  CHECK(fake.count("contexts") == 1 && fake.count("streams") == 3);
}

TEST_CASE(events_may_outlive_the_device) {
  StandIn fake;
  std::unique_ptr<Device> device = open();
  EventRef event = device->record(0);
  device.reset();
  CHECK(fake.count("contexts") == 1);
  event.reset();
  check_clean(fake, device);
}

TEST_CASE(points_answer_for_themselves) {
  StandIn fake;
  std::unique_ptr<Device> device = open();
  CHECK(device->done(nullptr));
  device->synchronize(nullptr);
  device->wait(0, nullptr);
  CHECK(fake.pending() == 0);
  EventRef event = device->record(0);
  fake.run();
  fake.set("not_ready", 3);
  for (int i = 0; i < 3; ++i) CHECK(!device->done(event));
  CHECK(device->done(event));
  struct Foreign final : Event {};
  CHECK_THROWS(std::invalid_argument, "event", device->done(std::make_shared<Foreign>()));
  CHECK_THROWS(std::runtime_error, "cuEventRecord failed: CUDA_ERROR_INVALID_HANDLE (400)", device->record(0x77));
  CHECK_THROWS(std::runtime_error, "cuStreamWaitEvent failed: CUDA_ERROR_INVALID_HANDLE", device->wait(0x77, event));
  CHECK_THROWS(std::runtime_error, "cuStreamIsCapturing failed", device->capturing(0x77));
  event.reset();
  device.reset();
  check_clean(fake, device);
}

TEST_CASE(memory_that_cannot_be_locked_says_why) {
  StandIn fake;
  Memory host(4);
  std::unique_ptr<Device> device = open();
  std::string reason;
  fake.set("register_oom", 2);
  CHECK(device->lock(host.page(0), kPage, &reason));
  CHECK(reason.empty());
  CHECK(!device->lock(host.page(1), kPage, &reason));
  CHECK(reason == "cuMemHostRegister failed: CUDA_ERROR_OUT_OF_MEMORY (2)");
  CHECK(!device->lock(host.page(2), kPage, nullptr));
  fake.set("register_oom", 0);
  CHECK(!device->lock(host.page(0), kPage, &reason));
  CHECK(reason.find("ALREADY_REGISTERED (712)") != std::string::npos);
  CHECK(device->lock(host.page(1), kPage, &reason));
  CHECK(fake.count("ranges") == 2);
  device->unlock(host.page(0));
  device->unlock(host.page(3));  // never locked
  CHECK(fake.count("ranges") == 1);
  // What is still locked goes with the device, once its copies are done.
  Memory pool(1);
  device->copy(Direction::kToDevice, {one(pool, 0, host, 1)}, {});
  device.reset();
  CHECK(fake.count("ranges") == 0 && fake.pending() == 0);
  check_clean(fake, device);
}

TEST_CASE(closing_waits_for_the_copies) {
  StandIn fake;
  Memory pool(2), host(2, 'h');
  std::unique_ptr<Device> device = open();
  device->copy(Direction::kToDevice, {one(pool, 0, host, 0)}, {});
  device->copy(Direction::kToHost, {one(host, 1, pool, 1)}, {});
  CHECK(fake.pending() > 0);
  device.reset();
  CHECK(fake.touching(host.page(0), 2 * kPage) == 0);
  CHECK(pool.holds(0, 'h') && host.holds(1, '-'));
  CHECK(fake.count("streams") == 1);
  check_clean(fake, device);
}

TEST_CASE(a_driver_that_has_shut_down_is_tolerated) {
  StandIn fake;
  Memory host(1);
  std::unique_ptr<Device> device = open();
  std::string reason;
  CHECK(device->lock(host.page(0), kPage, &reason));
  EventRef event = device->record(0);
  fake.set("shut_down", 1);
  CHECK_THROWS(std::runtime_error, "cuCtxPushCurrent failed: CUDA_ERROR_DEINITIALIZED (4)", device->done(event));
  CHECK_THROWS(std::runtime_error, "CUDA_ERROR_DEINITIALIZED", device->lock(host.page(0), kPage, &reason));
  device->unlock(host.page(0));
  device.reset();
  event.reset();
  CHECK(fake.violations().empty());
}

TEST_CASE(a_device_that_is_not_there_is_named) {
  StandIn fake;
  CHECK_THROWS(std::runtime_error, "ordinal 3: cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE (101)",
               make_cuda_device(3, LONGLIVE_FAKE_CUDA));
  CHECK_THROWS(std::runtime_error, "the CUDA driver cannot be loaded", make_cuda_device(0, "/no-such-libcuda.so.1"));
  CHECK(fake.count("contexts") == 0);
}

TEST_CASE(threads_share_a_device) {
  StandIn fake;
  constexpr std::size_t kThreads = 4;
  Memory pool(2 * kThreads), host(2 * kThreads);
  std::unique_ptr<Device> device = open();
  std::vector<std::uintptr_t> streams;
  for (std::size_t i = 0; i < kThreads; ++i) streams.push_back(fake.stream());
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (std::size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      std::string reason;
      const bool locked = device->lock(host.page(2 * i), kPage, &reason);
      for (int round = 0; round < 50; ++round) {
        const char byte = static_cast<char>('a' + round % 26);
        fake.write(streams[i], pool.page(2 * i), byte, kPage);
        const EventRef written = device->record(streams[i]);
        const EventRef out = device->copy(Direction::kToHost, {one(host, 2 * i, pool, 2 * i)}, {written});
        const EventRef in = device->copy(Direction::kToDevice, {one(pool, 2 * i + 1, host, 2 * i)}, {out});
        device->wait(streams[i], in);
        fake.check(streams[i], pool.page(2 * i + 1), std::string(kPage, byte));
        device->synchronize(device->record(streams[i]));
        if (!device->done(out) || host.page(2 * i)[0] != byte) ++wrong;
      }
      if (locked) device->unlock(host.page(2 * i));
      if (!locked) ++wrong;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(device->stats().batches == 2 * 50 * static_cast<int>(kThreads));
  device.reset();
  check_clean(fake, device);
}
