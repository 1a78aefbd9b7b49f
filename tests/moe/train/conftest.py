"""Runs set signal handlers; every test gives them back."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(autouse=True)
def _keep_signal_handlers():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
