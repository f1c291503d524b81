// The Python module longlive_rag_ops._C. pybind11 stays in the *bindings.cpp; the typed face of what is bound here is
// longlive_rag_ops/slot_table.py.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bank_bindings.h"
#include "build_config.h"
#include "python_ints.h"
#include "slot_table.h"
#if LONGLIVE_CUDA
#include "cuda_info.h"
#endif

namespace py = pybind11;
using longlive::SlotTable;
using longlive::to_int64;

namespace {

std::int64_t to_frame(py::handle value) { return to_int64(value, "frame"); }

std::vector<SlotTable::Frame> to_frames(const py::iterable& values) {
  std::vector<SlotTable::Frame> frames;
  for (const py::handle value : values) frames.push_back(to_frame(value));
  return frames;
}

py::tuple to_tuple(const SlotTable::Acquired& acquired) {
  const py::object evicted = acquired.evicted ? py::object(py::int_(*acquired.evicted)) : py::none();
  return py::make_tuple(acquired.slot, acquired.is_new, evicted);
}

py::object text_or_none(const std::string& text) { return text.empty() ? py::object(py::none()) : py::str(text); }

py::dict build_info() {
  py::dict info;
  info["version"] = LONGLIVE_VERSION;
  info["compiler"] = LONGLIVE_COMPILER;
  info["build_type"] = LONGLIVE_BUILD_TYPE;
  info["cxx_standard"] = __cplusplus;
  info["python"] = std::to_string(PY_MAJOR_VERSION) + "." + std::to_string(PY_MINOR_VERSION);
  info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  info["cuda"] = bool(LONGLIVE_CUDA);
  info["cuda_reason"] = text_or_none(LONGLIVE_CUDA_REASON);
  info["cuda_archs"] = text_or_none(LONGLIVE_CUDA_ARCHS);
  return info;
}

#if LONGLIVE_CUDA
py::object cuda_build_info() {
  const longlive::CudaBuildInfo found = longlive::cuda_build_info();
  py::list devices;
  for (const longlive::CudaDevice& device : found.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["image"] = device.image;
    entry["image_error"] = text_or_none(device.image_error);
    devices.append(entry);
  }
  py::dict info;
  info["toolkit"] = found.toolkit;
  info["archs"] = LONGLIVE_CUDA_ARCHS;
  info["driver"] = text_or_none(found.driver);
  info["device_count"] = found.device_count;
  info["error"] = text_or_none(found.error);
  info["devices"] = devices;
  return std::move(info);
}
#else
py::object cuda_build_info() { return py::none(); }
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ core of longlive_rag_ops; import it through longlive_rag_ops.slot_table and longlive_rag_ops.build_info.";
  m.attr("__version__") = LONGLIVE_VERSION;
  m.def("build_info", &build_info, "What this module was built from: compilers, CUDA compiled or not and why.");
  m.def("cuda_build_info", &cuda_build_info,
        "Toolkit, architectures, driver and devices as the compiled CUDA code sees them; None when there is none.");

  py::class_<SlotTable>(m, "SlotTable")
      .def(py::init([](const py::object& capacity, const py::object& first) {
             return SlotTable(to_int64(capacity, "capacity"), to_int64(first, "first"));
           }),
           py::arg("capacity"), py::arg("first") = 0)
      .def("acquire", [](SlotTable& table, const py::object& frame) { return to_tuple(table.acquire(to_frame(frame))); })
      .def("acquire_many",
           [](SlotTable& table, const py::iterable& frames) {
             py::list result;
             const std::vector<SlotTable::Frame> wanted = to_frames(frames);  // runs Python code: before any change
             for (const SlotTable::Acquired& acquired : table.acquire_many(wanted)) result.append(to_tuple(acquired));
             return result;
           })
      .def("lookup", [](const SlotTable& table, const py::object& frame) { return table.lookup(to_frame(frame)); })
      .def("touch", [](SlotTable& table, const py::object& frame) { return table.touch(to_frame(frame)); })
      .def("pin", [](SlotTable& table, const py::object& frame) { return table.pin(to_frame(frame)); })
      .def("unpin", [](SlotTable& table, const py::object& frame) { return table.unpin(to_frame(frame)); })
      .def("pins", [](const SlotTable& table, const py::object& frame) { return table.pins(to_frame(frame)); })
      .def("release", [](SlotTable& table, const py::object& frame) { return table.release(to_frame(frame)); })
      .def("clear", &SlotTable::clear)
      .def("grow", [](SlotTable& table, const py::object& capacity) { table.grow(to_int64(capacity, "new_capacity")); })
      .def("frames",
           [](const SlotTable& table) {
             py::list result;
             for (const SlotTable::Frame frame : table.frames()) result.append(frame);
             return result;
           })
      .def_property_readonly("size", &SlotTable::size)
      .def_property_readonly("capacity", &SlotTable::capacity)
      .def_property_readonly("first", &SlotTable::first);

  longlive::bind_bank(m);
}
