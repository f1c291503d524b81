#!/usr/bin/env bash
# The C++ tests under sanitizers, each kind in a build folder of its own: build/sanitize-KIND.
#
#   csrc/tests/sanitize.sh [KIND...]     address,undefined and thread unless named; needs cmake, ninja, GCC or Clang
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- address,undefined thread
export ASAN_OPTIONS=abort_on_error=0:strict_string_checks=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
for kind; do
  build=build/sanitize-${kind//,/-}
  began=$SECONDS
  flags="-fsanitize=$kind -fno-sanitize-recover=all -fno-omit-frame-pointer"
  cmake -S . -B "$build" -G Ninja -DLONGLIVE_PYTHON=OFF -DLONGLIVE_TESTS=ON -DCMAKE_BUILD_TYPE=Sanitize \
    -DCMAKE_CXX_FLAGS="$flags" -DCMAKE_CXX_FLAGS_SANITIZE='-O1 -g' >/dev/null

  # A program that does nothing shows what this machine lets the sanitizer do.
  mkdir -p "$build/probe"
  echo 'int main() {}' >"$build/probe/probe.cpp"
  # shellcheck disable=SC2086
  "${CXX:-c++}" $flags "$build/probe/probe.cpp" -o "$build/probe/probe"
  run=() note=
  if ! "$build/probe/probe" 2>/dev/null; then
    if ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0 "$build/probe/probe" 2>/dev/null; then
      export ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0
      note=', leaks not looked for (ptrace is not allowed here)'
    elif setarch -R "$build/probe/probe" 2>/dev/null; then
      run=(setarch -R) # addresses are spread wider than an older thread sanitizer knows
    else
      echo "sanitize: $kind does not work on this machine:" >&2
      "$build/probe/probe" >&2 || exit 1
    fi
  fi

  cmake --build "$build" >"$build/log" 2>&1 || { tail -n 40 "$build/log"; exit 1; }
  (cd "$build" && "${run[@]}" ctest --output-on-failure --no-tests=error) >>"$build/log" 2>&1 ||
    { grep -vE ' Passed |^ *Start ' "$build/log" | tail -n 120; exit 1; }
  echo "sanitize: $kind: $(grep 'tests passed' "$build/log") ($((SECONDS - began)) s$note)"
done
