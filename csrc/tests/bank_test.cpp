#include <chrono>
#include <future>
#include <thread>

#include "tests/bank_case.h"
#include "tests/scripted_device.h"

// Commits frames 0 .. count - 1; returns those that only the disk has.
static std::vector<Frame> fill(Rig& rig, Frame count) {
  for (Frame frame = 0; frame < count; frame += 2) rig.commit({frame, frame + 1});
  rig.bank->flush();
  std::vector<Frame> cold;
  for (Frame frame = 0; frame < count; ++frame) {
    const Where where = rig.bank->where(frame);
    if (!where.host && where.slot < 0) cold.push_back(frame);
  }
  return cold;
}

TEST_CASE(stores_copies_and_serves_them) {
  Rig rig(3, 6, 0);
  rig.open();
  rig.commit({0, 1});
  rig.commit({2, 3});
  CHECK(rig.bank->frames() == (std::vector<Frame>{0, 1, 2, 3}));
  for (Frame frame = 0; frame < 4; ++frame) CHECK(rig.has(frame));
  CHECK(rig.in_slot(0) && rig.in_slot(1) && rig.in_slot(2));  // free slots are filled, none is taken away
  CHECK(rig.bank->where(3).slot == -1);
  rig.bank->prefetch({3, 1}, 0);
  CHECK(rig.bank->settle().empty());
  CHECK(rig.in_slot(3) && rig.in_slot(1));
  CHECK(rig.bank->where(0).slot == -1);
  const BankStats stats = rig.bank->stats();
  CHECK(stats.frames == 4 && stats.host_frames == 4 && stats.device_frames == 3 && stats.disk_frames == 0);
  CHECK(stats.hits_device == 1 && stats.hits_host == 1 && stats.evictions == 1);
  CHECK(stats.stored_bytes == 4 * kPages * 1700 && stats.fetched_bytes == kPages * 1700);
}

TEST_CASE(insert_clears_the_gaps) {
  Rig rig(0, 2, 0);
  rig.open();
  Bytes dirty = record_of(5);
  for (std::size_t i = 0; i < dirty.size(); i += kPage) dirty[i + 1500] = dirty[i + 4000] = 9;
  rig.bank->insert(5, reinterpret_cast<const std::byte*>(dirty.data()), 7);
  CHECK(rig.has(5));
  CHECK(rig.bank->where(5).generation == 7);
  CHECK_THROWS(std::invalid_argument, "frame 5 is in the bank already",
               rig.bank->insert(5, reinterpret_cast<const std::byte*>(dirty.data()), 0));
}

TEST_CASE(refuses_what_it_cannot_hold) {
  Rig rig(1, 2, 0);
  rig.options.commit_records = 3;
  CHECK_THROWS(std::invalid_argument, "host_bytes", rig.open());
  rig.options.commit_records = 2;
  rig.open();
  CHECK_THROWS(BankFull, "room for 2", rig.commit({0, 1, 2}));
  CHECK(rig.bank->frames().empty());
  CHECK_THROWS(std::invalid_argument, "named twice", rig.commit({4, 4}));
  CHECK_THROWS(std::invalid_argument, ">= 0", rig.commit({-1}));
  CHECK_THROWS(std::invalid_argument, "cannot replace frame 3", rig.commit({3}, 1, true));
  rig.commit({0, 1});
  CHECK_THROWS(std::invalid_argument, "frame 1 is in the bank", rig.commit({1}));
  CHECK(rig.bank->room() == 0);
  CHECK_THROWS(BankFull, "room for 0", rig.commit({2}));
  rig.commit({1}, 1, true);  // a full bank can be re-cached
  CHECK(rig.has(1, 1) && rig.bank->where(1).generation == 1);
  CHECK_THROWS(std::out_of_range, "frame 9", rig.has(9));
  CHECK_THROWS(std::invalid_argument, "frame 9", rig.bank->forget({0, 9}));
  CHECK(rig.bank->frames().size() == 2);
  CHECK_THROWS(std::invalid_argument, "layer", rig.bank->wait(kLayers, 0));
}

TEST_CASE(pinned_slots_are_full_at_once) {
  Rig rig(2, 6, 0);
  rig.open();
  rig.commit({0, 1, 2});
  rig.bank->prefetch({0, 1}, 0);
  rig.bank->prefetch({1, 50}, 0);
  CHECK_THROWS(BankFull, "slots", rig.bank->prefetch({2}, 0));
  CHECK_THROWS(std::invalid_argument, "pinned 2 time(s)", rig.bank->forget({1}));
  const auto lost = rig.bank->settle();
  CHECK(lost.size() == 1 && lost[0].frame == 50 && lost[0].reason == "missing");
  rig.bank->release({1, 50}, 0);
  CHECK_THROWS(BankFull, "slots", rig.bank->prefetch({2}, 0));
  rig.bank->release({1}, 0);
  rig.bank->prefetch({2}, 0);
  CHECK(rig.in_slot(2) && rig.in_slot(0) && rig.bank->where(1).slot == -1);
  rig.bank->release({1, 1, 77}, 0);  // passed over
  Rig none(0, 2, 0);
  none.open();
  none.commit({0});
  CHECK_THROWS(BankFull, "0 device slots", none.bank->prefetch({0}, 0));
}

TEST_CASE(disk_takes_what_host_memory_cannot) {
  Rig rig(2, 4, 6);
  rig.open();
  CHECK(rig.bank->room() == 8);
  for (Frame frame = 0; frame < 8; frame += 2) rig.commit({frame, frame + 1});
  CHECK(rig.bank->room() == 0);
  CHECK_THROWS(BankFull, "room for 0", rig.commit({8}));
  for (Frame frame = 0; frame < 8; ++frame) CHECK(rig.has(frame));
  for (Frame frame = 0; frame < 8; frame += 2) {
    rig.bank->prefetch({frame, frame + 1}, 0);
    CHECK(rig.bank->settle().empty());
    CHECK(rig.in_slot(frame) && rig.in_slot(frame + 1));
    rig.bank->release({frame, frame + 1}, 0);
  }
  rig.bank->flush();
  const BankStats stats = rig.bank->stats();
  CHECK(stats.spilled >= 6 && stats.host_drops > 0 && stats.hits_disk > 0);
  CHECK(stats.host.used <= 4 && stats.disk.used == stats.disk_frames);
  rig.bank->forget(rig.bank->frames());
  CHECK(rig.bank->stats().host.used == 0 && rig.bank->stats().disk.used == 0 && rig.bank->room() == 8);
}

TEST_CASE(commit_waits_for_a_spill) {
  Rig rig(0, 3, 4, 1, 2);
  rig.open();
  rig.faults->gate(false, true);
  rig.commit({0, 1});
  std::thread opener([&] {
    rig.faults->await(1);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    rig.faults->gate(false, false);
  });
  rig.commit({2, 3});
  opener.join();
  for (Frame frame = 0; frame < 4; ++frame) CHECK(rig.has(frame));
  CHECK(rig.bank->stats().stall_us > 10000);
}

TEST_CASE(damaged_page_drops_the_frame_once) {
  Rig rig(3, 4, 8);
  rig.open();
  const std::vector<Frame> cold = fill(rig, 8);
  const Frame on_disk = cold.at(0);
  rig.faults->flips = 1;
  rig.faults->gate(true, false);
  rig.bank->prefetch({on_disk}, 0);
  rig.bank->prefetch({on_disk}, 0);  // pinned twice
  rig.faults->gate(false, false);
  const auto lost = rig.bank->settle();
  CHECK(lost.size() == 1 && lost[0].frame == on_disk);
  CHECK(lost[0].reason.find("damaged: layer ") == 0);
  CHECK(rig.bank->settle().empty());
  const BankStats stats = rig.bank->stats();
  CHECK(stats.damaged_pages == 1 && stats.frames == 7 && stats.dropped_fetches == 1);
  CHECK(rig.bank->where(on_disk).generation == -1);
  rig.bank->release({on_disk, on_disk}, 0);
  rig.commit({on_disk}, 4);
  CHECK(rig.has(on_disk, 4));
  std::vector<Frame> rest;  // all slots are free to pin again
  for (const Frame frame : rig.bank->frames()) {
    if (rest.size() < 3) rest.push_back(frame);
  }
  rig.bank->prefetch(rest, 0);
  CHECK(rig.bank->settle().empty());
}

TEST_CASE(damage_leaves_no_trace_in_memory) {
  Rig rig(1, 4, 8, 1, 2);
  rig.open();
  std::vector<Frame> cold = fill(rig, 8);
  rig.faults->flip_at = 1500;  // between the segments, where no commit writes
  for (std::size_t i = 0; i < 2; ++i) {
    rig.faults->flips = 1;
    rig.bank->prefetch({cold.at(i)}, 0);
    CHECK(rig.bank->settle().size() == 1);
  }
  rig.commit({20, 21});
  for (const Frame frame : rig.bank->frames()) CHECK(rig.has(frame));
}

TEST_CASE(what_was_read_stays_until_it_is_settled) {
  Rig rig(3, 3, 4, 1, 1);
  rig.open();
  for (Frame frame = 0; frame < 6; ++frame) rig.commit({frame});
  rig.bank->flush();
  rig.bank->prefetch({4, 5}, 0);  // into slots of the first frames
  rig.bank->settle();
  rig.bank->release({4, 5}, 0);
  std::vector<Frame> cold;
  for (Frame frame = 0; frame < 6; ++frame) {
    const Where where = rig.bank->where(frame);
    if (!where.host && where.slot < 0) cold.push_back(frame);
  }
  CHECK(cold.size() >= 2);
  for (const Frame frame : {cold[0], cold[1]}) {  // one record for both, and the disk is full
    rig.bank->prefetch({frame}, 0);
    while (!rig.bank->where(frame).host) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK(rig.bank->settle().empty());
  CHECK(rig.in_slot(cold[0]) && rig.in_slot(cold[1]));
}

TEST_CASE(unreadable_page_is_damage) {
  Rig rig(0, 4, 8);
  rig.open();
  for (Frame frame = 0; frame < 6; frame += 2) rig.commit({frame, frame + 1});
  rig.bank->flush();
  Frame on_disk = -1;
  for (Frame frame = 0; frame < 6; ++frame) {
    if (!rig.bank->where(frame).host) on_disk = frame;
  }
  CHECK(on_disk >= 0);
  rig.faults->read_error = EIO;
  CHECK_THROWS(Damaged, "layer 0, sample 0", rig.has(on_disk));
  CHECK_THROWS(std::out_of_range, "", rig.has(on_disk));
  CHECK(rig.bank->stats().damaged_pages == kPages);
}

TEST_CASE(failing_spills_lose_nothing) {
  Rig rig(0, 4, 8);
  rig.open();
  rig.faults->write_error = ENOSPC;
  rig.commit({0, 1});
  rig.commit({2, 3});
  CHECK_THROWS(BankFull, "", rig.commit({4, 5}));
  rig.bank->flush();
  BankStats stats = rig.bank->stats();
  CHECK(stats.failed_spills >= 3 && stats.disk_frames == 0 && stats.disk.used == 0);
  CHECK(rig.bank->room() == 0);  // nothing on disk, so none is kept for fetches
  for (Frame frame = 0; frame < 4; ++frame) CHECK(rig.has(frame));
  rig.faults->write_error = 0;  // the next commits try one frame each
  rig.bank->forget({0, 1, 2});
  rig.commit({6});
  rig.bank->flush();
  CHECK(rig.bank->room() == 8);
  rig.commit({7, 8});
  rig.commit({9, 10});
  rig.commit({11, 12});
  CHECK(rig.bank->frames().size() == 8);
  for (const Frame frame : rig.bank->frames()) CHECK(rig.has(frame));
}

TEST_CASE(disk_without_space_shrinks) {
  Rig rig(0, 4, 9);
  rig.open();
  rig.commit({0, 1});
  rig.commit({2, 3});
  rig.bank->flush();
  rig.faults->space_error = ENOSPC;
  CHECK(rig.bank->room() == 7);
  Frame next = 4;
  for (; next < 20; ++next) {
    try {
      rig.commit({next});
    } catch (const BankFull&) {
      break;
    }
    rig.bank->flush();
  }
  CHECK(next < 11);
  CHECK(rig.bank->room() <= 0);
  CHECK(rig.bank->stats().disk.capacity < 9);
  for (Frame frame = 0; frame < next; ++frame) CHECK(rig.has(frame));
}

TEST_CASE(replaced_and_forgotten_while_being_read) {
  Rig rig(3, 5, 12, 3, 2);
  rig.open();
  const std::vector<Frame> cold = fill(rig, 12);
  CHECK(cold.size() >= 3);
  rig.faults->gate(true, false);
  rig.bank->prefetch({cold[0], cold[1], cold[2]}, 0);
  rig.bank->release({cold[1]}, 0);
  rig.commit({cold[0]}, 1, true);
  rig.bank->forget({cold[1]});
  rig.faults->gate(false, false);
  const auto lost = rig.bank->settle();
  CHECK(lost.size() == 2);
  CHECK(lost[0].frame == cold[0] && lost[0].reason == "replaced");
  CHECK(lost[1].frame == cold[1] && lost[1].reason == "missing");
  CHECK(rig.in_slot(cold[2]));
  CHECK(rig.has(cold[0], 1) && rig.bank->where(cold[0]).generation == 1);
  CHECK(rig.bank->stats().dropped_fetches == 2);
  rig.bank->flush();
  const BankStats stats = rig.bank->stats();
  CHECK(stats.disk.used == stats.disk_frames && stats.host.used == stats.host_frames);
}

TEST_CASE(replaced_while_spilling) {
  Rig rig(0, 3, 6, 1, 2);
  rig.open();
  rig.faults->gate(false, true);
  rig.commit({0, 1});
  rig.commit({2});
  rig.faults->await(2);
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    rig.faults->gate(false, false);
  });
  rig.commit({0}, 1, true);  // there is no other record: it waits until its own has been written
  opener.join();
  CHECK(rig.bank->where(0).generation == 1);
  rig.bank->flush();
  CHECK(rig.has(0, 1) && rig.has(1) && rig.has(2));
  rig.commit({3, 4});
  rig.commit({5, 6});
  rig.bank->flush();
  CHECK(rig.has(0, 1) && rig.has(1) && rig.has(2));
  CHECK(rig.bank->stats().disk.used == rig.bank->stats().disk_frames);
}

TEST_CASE(device_refuses_in_the_middle_of_a_commit) {
  for (int layer = 0; layer < kLayers; ++layer) {
    std::vector<Source> sources(4);  // outlive what the device has not done yet
    Rig rig(2, 3, 0);
    auto made = std::make_unique<ScriptedDevice>(7u);
    ScriptedDevice* device = made.get();
    rig.open(std::move(made));
    const auto pages = [&](int i) {
      sources[static_cast<std::size_t>(i)].set(record_of(i));
      return std::vector<PageSource>{sources[static_cast<std::size_t>(i)].pages()};
    };
    rig.bank->commit({0}, pages(0), 0, false);
    device->hold(Direction::kToHost, true);
    device->refuse(Direction::kToHost, layer);
    CHECK_THROWS(std::runtime_error, "the device refuses", rig.bank->commit({1}, pages(1), 0, false));
    CHECK(rig.bank->frames() == std::vector<Frame>{0});
    CHECK(rig.bank->room() == 2);
    // What was begun ends before the record is anybody's again.
    rig.bank->commit({2}, pages(2), 0, false);
    device->hold(Direction::kToHost, true);
    rig.bank->commit({3}, pages(3), 0, false);
    CHECK(rig.has(0) && rig.has(2) && rig.has(3));
    CHECK(rig.bank->stats().host.used == 3);
    // Nowhere else to write a new generation: the frame is in no state to be kept.
    device->refuse(Direction::kToHost, layer);
    CHECK_THROWS(std::runtime_error, "the device refuses", rig.bank->commit({2}, pages(1), 0, true));
    CHECK(rig.bank->frames() == (std::vector<Frame>{0, 3}));
    device->refuse(Direction::kToHost, layer);
    CHECK_THROWS(std::runtime_error, "the device refuses", rig.bank->commit({3}, pages(1), 0, true));
    CHECK(rig.has(3) && rig.bank->where(3).generation == 0);  // there was a free record: the old one is whole
  }
}

TEST_CASE(host_does_not_write_where_a_refused_commit_still_does) {
  for (int layer = 0; layer < kLayers; ++layer) {
    Source source;
    source.set(record_of(1));
    Rig rig(0, 1, 0, 0, 1);
    auto made = std::make_unique<ScriptedDevice>(11u);
    ScriptedDevice* device = made.get();
    rig.open(std::move(made));
    device->hold(Direction::kToHost, true);
    device->refuse(Direction::kToHost, layer);
    CHECK_THROWS(std::runtime_error, "the device refuses", rig.bank->commit({1}, {source.pages()}, 0, false));
    const Bytes record = record_of(2);
    rig.bank->insert(2, reinterpret_cast<const std::byte*>(record.data()), 0);
    device->hold(Direction::kToHost, false);
    device->drain();
    CHECK(rig.has(2));
  }
}

TEST_CASE(device_refuses_in_the_middle_of_a_fetch) {
  for (int layer = 0; layer < kLayers; ++layer) {
    std::vector<Source> sources(4);
    Rig rig(2, 4, 0);
    auto made = std::make_unique<ScriptedDevice>(8u);
    ScriptedDevice* device = made.get();
    rig.open(std::move(made));
    std::vector<PageSource> pages;
    for (int i = 0; i < 4; ++i) {
      sources[static_cast<std::size_t>(i)].set(record_of(i));
      pages.push_back(sources[static_cast<std::size_t>(i)].pages());
    }
    rig.bank->commit({0, 1, 2, 3}, pages, 0, false);
    rig.bank->prefetch({0}, 0);
    device->refuse(Direction::kToDevice, layer);
    CHECK_THROWS(std::runtime_error, "the device refuses", rig.bank->prefetch({0, 2}, 0));
    CHECK(rig.bank->where(2).slot == -1 && rig.bank->settle().empty());
    rig.bank->prefetch({0, 3}, 0);
    CHECK_THROWS(BankFull, "slots", rig.bank->prefetch({2}, 0));
    rig.bank->release({0}, 0);
    CHECK_THROWS(BankFull, "slots", rig.bank->prefetch({2}, 0));  // the failed one left no pin, nor took one
    rig.bank->release({0}, 0);
    rig.bank->prefetch({2}, 0);
    rig.bank->flush();
    CHECK(rig.in_slot(2) && rig.in_slot(3));
  }
}

TEST_CASE(copies_wait_for_the_device_not_the_caller) {
  std::vector<Source> sources(4);
  Rig rig(2, 4, 0);
  auto made = std::make_unique<ScriptedDevice>(9u);
  ScriptedDevice* device = made.get();
  rig.open(std::move(made));
  device->hold(Direction::kToHost, true);
  device->hold(Direction::kToDevice, true);
  std::vector<PageSource> pages;
  for (int i = 0; i < 4; ++i) pages.push_back(sources[static_cast<std::size_t>(i)].pages());
  device->compute(5, [&] {
    for (int i = 0; i < 4; ++i) sources[static_cast<std::size_t>(i)].set(record_of(i));
  });
  rig.bank->commit({0, 1, 2, 3}, pages, 5, false);
  rig.bank->prefetch({2, 3}, 5);  // their copies to the host are still to come
  rig.bank->settle();
  for (std::int64_t layer = 0; layer < kLayers; ++layer) rig.bank->wait(layer, 5);
  rig.bank->release({2, 3}, 5);
  rig.bank->forget({3});
  CHECK(device->waits() == 0);
  CHECK(rig.bank->stats().late_layers == kLayers);
  CHECK(rig.bank->stats().host.used == 4);  // what is being copied from counts
  rig.bank->flush();
  CHECK(rig.in_slot(2) && rig.has(0) && rig.has(1) && rig.has(2));
  CHECK(rig.bank->stats().host.used == 3);
}

TEST_CASE(capture_is_refused) {
  Source source;
  Rig rig(2, 2, 0);
  auto made = std::make_unique<ScriptedDevice>(10u);
  ScriptedDevice* device = made.get();
  rig.open(std::move(made));
  device->capture(3, true);
  CHECK_THROWS(std::runtime_error, "captured", rig.bank->commit({0}, {source.pages()}, 3, false));
  CHECK_THROWS(std::runtime_error, "captured", rig.bank->prefetch({0}, 3));
  CHECK_THROWS(std::runtime_error, "captured", rig.bank->wait(0, 3));
  CHECK_THROWS(std::runtime_error, "captured", rig.bank->release({0}, 3));
  CHECK(rig.bank->frames().empty());
  rig.bank->wait(0, 4);
}

TEST_CASE(several_threads_settle) {
  Rig rig(3, 5, 12, 3, 2);
  rig.open();
  std::vector<Frame> cold = fill(rig, 12);
  CHECK(cold.size() >= 3);
  cold.resize(3);
  rig.faults->gate(true, false);
  rig.bank->prefetch(cold, 0);
  std::vector<std::thread> threads;
  std::atomic<int> lost{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      lost += static_cast<int>(rig.bank->settle().size());
      for (const Frame frame : cold) CHECK(rig.in_slot(frame));
    });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  rig.faults->gate(false, false);
  for (std::thread& thread : threads) thread.join();
  CHECK(lost == 0);
}

TEST_CASE(close_while_everything_is_under_way) {
  Rig rig(3, 5, 12, 3, 2);
  rig.open();
  std::vector<Frame> cold = fill(rig, 12);
  cold.resize(3);
  rig.faults->gate(true, true);
  rig.bank->prefetch(cold, 0);
  auto settling = std::async(std::launch::async, [&] { rig.bank->settle(); });
  rig.faults->await(1);
  auto closing = std::async(std::launch::async, [&] { rig.bank->close(); });
  auto again = std::async(std::launch::async, [&] { rig.bank->close(); });
  CHECK_THROWS(std::runtime_error, "closed", settling.get());
  rig.faults->gate(false, false);
  closing.get();
  again.get();
  CHECK(rig.bank->closed());
  CHECK_THROWS(std::runtime_error, "closed", rig.bank->room());
  CHECK_THROWS(std::runtime_error, "closed", rig.bank->stats());
  CHECK_THROWS(std::runtime_error, "closed", rig.bank->settle());
  CHECK_THROWS(std::runtime_error, "closed", rig.commit({99}));
  rig.bank->close();
}

TEST_CASE(clear_drops_pinned_frames) {
  Rig rig(2, 4, 4);
  rig.open();
  rig.commit({0, 1});
  rig.bank->prefetch({0, 1}, 0);
  rig.bank->clear();
  CHECK(rig.bank->frames().empty());
  rig.bank->flush();
  CHECK(rig.bank->stats().host.used == 0 && rig.bank->stats().disk.used == 0 && rig.bank->stats().device_frames == 0);
  CHECK(rig.bank->settle().size() == 2);
  rig.commit({0, 1}, 1);
  rig.bank->prefetch({0, 1}, 0);
  CHECK(rig.in_slot(0, 1) && rig.in_slot(1, 1));
}
