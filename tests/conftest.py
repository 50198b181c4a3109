"""Fixtures of the whole session: a small data folder, one Ray cluster, one S3 server on loopback."""

import os
import tempfile

# Before Ray is imported anywhere: it reads these once.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.5",
    RAY_DEDUP_LOGS="0",
    OMP_NUM_THREADS="1",
    WANDB_SILENT="true",
)
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers.checkpoints import Runs  # noqa: E402
from helpers.data import make_data  # noqa: E402
from helpers.processes import free_port  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """About 250 rows of 32 tokens in several shards and two parts."""
    return make_data(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture(scope="session")
def runs(data_folder, tmp_path_factory):
    """Return the runs that tests only read; `runs / "block8"` is one."""
    return Runs(data_folder, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def ray_session(s3):
    """The one Ray cluster of a test run. Its workers know the S3 server by the environment that they inherit."""
    import ray

    port, gcs_port = free_port(), free_port()
    # Its processes know it by its address, whatever other cluster runs on the machine; commands that a test starts have
    # their own.
    known = {"RAY_GCS_SERVER_PORT": str(gcs_port), "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{gcs_port}"}
    os.environ |= known
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths have a limit of 107 characters
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=port,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=folder,
    )
    for name in known:
        del os.environ[name]
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A bucket `bucket` of an S3 server on loopback; the environment names the endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    import boto3

    boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"], region_name="us-east-1").create_bucket(
        Bucket="bucket"
    )
    yield "s3://bucket"
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    server.stop()
