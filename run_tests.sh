#!/usr/bin/env bash
# Set up what the tests need and run them: bash run_tests.sh [pytest arguments]
cd "$(dirname "$0")"
. ./setup_env.sh requirements-dev.txt

# The page fast_inference.py is also tested in a real browser. As root on Debian or Ubuntu one is installed if there is
# none; everywhere else, and if that fails, the browser test is skipped.
set_up_browser() {
    command -v chromedriver > /dev/null && command -v chromium > /dev/null && return
    local packages="chromium chromium-driver" log=.venv/apt-get.log
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        echo "== installing $packages for the browser test"
        {
            apt-get update &&
                DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $packages
        } > $log 2>&1 < /dev/null && return
        echo "== apt-get failed ($(tail -n 1 $log)): the browser test will be skipped"
    else
        echo "== no chromium with chromedriver: the browser test will be skipped (Debian, Ubuntu: apt-get install $packages)"
    fi
}
set_up_browser
ruff check .
# Tests measure correctness, not speed: two workers with a core each beat two that fight for both.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
exec python -m pytest "$@"
