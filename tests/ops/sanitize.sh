#!/usr/bin/env bash
# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree; needs GCC and CMake.
#     PYTHON=python tests/ops/sanitize.sh
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root/CMakeLists.txt" "$root/pyproject.toml" "$root/mambakit" "$root/tests" "$copy"
rm -f "$copy"/mambakit/ops/_backends/libmambakit_native.*
cmake -S "$copy" -B "$copy/build" -DMAMBAKIT_SANITIZE=ON -DCMAKE_CXX_COMPILER=g++ >/dev/null
cmake --build "$copy/build" --parallel >/dev/null
cmake --install "$copy/build" --prefix "$copy" >/dev/null
cd "$copy"
# An installed mambakit, an editable one above all, would be imported in the place of this copy.
"${PYTHON:-python}" -c "import mambakit, os, sys; sys.exit(not os.path.samefile(os.path.dirname(mambakit.__file__), 'mambakit'))" ||
  { echo "another mambakit is installed for ${PYTHON:-python}; uninstall it first"; exit 1; }
# Python itself is not instrumented: the sanitizer is preloaded, and its leaks are not ours.
LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "${PYTHON:-python}" -m pytest -q -p no:cacheprovider tests/ops/*/test_cpu.py tests/ops/_backends/test_native.py tests/ops/linear --deselect tests/ops/_backends/test_native.py::test_a_forked_child_computes "$@"
