// insert(): a frame enters the bank from host memory.
#include <algorithm>
#include <cstring>

#include "bank/bank_state.h"

namespace longlive::bank {

void Bank::State::insert(Frame frame, const std::byte* bytes, std::int64_t generation) {
  if (bytes == nullptr) throw std::invalid_argument("record must not be null");
  if (generation < 0) throw std::invalid_argument("generation must be >= 0, got " + std::to_string(generation));
  Turn turn(*this);
  const auto check = [&] {
    check_presence({frame}, false);
    if (room() < 1) throw BankFull("cannot insert frame " + std::to_string(frame) + ": the bank is full");
  };
  std::vector<Record*> taken;
  for (;;) {
    repair();
    check();
    tend();
    HostRecords::Choice choice;
    if (records->ready(1)) choice = records->choose(1, true, [](const Record& record) { return !record.owner->fetch; });
    if (choice.size() == 1) {
      taken = records->take(choice, [&](Record& record) {
        record.owner->host = nullptr;
        ++counts.host_drops;
      });
      if (!taken.empty()) break;
    }
    make_room(turn.lock, 1, true, "insert");
  }
  Record& record = *taken.front();
  ++working;
  turn.lock.unlock();
  const PageLayout& layout = options.layout;
  std::memcpy(record.memory, bytes, static_cast<std::size_t>(layout.record_bytes()));
  zero_gaps(layout, record.memory, 0, layout.pages());
  turn.lock.lock();
  --record.users;
  --working;
  ++changes;
  changed.notify_all();
  std::map<Frame, Entry> fresh;
  try {
    check_open();
    check();
    fresh[frame].frame = frame;
  } catch (...) {
    tend();
    throw;
  }
  Entry& entry = fresh.begin()->second;
  entry.generation = generation;
  entry.host = &record;
  record.owner = &entry;
  record.used = 0;
  records->move(record, Record::Place::kOnly);
  records->touch(record);
  frames.merge(fresh);
  spill_ahead(true);
}

}  // namespace longlive::bank
