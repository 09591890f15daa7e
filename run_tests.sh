#!/usr/bin/env bash
# Install the packages for the tests and run them: bash run_tests.sh [pytest arguments]
cd "$(dirname "$0")"
. ./setup_env.sh requirements-dev.txt

# The web page, fast_inference.py, is also tested in a real browser. If there is none, this script installs one as root on
# Debian or Ubuntu; on other systems, or if that fails, the browser test is skipped.
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
# The client libraries that the server is tested with; a test whose client cannot be installed is skipped.
python bench/clients.py --install_only &
ruff check .
mypy # 40 seconds the first time; what it has seen it keeps in .mypy_cache
wait
# Two test workers with one core each are faster than two that compete for all cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
exec python -m pytest "$@"
