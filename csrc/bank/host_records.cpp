#include "bank/host_records.h"

#include <algorithm>

#include "bank/device_slots.h"

namespace longlive::bank {

HostRecords::HostRecords(Device& device, const ArenaOptions& options) : device_(device), arena_(device, options) {}

void HostRecords::choose_free(Choice& choice, std::int64_t count, bool idle) {
  choice.fresh = std::min(count, std::max<std::int64_t>(0, free_count()));
  for (Record& record : loose) {
    if (choice.size() >= count) return;
    if (record.users == 0 && (!idle || quiet(record))) choice.loose.push_back(&record);
  }
}

void HostRecords::take_fresh(std::int64_t count, std::vector<Record*>& taken) {
  for (; count > 0; --count) {
    List fresh(1);
    std::byte* memory = arena_.allocate();
    if (memory == nullptr) return;
    fresh.front().memory = memory;
    fresh.front().self = fresh.begin();
    taken.push_back(&fresh.front());
    loose.splice(loose.end(), fresh);
  }
}

HostRecords::List& HostRecords::list(Record::Place place) {
  return place == Record::Place::kOnly ? only : place == Record::Place::kBoth ? both : loose;
}

void HostRecords::move(Record& record, Record::Place place) noexcept {
  List& to = list(place);
  to.splice(to.end(), list(record.place), record.self);
  record.place = place;
}

// What was spilled before was used before, mostly: the search begins at the end.
void HostRecords::move_by_use(Record& record) noexcept {
  auto before = both.end();
  while (before != both.begin() && std::prev(before)->used > record.used) --before;
  both.splice(before, list(record.place), record.self);
  record.place = Record::Place::kBoth;
}

void HostRecords::touch(Record& record) noexcept {
  record.used = ++uses_;
  if (record.place != Record::Place::kLoose) move(record, record.place);
}

void HostRecords::watch(Direction direction, std::list<Points>& points) noexcept {
  auto& watched = direction == Direction::kToHost ? to_host_ : to_device_;
  watched.splice(watched.end(), points);
}

void HostRecords::drop_reached() noexcept {
  for (std::list<Points>* watched : {&to_host_, &to_device_}) {
    while (!watched->empty() && passed(watched->front())) watched->pop_front();
  }
}

bool HostRecords::passed(Points& points) noexcept {
  if (!points) return true;
  // The copies keep their order.
  if (!points->empty()) {
    if (!reached(device_, points->back())) return false;
    points->clear();
  }
  points.reset();
  ++arrivals_;
  return true;
}

bool HostRecords::stored(Record& record) noexcept { return passed(record.written); }
bool HostRecords::fetched(Record& record) noexcept { return passed(record.fetched); }
bool HostRecords::quiet(Record& record) noexcept { return stored(record) && fetched(record); }

void HostRecords::reap() noexcept {
  for (auto record = loose.begin(); record != loose.end();) {
    const auto next = std::next(record);
    if (record->users == 0 && quiet(*record)) {
      arena_.free(record->memory);
      loose.erase(record);
    }
    record = next;
  }
}

}  // namespace longlive::bank
