// A test's hands on the stand-in for libcuda.so.1 (fake_cuda/controls.cpp says what each function does).
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

struct StandIn {
  // As new: not while a device is open.
  explicit StandIn(const char* path = LONGLIVE_FAKE_CUDA) : library(dlopen(path, RTLD_NOW)) {
    if (library == nullptr) {
      std::fprintf(stderr, "%s\n", dlerror());
      std::exit(1);
    }
    function<void()>("fake_reset")();
  }

  std::uintptr_t stream(unsigned flags = 1) { return function<std::uintptr_t(unsigned)>("fake_stream")(flags); }
  int write(std::uintptr_t on, void* to, int byte, std::size_t bytes) {
    return function<int(std::uintptr_t, void*, int, std::size_t)>("fake_launch_write")(on, to, byte, bytes);
  }
  int copy(std::uintptr_t on, void* to, const void* from, std::size_t bytes) {
    return function<int(std::uintptr_t, void*, const void*, std::size_t)>("fake_launch_copy")(on, to, from, bytes);
  }
  int check(std::uintptr_t on, const void* from, const std::string& expected) {
    return function<int(std::uintptr_t, const void*, const void*, std::size_t)>("fake_launch_check")(
        on, from, expected.data(), expected.size());
  }
  std::int64_t run(std::int64_t steps = -1, std::int64_t seed = -1) {
    return function<std::int64_t(std::int64_t, std::int64_t)>("fake_run")(steps, seed);
  }
  std::int64_t pending(std::int64_t on = -1) { return function<std::int64_t(std::int64_t)>("fake_pending")(on); }
  std::int64_t touching(const void* memory, std::size_t bytes) {
    return function<std::int64_t(const void*, std::size_t)>("fake_touching")(memory, bytes);
  }
  std::string violations() { return function<const char*()>("fake_violations")(); }
  std::int64_t count(const char* name) { return function<std::int64_t(const char*)>("fake_count")(name); }
  void set(const char* name, std::int64_t value) {
    if (function<int(const char*, std::int64_t)>("fake_set")(name, value) == 0) return;
    std::fprintf(stderr, "the stand-in has no option %s\n", name);
    std::exit(1);
  }
  void hold(std::uintptr_t on, bool held) { function<void(std::uintptr_t, int)>("fake_hold")(on, held ? 1 : 0); }
  std::int64_t capture(std::uintptr_t on, bool begin) {
    return function<std::int64_t(std::uintptr_t, int)>("fake_capture")(on, begin ? 1 : 0);
  }
  void allocation(const void* memory, std::size_t bytes) {
    function<void(const void*, std::size_t)>("fake_allocation")(memory, bytes);
  }

 private:
  template <typename Signature>
  Signature* function(const char* name) {
    void* found = dlsym(library, name);
    if (found == nullptr) {
      std::fprintf(stderr, "the stand-in has no %s\n", name);
      std::exit(1);
    }
    return reinterpret_cast<Signature*>(found);
  }
  void* library;
};
