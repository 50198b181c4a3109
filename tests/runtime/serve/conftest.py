"""The service on Ray Serve, started once a session."""

import pytest
from helpers.deployment import Deployment


@pytest.fixture(scope="session")
def deployment(ray_session, runs):
    """Return the service of the session; it stops at the session's end."""
    shared = Deployment(runs)
    yield shared
    shared.stop()
