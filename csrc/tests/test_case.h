// Test cases without a framework: TEST_CASE(name) { CHECK(...); }. `PROGRAM NAME` runs one case, without a name all of
// them. The checks work in release builds, too. Include it in one source of a program: it defines main.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace {

struct Case {
  const char* name;
  void (*run)();
};
std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

[[noreturn]] void fail(int line, const std::string& what, const char* file = "") {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  std::exit(1);
}

#define TEST_CASE(name)                        \
  static void name();                          \
  static const Register register_##name(#name, name); \
  static void name()
#define CHECK(condition) \
  do {                   \
    if (!(condition)) fail(__LINE__, "failed: " #condition, __FILE__); \
  } while (false)
// The call throws `type` with a message that contains `text`.
#define CHECK_THROWS(type, text, call) check_throws<type>(__LINE__, __FILE__, #call, text, [&] { (void)(call); })

template <typename Error>
void check_throws(int line, const char* file, const char* call, const std::string& text, const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    if (std::string(error.what()).find(text) == std::string::npos) {
      fail(line, std::string(call) + ": the message lacks '" + text + "': " + error.what(), file);
    }
    return;
  }
  fail(line, std::string(call) + " did not throw", file);
}

}  // namespace

int main(int argc, char** argv) {
  int ran = 0;
  for (const Case& test : cases()) {
    if (argc > 1 && std::strcmp(argv[1], test.name) != 0) continue;
    test.run();
    std::printf("%s: ok\n", test.name);
    ++ran;
  }
  if (ran == 0) fail(__LINE__, "no such case", __FILE__);
  return 0;
}
