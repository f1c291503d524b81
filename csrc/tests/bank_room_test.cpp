// Tests of what a full bank still takes: new generations of any frame, and records that come free while it looks.
#include "tests/bank_case.h"

namespace {

// Copies at once, but says so only at the second look at a point.
class HesitantDevice final : public Device {
 public:
  EventRef record(Stream) override { return std::make_shared<Point>(); }
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
  bool done(const EventRef& event) override { return ++static_cast<Point&>(*event).looks > looks; }
  void synchronize(const EventRef&) override {}
  bool capturing(Stream) override { return false; }
  bool lock(void*, std::size_t, std::string*) override { return false; }
  void unlock(void*) noexcept override {}
  DeviceStats stats() const override { return {}; }
  int looks = 1;

 private:
  struct Point final : Event {
    int looks = 0;
  };
};

}  // namespace

// Between the look for a record and the look for what to wait for, the device may finish: there is room then.
TEST_CASE(copies_that_end_while_a_record_is_looked_for) {
  for (int looks = 1; looks <= 12; ++looks) {
    Rig rig(1, 2, 2, 1, 1);
    auto device = std::make_unique<HesitantDevice>();
    device->looks = looks;
    rig.open(std::move(device));
    for (Frame frame = 0; frame < 3; ++frame) rig.commit({frame});
    for (int i = 0; i < 6; ++i) {
      rig.bank->prefetch({i % 3}, 0);
      CHECK(rig.bank->settle().empty());
      rig.bank->release({i % 3}, 0);
      rig.commit({(i + 1) % 3}, i + 1, true);
      rig.bank->forget({(i + 2) % 3});
      const Bytes record = record_of((i + 2) % 3);
      rig.bank->insert((i + 2) % 3, reinterpret_cast<const std::byte*>(record.data()), 0);
      CHECK(rig.has((i + 2) % 3) && rig.has((i + 1) % 3, i + 1));
    }
  }
}

// Whatever tier the old pages are in.
TEST_CASE(a_full_bank_replaces_any_frames) {
  for (const std::int64_t disk : {1, 2, 3, 7}) {
    for (const std::int64_t commit : {1, 2, 3}) {
      for (const std::int64_t bounce : {0, 1, 4}) {
        Rig rig(bounce > 0 ? 4 : 0, 4 + commit, disk, bounce, commit);
        rig.open();
        Frame frames = 0;
        while (rig.bank->room() > 0) rig.commit({frames++});
        rig.bank->flush();
        CHECK(frames >= 4 + commit - std::max(bounce, commit) + disk);
        for (Frame first = 0; first + commit <= frames; ++first) {
          std::vector<Frame> some;
          for (Frame frame = first; frame < first + commit; ++frame) some.push_back(frame);
          rig.commit(some, first + 1, true);
          for (const Frame frame : some) CHECK(rig.has(frame, first + 1));
        }
        CHECK(rig.bank->frames().size() == static_cast<std::size_t>(frames) && rig.bank->room() == 0);
        if (bounce == 0) continue;
        for (Frame frame = 0; frame < frames; ++frame) {  // and fetches any frame beside
          rig.bank->prefetch({frame}, 0);
          CHECK(rig.bank->settle().empty());
          rig.bank->release({frame}, 0);
        }
      }
    }
  }
}
