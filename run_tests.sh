#!/usr/bin/env bash
# Set up what the tests need and run them: bash run_tests.sh [pytest arguments]
cd "$(dirname "$0")"
. ./setup_env.sh requirements-dev.txt
ruff check .
# Tests measure correctness, not speed: two workers with a core each beat two that fight for both.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
exec python -m pytest "$@"
