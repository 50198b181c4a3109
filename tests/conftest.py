"""What tests share: small real data folders, one Ray cluster, one S3 server on loopback."""

import json
import os
import socket
import sys
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

torch.set_num_threads(1)

SENTENCE = "the model reads a row and writes what it has not seen because every token may be masked or kept as chance will have it"
WORDS = SENTENCE.split()


def make_documents(count=60, seed=0):
    """English-like documents with structure to learn: sentences that walk through WORDS."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for number in range(count):
        length = int(torch.randint(20, 160, (1,), generator=generator))
        start = int(torch.randint(0, len(WORDS), (1,), generator=generator))
        texts.append(f"Document {number}: " + " ".join(WORDS[(start + i) % len(WORDS)] for i in range(length)) + ".\n")
    return texts


def make_data(
    folder,
    *,
    sequence_length=32,
    documents=None,
    held_out=0.2,
    sequences_per_shard=64,
    vocab=300,
    tokenizer=None,
    parts=2,
):
    """A data folder by the same per-part functions that the Ray build calls, in this process."""
    from dlm_ray.data import build, sources
    from dlm_ray.data.tokenizer import identity, load_tokenizer, train_tokenizer

    documents = documents or make_documents()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or train_tokenizer(documents, vocab)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    own = identity(load_tokenizer(str(folder / "tokenizer")))
    settings = build.Settings(own.sha256, sequence_length, held_out, "text", sequences_per_shard)
    results = []
    for number in range(parts):
        source = folder.parent / f"{folder.name}-{number}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[number::parts]))
        piece = sources.Piece(str(source), "jsonl", 0, source.stat().st_size, source.stat().st_size)
        results.append(
            build.build_part(sources.SourceChunk(number, (piece,)), str(folder / "tokenizer"), settings, str(folder))
        )
    build.write_index(str(folder), results, sequence_length, own, {"settings": {}, "inputs": []})
    return str(folder)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """About 250 rows of 32 tokens in several shards and two parts."""
    return make_data(tmp_path_factory.mktemp("data") / "small")


def tiny_recipe(data, name="tiny", **changes):
    """A recipe of a network that trains in a second; `changes` are dotted keys with __ for the dot."""
    from dlm_ray.config.load import set_key, validate

    tree = {
        "name": name,
        "model": {
            "architecture": {
                "family": "llama",
                "width": 32,
                "num_layers": 2,
                "num_heads": 2,
                "max_positions": 64,
                "tie_embeddings": True,
            }
        },
        "data": {"sources": [{"path": data}], "window_shards": 2},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "training": {"steps": 8, "global_batch_size": 12, "micro_batch_size": 6},
        "validation": {"every_steps": 4, "sequences": 6},
        "checkpoint": {"every_steps": 4},
        "tracking": {"log_every_steps": 1},
    }
    for key, value in changes.items():
        assert not set_key(tree, f"{key.replace('__', '.')}={json.dumps(value)}")
    return validate(tree, name)


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def ray_session(s3):
    """The one Ray cluster of a test run. Its workers know the S3 server by the environment that they inherit."""
    import ray

    port, gcs_port = free_port(), free_port()
    # Its processes know it by its address, whatever other cluster runs on the machine; commands that a test starts have their own.
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


def python_module(module, *arguments, timeout=120, **environment):
    """Runs `python -m module` as a user would; returns the finished process."""
    import subprocess

    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
