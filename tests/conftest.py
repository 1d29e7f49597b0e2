"""Fixtures that every test may ask for."""

import pytest

from serve_app.fetch import fetch_demo, silent


@pytest.fixture(scope="session")
def demo_folder():
    """The demo model, fetched once into the user's cache: about a minute and 1.4 GB the first time, nothing after."""
    return fetch_demo(silent)
