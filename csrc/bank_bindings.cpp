// The memory bank in Python, as numbers and addresses; the typed face is longlive_rag_ops/bank.
#include "bank_bindings.h"

#include <cerrno>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bank/bank.h"
#include "bank/crc32c.h"
#include "python_ints.h"

namespace py = pybind11;

namespace longlive {
namespace {

using namespace bank;  // NOLINT: the names of one header

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();

std::vector<Frame> to_frames(const py::handle& values) {
  std::vector<Frame> frames;
  for (const py::handle value : py::iter(values)) frames.push_back(to_int64(value, "frame"));
  return frames;
}

// A tuple or list of `count` integers.
std::vector<py::object> to_items(const py::handle& value, const std::string& name, std::size_t count,
                                 const char* what) {
  std::vector<py::object> items;
  if (py::isinstance<py::sequence>(value)) {
    for (const py::handle item : py::iter(value)) items.push_back(py::reinterpret_borrow<py::object>(item));
  }
  if (items.size() != count) {
    throw std::invalid_argument(name + " must be " + what + ", got " + std::string(py::repr(value)));
  }
  return items;
}

std::vector<Segment> to_segments(const py::handle& values) {
  std::vector<Segment> segments;
  for (const py::handle value : py::iter(values)) {
    const std::string name = "segments[" + std::to_string(segments.size()) + "]";
    const auto items = to_items(value, name, 2, "(offset, bytes)");
    segments.push_back({to_int64(items[0], name + "[0]"), to_int64(items[1], name + "[1]")});
  }
  return segments;
}

SlotGeometry to_slots(const py::handle& values, const py::handle& first, const py::handle& count) {
  SlotGeometry slots;
  const std::int64_t most = std::numeric_limits<Slot>::max();
  slots.first = static_cast<Slot>(to_int64(first, "first_slot", 0, most));
  slots.count = static_cast<Slot>(to_int64(count, "slot_count", 0, most - slots.first));
  for (const py::handle value : py::iter(values)) {
    const std::string name = "slots[" + std::to_string(slots.parts.size()) + "]";
    const auto items = to_items(value, name, 4, "(base, layer_stride, sample_stride, slot_stride)");
    slots.parts.push_back({to_address(items[0], name + "[0]"), to_int64(items[1], name + "[1]"),
                           to_int64(items[2], name + "[2]"), to_int64(items[3], name + "[3]")});
  }
  return slots;
}

std::vector<PageSource> to_pages(const py::handle& values) {
  std::vector<PageSource> pages;
  for (const py::handle value : py::iter(values)) {
    const std::string name = "pages[" + std::to_string(pages.size()) + "]";
    PageSource source;
    for (const py::handle part : py::iter(value)) {
      const std::string part_name = name + "[" + std::to_string(source.parts.size()) + "]";
      const auto items = to_items(part, part_name, 3, "(base, layer_stride, sample_stride)");
      source.parts.push_back({to_address(items[0], part_name + "[0]"), to_int64(items[1], part_name + "[1]"),
                              to_int64(items[2], part_name + "[2]")});
    }
    pages.push_back(std::move(source));
  }
  return pages;
}

std::unique_ptr<Bank> make_bank(const py::object& layers, const py::object& samples, const py::object& page_bytes,
                                const py::object& segments, const py::object& slots, const py::object& first_slot,
                                const py::object& slot_count, const py::object& host_bytes,
                                const py::object& slab_bytes, bool lock, const py::object& disk_bytes,
                                const py::object& shard_bytes, const std::string& spill, bool direct_io,
                                const py::object& io_threads, const py::object& bounce_records,
                                const py::object& commit_records, const std::string& device,
                                const py::object& ordinal, const std::string& driver) {
  BankOptions options;
  options.layout.layers = to_int64(layers, "layers");
  options.layout.samples = to_int64(samples, "samples");
  options.layout.page_bytes = to_int64(page_bytes, "page_bytes");
  options.layout.segments = to_segments(segments);
  options.slots = to_slots(slots, first_slot, slot_count);
  options.host.limit_bytes = to_int64(host_bytes, "host_bytes", 0, kMost);
  options.host.slab_bytes = to_int64(slab_bytes, "slab_bytes", 1, kMost);
  options.host.lock = lock;
  options.disk.limit_bytes = to_int64(disk_bytes, "disk_bytes", 0, kMost);
  options.disk.shard_bytes = to_int64(shard_bytes, "shard_bytes", 1, kMost);
  options.disk.folder = spill;
  options.disk.direct = direct_io;
  options.io_threads = static_cast<int>(to_int64(io_threads, "io_threads", 1, 64));
  options.bounce_records = to_int64(bounce_records, "bounce_records", 0, kMost);
  options.commit_records = to_int64(commit_records, "commit_records", 1, kMost);
  if (options.disk.limit_bytes > 0 && spill.empty()) {
    throw std::invalid_argument("spill must name a folder when disk_bytes > 0, got ''");
  }
  const auto number = static_cast<int>(to_int64(ordinal, "ordinal", 0, std::numeric_limits<int>::max()));
  if (device != "cpu" && device != "cuda") {
    throw std::invalid_argument("device must be 'cpu' or 'cuda', got '" + device + "'");
  }
  const py::gil_scoped_release unlocked;
  return std::make_unique<Bank>(options, device == "cuda" ? make_cuda_device(number, driver) : make_host_device());
}

py::dict to_dict(const BankStats& stats) {
  py::dict host;
  host["capacity"] = stats.host.capacity;
  host["used"] = stats.host.used;
  host["reserved_bytes"] = stats.host.reserved_bytes;
  host["locked_bytes"] = stats.host.locked_bytes;
  host["pageable_slabs"] = stats.host.pageable_slabs;
  host["pageable_reason"] = stats.host.pageable_reason;
  host["refusal"] = stats.host.refusal;
  py::dict disk;
  disk["capacity"] = stats.disk.capacity;
  disk["used"] = stats.disk.used;
  disk["reserved_bytes"] = stats.disk.reserved_bytes;
  disk["read_bytes"] = stats.disk.read_bytes;
  disk["written_bytes"] = stats.disk.written_bytes;
  disk["buffered_shards"] = stats.disk.buffered_shards;
  disk["buffered_reason"] = stats.disk.buffered_reason;
  disk["refusal"] = stats.disk.refusal;
  py::dict device;
  device["copies"] = stats.device.copies;
  device["batches"] = stats.device.batches;
  device["copy_loops"] = stats.device.copy_loops;
  device["copy_loop_reason"] = stats.device.copy_loop_reason;
  py::dict all;
  const std::pair<const char*, std::int64_t> counts[] = {
      {"frames", stats.frames},
      {"device_frames", stats.device_frames},
      {"host_frames", stats.host_frames},
      {"disk_frames", stats.disk_frames},
      {"hits_device", stats.hits_device},
      {"hits_host", stats.hits_host},
      {"hits_disk", stats.hits_disk},
      {"misses", stats.misses},
      {"stored_bytes", stats.stored_bytes},
      {"fetched_bytes", stats.fetched_bytes},
      {"stall_us", stats.stall_us},
      {"late_layers", stats.late_layers},
      {"evictions", stats.evictions},
      {"host_drops", stats.host_drops},
      {"spilled", stats.spilled},
      {"failed_spills", stats.failed_spills},
      {"damaged_pages", stats.damaged_pages},
      {"replaced", stats.replaced},
      {"dropped_fetches", stats.dropped_fetches},
  };
  for (const auto& [name, count] : counts) all[name] = count;
  all["host"] = host;
  all["disk"] = disk;
  all["device"] = device;
  return all;
}

// Calls `call` without the interpreter lock: it may wait, or copy.
template <typename Call>
auto unlocked(Call call) {
  const py::gil_scoped_release release;
  return call();
}

}  // namespace

void bind_bank(py::module_& m) {
  py::register_exception<BankFull>(m, "BankFull", PyExc_RuntimeError);
  py::register_exception<Damaged>(m, "Damaged", PyExc_RuntimeError);
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const IoError& error) {
      const py::object value =
          py::reinterpret_borrow<py::object>(PyExc_OSError)(error.code == 0 ? EIO : error.code, error.what());
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), value.ptr());
    } catch (const std::out_of_range& error) {
      PyErr_SetString(PyExc_KeyError, error.what());
    }
  });

  m.def(
      "crc32c",
      [](const py::object& address, const py::object& bytes, const py::object& crc) {
        const std::uintptr_t from = to_address(address, "address");
        const std::int64_t count = to_int64(bytes, "bytes", 0, kMost);
        const auto before = static_cast<std::uint32_t>(to_int64(crc, "crc", 0, 0xffffffffLL));
        return unlocked(
            [&] { return crc32c(reinterpret_cast<const void*>(from), static_cast<std::size_t>(count), before); });
      },
      "CRC-32C of memory; crc is the checksum of what came before it.", py::arg("address"), py::arg("bytes"),
      py::arg("crc") = 0);

  py::class_<Bank>(m, "Bank")
      .def(py::init(&make_bank), py::kw_only(), py::arg("layers"), py::arg("samples"), py::arg("page_bytes"),
           py::arg("segments"), py::arg("slots") = py::tuple(), py::arg("first_slot") = 0, py::arg("slot_count") = 0,
           py::arg("host_bytes"), py::arg("slab_bytes") = std::int64_t{256} << 20, py::arg("lock") = true,
           py::arg("disk_bytes") = 0, py::arg("shard_bytes") = std::int64_t{1} << 30, py::arg("spill") = "",
           py::arg("direct_io") = true, py::arg("io_threads") = 8, py::arg("bounce_records") = 0,
           py::arg("commit_records") = 1, py::arg("device") = "cpu", py::arg("ordinal") = 0, py::arg("driver") = "")
      .def(
          "commit",
          [](Bank& bank, const py::object& frames, const py::object& pages, const py::object& stream, bool replace) {
            const std::vector<Frame> wanted = to_frames(frames);
            const std::vector<PageSource> sources = to_pages(pages);
            const Stream on = to_address(stream, "stream");
            unlocked([&] { bank.commit(wanted, sources, on, replace); });
          },
          py::arg("frames"), py::arg("pages"), py::arg("stream") = 0, py::arg("replace") = false)
      .def(
          "insert",
          [](Bank& bank, const py::object& frame, const py::object& address, const py::object& generation) {
            const Frame wanted = to_int64(frame, "frame");
            const std::uintptr_t from = to_address(address, "address");
            const std::int64_t number = to_int64(generation, "generation");
            unlocked([&] { bank.insert(wanted, reinterpret_cast<const std::byte*>(from), number); });
          },
          py::arg("frame"), py::arg("address"), py::arg("generation") = 0)
      .def(
          "read",
          [](Bank& bank, const py::object& frame, const py::object& address) {
            const Frame wanted = to_int64(frame, "frame");
            const std::uintptr_t to = to_address(address, "address");
            unlocked([&] { bank.read(wanted, reinterpret_cast<std::byte*>(to)); });
          },
          py::arg("frame"), py::arg("address"))
      .def(
          "prefetch",
          [](Bank& bank, const py::object& frames, const py::object& stream) {
            const std::vector<Frame> wanted = to_frames(frames);
            const Stream on = to_address(stream, "stream");
            unlocked([&] { bank.prefetch(wanted, on); });
          },
          py::arg("frames"), py::arg("stream") = 0)
      .def("settle",
           [](Bank& bank) {
             py::list result;
             for (const Lost& lost : unlocked([&] { return bank.settle(); })) {
               result.append(py::make_tuple(lost.frame, lost.reason));
             }
             return result;
           })
      .def(
          "wait",
          [](Bank& bank, const py::object& layer, const py::object& stream, bool fetched_only) {
            const std::int64_t number = to_int64(layer, "layer");
            const Stream on = to_address(stream, "stream");
            unlocked([&] { bank.wait(number, on, fetched_only); });
          },
          py::arg("layer"), py::arg("stream") = 0, py::arg("fetched_only") = false)
      .def(
          "release",
          [](Bank& bank, const py::object& frames, const py::object& stream) {
            const std::vector<Frame> wanted = to_frames(frames);
            const Stream on = to_address(stream, "stream");
            unlocked([&] { bank.release(wanted, on); });
          },
          py::arg("frames"), py::arg("stream") = 0)
      .def(
          "forget",
          [](Bank& bank, const py::object& frames) {
            const std::vector<Frame> wanted = to_frames(frames);
            unlocked([&] { bank.forget(wanted); });
          },
          py::arg("frames"))
      .def("clear", [](Bank& bank) { unlocked([&] { bank.clear(); }); })
      .def("room", [](const Bank& bank) { return unlocked([&] { return bank.room(); }); })
      .def(
          "where",
          [](const Bank& bank, const py::object& frame) {
            const Frame wanted = to_int64(frame, "frame");
            const Where where = unlocked([&] { return bank.where(wanted); });
            return py::make_tuple(where.slot, where.host, where.disk, where.generation);
          },
          py::arg("frame"))
      .def("frames",
           [](const Bank& bank) {
             py::list result;
             for (const Frame frame : unlocked([&] { return bank.frames(); })) result.append(frame);
             return result;
           })
      .def("flush", [](Bank& bank) { unlocked([&] { bank.flush(); }); })
      .def("stats", [](const Bank& bank) { return to_dict(unlocked([&] { return bank.stats(); })); })
      .def("close", [](Bank& bank) { unlocked([&] { bank.close(); }); })
      .def_property_readonly("closed", [](const Bank& bank) { return unlocked([&] { return bank.closed(); }); });
}

}  // namespace longlive
