"""The service on Ray Serve that the tests of one session share."""

from contextlib import suppress

from dlm_ray.config.server import Server
from helpers.processes import free_port


class Deployment:
    """One address; the service there is started, and changed to other settings, when a test asks for it."""

    def __init__(self, runs):
        self.runs = runs
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._running = None

    def settings(self, **parts):
        """Return the settings of one replica with the block model; `parts` replace some of them."""
        defaults = {
            "checkpoint": str(self.runs / "block8"),
            "name": "tiny",
            "engine": {"slots": 32, "batch_invariant": True, "deadline_seconds": 60},
            "limits": {"output_tokens": 200_000},
            "http": {"port": self.port},
            "replicas": {"cpus": 0.2, "drain_seconds": 30},
        }
        return Server.model_validate({**defaults, **parts})

    def use(self, **parts):
        """Start the service with these settings, or change it to them if it runs with others; return its URL."""
        from dlm_ray.runtime.serve import deploy

        settings = self.settings(**parts)
        if self._running is None:
            assert deploy.start(settings) == self.url
        elif self._running != settings:
            assert deploy.replace(settings) == self.url
        self._running = settings
        return self.url

    def stop(self):
        """Stop the service if it runs; it finishes what it has accepted."""
        from ray.serve.exceptions import RayServeException

        from dlm_ray.runtime.serve import deploy

        if self._running is not None:
            self._running = None
            with suppress(RayServeException):
                deploy.stop()


def engines():
    """Return the names of the replicas' actors that are alive."""
    from ray.util import list_named_actors

    return {actor["name"] for actor in list_named_actors(all_namespaces=True) if "#engine#" in actor["name"]}
