// The device without a GPU, and how copies become runs.
#include <string>
#include <vector>

#include "bank/copy_runs.h"
#include "bank/device.h"
#include "test_case.h"

using namespace longlive::bank;

namespace {

std::uintptr_t address(const void* memory) { return reinterpret_cast<std::uintptr_t>(memory); }

bool same(const std::vector<Copy>& got, const std::vector<Copy>& wanted) {
  if (got.size() != wanted.size()) return false;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (got[i].to != wanted[i].to || got[i].from != wanted[i].from || got[i].bytes != wanted[i].bytes) return false;
  }
  return true;
}

}  // namespace

TEST_CASE(neighbours_on_both_sides_join) {
  CHECK(same(join_copies({{100, 500, 10}, {110, 510, 5}, {115, 515, 1}}, nullptr, nullptr), {{100, 500, 16}}));
  // Contiguous on one side only, or in the other order: no.
  CHECK(same(join_copies({{100, 500, 10}, {110, 600, 5}}, nullptr, nullptr), {{100, 500, 10}, {110, 600, 5}}));
  CHECK(same(join_copies({{100, 500, 10}, {200, 510, 5}}, nullptr, nullptr), {{100, 500, 10}, {200, 510, 5}}));
  CHECK(same(join_copies({{110, 510, 5}, {100, 500, 10}}, nullptr, nullptr), {{110, 510, 5}, {100, 500, 10}}));
  CHECK(same(join_copies({{100, 500, 0}, {7, 9, 3}, {10, 12, 0}}, nullptr, nullptr), {{7, 9, 3}}));
  CHECK(join_copies({}, nullptr, nullptr).empty());
}

TEST_CASE(seams_that_may_not_be_joined_stay) {
  const MayJoin not_at_110 = [](std::uintptr_t seam) { return seam != 110; };
  const std::vector<Copy> copies = {{100, 500, 10}, {110, 510, 10}, {120, 520, 10}};
  CHECK(same(join_copies(copies, not_at_110, nullptr), {{100, 500, 10}, {110, 510, 20}}));
  CHECK(same(join_copies(copies, nullptr, not_at_110), {{100, 500, 30}}));
}

TEST_CASE(copies_are_cut_where_a_registration_ends) {
  const std::vector<std::uintptr_t> cuts = {500, 510, 520, 600};
  CHECK(same(split_copies({{100, 500, 30}}, cuts, &Copy::from), {{100, 500, 10}, {110, 510, 10}, {120, 520, 10}}));
  CHECK(same(split_copies({{100, 490, 15}}, cuts, &Copy::from), {{100, 490, 10}, {110, 500, 5}}));
  CHECK(same(split_copies({{510, 100, 10}}, cuts, &Copy::to), {{510, 100, 10}}));
  CHECK(same(split_copies({{505, 100, 10}}, cuts, &Copy::to), {{505, 100, 5}, {510, 105, 5}}));
  CHECK(same(split_copies({{100, 500, 30}}, {}, &Copy::from), {{100, 500, 30}}));
}

TEST_CASE(copies_are_done_when_the_call_returns) {
  const std::unique_ptr<Device> device = make_host_device();
  std::vector<char> from(64, 'a'), to(64, '-');
  const EventRef after = device->record(0);
  device->wait(7, after);
  const std::vector<Copy> copies = {{address(&to[0]), address(&from[0]), 16},
                                    {address(&to[16]), address(&from[16]), 16},
                                    {address(&to[40]), address(&from[0]), 8}};
  const EventRef point = device->copy(Direction::kToHost, copies, {after});
  CHECK(std::string(&to[0], 32) == std::string(32, 'a'));
  CHECK(std::string(&to[32], 32) == "--------aaaaaaaa----------------");
  CHECK(device->done(point));
  device->synchronize(point);
  device->copy_on(3, {{address(&to[60]), address(&from[0]), 4}});
  CHECK(to[59] == '-' && to[60] == 'a' && to[63] == 'a');
  const DeviceStats stats = device->stats();
  CHECK(stats.copies == 3);
  CHECK(stats.batches == 0 && stats.copy_loops == 0 && stats.copy_loop_reason.empty());
}

TEST_CASE(nothing_is_locked_or_captured) {
  const std::unique_ptr<Device> device = make_host_device();
  char memory[16];
  std::string reason;
  CHECK(!device->lock(memory, sizeof memory, &reason));
  CHECK(!reason.empty());
  device->unlock(memory);
  CHECK(!device->capturing(0));
}
