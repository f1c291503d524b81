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

void HostRecords::move_by_use(Record& record) noexcept {
  auto before = both.begin();
  while (before != both.end() && before->used < record.used) ++before;
  both.splice(before, list(record.place), record.self);
  record.place = Record::Place::kBoth;
}

void HostRecords::touch(Record& record) noexcept {
  record.used = ++uses_;
  if (record.place != Record::Place::kLoose) move(record, record.place);
}

bool HostRecords::stored(Record& record) noexcept {
  if (!record.written) return true;
  // The layers are copied in order.
  EventRef last = record.written->empty() ? nullptr : record.written->back();
  if (!reached(device_, last)) return false;
  record.written.reset();
  return true;
}

bool HostRecords::quiet(Record& record) noexcept { return stored(record) && reached(device_, record.fetched); }

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
