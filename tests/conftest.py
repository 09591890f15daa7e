"""What holds for every test."""

import os

import pytest


@pytest.fixture(autouse=True)
def same_environment():
    """Give the next test the environment variables that this one found: libraries set some (accelerate, DeepSpeed)."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
