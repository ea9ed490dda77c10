"""A real Triton Inference Server serves what `write_model` writes. Slow and large, so only where one is:
RD_TRITON_SERVER names its folder, /opt/tritonserver in NVIDIA's image, with ``bin/`` and ``backends/onnxruntime``.
"""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

FOLDER = os.environ.get("RD_TRITON_SERVER")
if not FOLDER:
    pytest.skip("RD_TRITON_SERVER names no folder of a Triton Inference Server", allow_module_level=True)
triton = pytest.importorskip("tritonclient.http", reason="the client library: pip install 'tritonclient[grpc,http]'")
from test_triton_client import CHAINS, PRINTED, classify, expected, images, run  # noqa: F401  (two are fixtures)

from rd_deploy.export.files import describe
from rd_deploy.export.onnx import to_onnx
from rd_deploy.serving.triton_server import write_model

PATIENCE = 60  # seconds that a server may take to be ready
MAX_BATCH = 4


def export(repository: Path, network) -> str:
    """Write a model of the name "net"; returns the hash of its file."""
    content = to_onnx(network).SerializeToString()
    sidecar = describe("net.onnx", content, network, "fp32", None, {}, ["numpy"])
    write_model(repository, "net", content, sidecar, engine=False, batches=(1, MAX_BATCH, MAX_BATCH))
    return sidecar["sha256"]


def ready(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"http://{url}/v2/models/net/ready", timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def served(url: str) -> str:
    """The hash of the file that the server says it serves."""
    config = json.load(urllib.request.urlopen(f"http://{url}/v2/models/net/config"))
    return config["parameters"]["sha256"]["string_value"]


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@contextmanager
def serving(repository: Path, *options: str) -> Iterator[str]:
    """A server of the repository, ready: its HOST:PORT."""
    url = f"127.0.0.1:{free_port()}"
    host, _, port = url.partition(":")
    arguments = [f"{FOLDER}/bin/tritonserver", f"--model-repository={repository}"]
    arguments += [f"--backend-directory={FOLDER}/backends", f"--http-address={host}", f"--http-port={port}"]
    arguments += ["--allow-grpc=false", "--allow-metrics=false", "--exit-timeout-secs=1", *options]
    with (repository.parent / "log").open("w") as log, subprocess.Popen(arguments, stdout=log, stderr=log) as process:
        try:
            wait(lambda: ready(url) or process.poll() is not None)
            assert process.poll() is None, (repository.parent / "log").read_text()
            yield url
        finally:
            process.terminate()


def wait(done) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, "the server takes too long"
        time.sleep(0.05)


def test_a_server_loads_runs_and_reloads(tmp_path, run):  # noqa: F811
    repository, network = tmp_path / "models", CHAINS["colour"]
    first = export(repository, network)
    with serving(repository, "--model-control-mode=explicit", "--load-model=net") as url:
        assert served(url) == first
        paths = images(tmp_path, 6)
        code, out, err = run("net", *paths, "--url", url, "--top", 1)
        assert (code, err) == (0, "")
        assert out.splitlines()[::2] == [str(path) for path in paths]
        for path, line in zip(paths, out.splitlines()[1::2], strict=True):
            truth = expected("colour", path)
            share, _, label = line[2:].partition("  ")
            assert label == PRINTED[int(truth.argmax())]
            assert float(share) == pytest.approx(truth.max(), abs=1e-3)
        check_labels_and_batches(url, network)
        second = export(repository, replace(network, classes=network.classes[::-1]))
        assert first != second
        assert served(url) == first
        urllib.request.urlopen(f"http://{url}/v2/repository/models/net/load", data=b"")
        assert served(url) == second


def check_labels_and_batches(url: str, network) -> None:
    """The server's own classification gives a line of labels.txt; a batch may be as large as was configured."""
    client = triton.InferenceServerClient(url)
    wanted = triton.InferRequestedOutput("logits", class_count=len(network.classes))

    def classify_zeros(batch: int) -> np.ndarray:
        tensor = triton.InferInput("images", [batch, *network.input_shape], "FP32")
        tensor.set_data_from_numpy(np.zeros((batch, *network.input_shape), np.float32))
        return client.infer("net", [tensor], outputs=[wanted]).as_numpy("logits")

    found = dict(text.decode().split(":", 2)[1:] for text in classify_zeros(MAX_BATCH)[0])
    assert found == {"0": "a cat", "1": "a \x1b[31mdog", "2": 'the "third"', "3": "née ü", "4": "no utf-8: ?"}
    with pytest.raises(Exception, match="batch-size must be <= 4"):
        classify_zeros(MAX_BATCH + 1)


def test_a_server_that_polls_never_loses_the_model(tmp_path):
    repository = tmp_path / "models"
    export(repository, CHAINS["colour"])
    with serving(repository, "--model-control-mode=poll", "--repository-poll-secs=1") as url:
        for turn in range(20):
            classes = tuple(f"{turn} {index}" for index in range(len(PRINTED)))
            newest = export(repository, replace(CHAINS["colour"], classes=classes))
            for _ in range(20):
                assert ready(url)
                time.sleep(0.01)
        wait(lambda: served(url) == newest)
