#!/usr/bin/env bash
# Install the packages for the tests and run them: bash run_tests.sh [pytest arguments]
cd "$(dirname "$0")"
. ./setup_env.sh requirements-dev.txt

# The web page, fast_inference.py, is also tested in a real browser, and --compile and the kernels need a C++ compiler. If one of
# them is missing, this script installs it as root on Debian or Ubuntu.
set_up_programs() {
    local missing="" log=.venv/apt-get.log
    command -v chromedriver > /dev/null && command -v chromium > /dev/null || missing="chromium chromium-driver"
    command -v "${CXX:-g++}" > /dev/null || missing="$missing g++"
    [ -z "$missing" ] && return
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        echo "== installing" $missing
        {
            apt-get update &&
                DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $missing
        } > $log 2>&1 < /dev/null && return
        echo "== apt-get failed: $(tail -n 1 $log)"
    fi
    echo "== missing:" $missing "(Debian, Ubuntu: apt-get install): without a browser its test is skipped, without a compiler some fail"
}
set_up_programs
# The client libraries that the server is tested with; a test whose client cannot be installed is skipped.
python bench/clients.py --install_only &
trap "kill $! 2> /dev/null || true" EXIT
ruff check .
mypy # 40 seconds the first time; what it has seen it keeps in .mypy_cache
wait
# Two test workers with one core each are faster than two that compete for all cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
exec python -m pytest "$@"
