"""Fixtures of several test files."""

import mlx.core as mx
import moefuse
import pytest


@pytest.fixture
def on_cpu():
    """The CPU as default device."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture
def patched():
    """patch() that comes off at the end of the test."""
    models = []

    def apply(model, *args, **kwargs):
        models.append(model)
        return moefuse.patch(model, *args, **kwargs)

    yield apply
    for model in models:
        moefuse.unpatch(model)
