"""examples/triton_client/classify.py against a server that speaks the protocol, serves what `write_model` wrote and
runs it in ONNX Runtime. It is a stand-in, written from the protocol's documentation; test_triton_real.py has no such.
"""

import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from chains import basics, reference

from rd_deploy.common import run_command
from rd_deploy.export.files import describe
from rd_deploy.export.onnx import to_onnx
from rd_deploy.preprocessing import Preprocessing
from rd_deploy.serving.triton_server import write_model

WHY = "the client library: pip install 'tritonclient[grpc,http]'"
pytest.importorskip("tritonclient.http", reason=WHY)
pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason=WHY)
Image = pytest.importorskip("PIL.Image")
from google.protobuf import json_format, text_format

SOURCE = Path(__file__).parents[2] / "examples" / "triton_client" / "classify.py"
CLASSES = ("a\ncat", "a \x1b[31mdog", 'the "third"', "née ü", "no utf-8: \udcff")
PRINTED = ("a cat", "a  [31mdog", 'the "third"', "née ü", "no utf-8:  ")
MAX_BATCH = 3


def chain(channels: int):
    preprocessing = Preprocessing(12, 14, channels, (0.4,) * channels, (0.3,) * channels)
    return replace(basics(channels=channels, classes=len(CLASSES)), classes=CLASSES, preprocessing=preprocessing)


CHAINS = {"colour": chain(3), "grey": chain(1)}


class Server(ThreadingHTTPServer):
    """Serves a model repository as documented in the server's docs/protocol.

    ``not_ready``: a model that failed. ``whole``: answers have all their bytes. ``change``: of a configuration.
    """

    def __init__(self, repository: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repository, self.live, self.not_ready, self.whole = repository, True, None, True
        self.batches = []
        self.change = lambda config: None

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def config(self, name: str) -> dict:
        """As JSON: 64-bit numbers as strings, names as in the schema."""
        text = (self.repository / name / "config.pbtxt").read_text(encoding="ascii")
        message = text_format.Parse(text, pb2.ModelConfig())
        config = json_format.MessageToDict(message, preserving_proto_field_name=True)
        self.change(config)
        return config


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        model = re.fullmatch(r"/v2/models/([^/]+)/(ready|config)", self.path)
        if self.path == "/v2/health/live":
            self.answer(200 if self.server.live else 400)
        elif model is None or not self.ready(model[1]):
            self.answer(400, {"error": "Request for unknown model"})
        else:
            self.answer(200, self.server.config(model[1]) if model[2] == "config" else None)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        model = re.fullmatch(r"/v2/models/([^/]+)/infer", self.path)
        try:
            self.infer(model[1], body)
        except AssertionError as error:
            self.answer(400, {"error": f"not the protocol: {error}"})

    def ready(self, name: str) -> bool:
        return name != self.server.not_ready and (self.server.repository / name / "config.pbtxt").is_file()

    def infer(self, name: str, body: bytes) -> None:
        length, config = int(self.headers["Inference-Header-Content-Length"]), self.server.config(name)
        request, data = json.loads(body[:length]), body[length:]
        (tensor,), (wanted,), (known,) = request["inputs"], request["outputs"], config["input"]
        assert (tensor["name"], tensor["datatype"]) == (known["name"], "FP32")
        assert tensor["shape"][1:] == [int(size) for size in known["dims"]]
        assert tensor["parameters"]["binary_data_size"] == len(data) == 4 * np.prod(tensor["shape"])
        assert wanted == {"name": config["output"][0]["name"], "parameters": {"binary_data": True}}
        assert 1 <= tensor["shape"][0] <= config["max_batch_size"]
        self.server.batches.append(tensor["shape"][0])
        session = onnxruntime.InferenceSession(self.server.repository / name / "1" / "model.onnx")
        images = np.frombuffer(data, "<f4").reshape(tensor["shape"])
        (logits,) = session.run([wanted["name"]], {tensor["name"]: images})
        binary = logits.astype("<f4").tobytes()[: None if self.server.whole else -8]
        output = {"name": wanted["name"], "datatype": "FP32", "shape": list(logits.shape)}
        output["parameters"] = {"binary_data_size": len(binary)}
        self.answer(200, {"model_name": name, "model_version": "1", "outputs": [output]}, binary)

    def answer(self, code: int, values: dict | None = None, binary: bytes = b"") -> None:
        header = b"" if values is None else json.dumps(values).encode()
        self.send_response(code)
        if binary:
            self.send_header("Inference-Header-Content-Length", str(len(header)))
        self.send_header("Content-Length", str(len(header + binary)))
        self.end_headers()
        self.wfile.write(header + binary)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("server") / "models"
    for name, network in CHAINS.items():
        content = to_onnx(network).SerializeToString()
        sidecar = describe("x.onnx", content, network, "fp32", None, {}, ["numpy"])
        write_model(folder, name, content, sidecar, engine=False, batches=(1, MAX_BATCH, MAX_BATCH))
    return folder


@pytest.fixture
def server(repository):
    with Server(repository) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def classify():
    spec = importlib.util.spec_from_file_location("classify", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["classify"] = module  # where its dataclass looks for its own module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["classify"]


@pytest.fixture
def run(classify, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        code = run_command("classify", lambda: classify.command([*map(str, arguments)]))
        return code, *capsys.readouterr()

    return run


def images(folder: Path, count: int, mode: str = "RGB") -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)).convert(mode).save(path)
    return paths


def expected(name: str, path: Path) -> np.ndarray:
    """Softmax of the logits in float64, without ONNX and without the server."""
    network = CHAINS[name]
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB" if name == "colour" else "L")).reshape(image.height, image.width, -1)
    powers = np.exp(reference(network, network.preprocessing.apply(pixels))[0])
    return powers / powers.sum()


@pytest.mark.parametrize(("name", "mode"), [("colour", "RGB"), ("colour", "L"), ("grey", "RGB"), ("grey", "L")])
def test_it_prints_the_classes_that_the_network_finds(run, server, tmp_path, name, mode):
    paths = images(tmp_path, 7, mode)
    code, out, err = run(name, *paths, "--url", server.url, "--top", 3)
    assert (code, err) == (0, "")
    assert server.batches == [3, 3, 1]
    lines = out.splitlines()
    assert lines[::4] == [str(path) for path in paths]
    for index, path in enumerate(paths):
        truth = expected(name, path)
        found = [line[2:].partition("  ") for line in lines[4 * index + 1 : 4 * index + 4]]
        assert [label for _, _, label in found] == [PRINTED[number] for number in np.argsort(-truth)[:3]]
        np.testing.assert_allclose([float(share) for share, _, _ in found], np.sort(truth)[:-4:-1], atol=1e-3)


def test_as_a_program(server, tmp_path):
    (path,) = images(tmp_path, 1)
    ran = subprocess.run(
        [sys.executable, SOURCE, "colour", path, "--url", server.url], capture_output=True, text=True, encoding="utf-8"
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert len(lines) == 1 + len(CLASSES)
    assert sum(float(line.split()[0]) for line in lines[1:]) == pytest.approx(1, abs=1e-3)


def refuses(result: tuple[int, str, str], reason: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("classify: error: ")
    assert err.count("\n") == 1
    assert re.search(reason, err), err


def test_no_server(run, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{unused.getsockname()[1]}"
    (path,) = images(tmp_path, 1)
    refuses(run("colour", path, "--url", url), f"no server answers at {url} .*; start it, or name another with --url")
    for wrong in (f"http://{url}", "localhost", "localhost:port", ":8000", "localhost:65536", f"{url}/v2"):
        refuses(run("colour", path, "--url", wrong), f"--url must be HOST:PORT, not {wrong}")


def test_something_else_answers(run, server, tmp_path):
    server.live = False
    refuses(run("colour", *images(tmp_path, 1), "--url", server.url), "is no Triton Inference Server, or is not live")


def test_the_model_is_absent_or_not_ready(run, server, tmp_path):
    (path,) = images(tmp_path, 1)
    refuses(run("other", path, "--url", server.url), "model other is not ready")
    server.not_ready = "grey"
    refuses(run("grey", path, "--url", server.url), "model grey is not ready")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("parameters"),
        lambda config: config["parameters"].pop("preprocessing"),
        lambda config: config["parameters"].pop("classes"),
        lambda config: config["parameters"]["classes"].update(string_value="["),
        lambda config: config["parameters"]["classes"].update(string_value="{}"),
        lambda config: config.update(output=[]),
        lambda config: config.update(max_batch_size=0),
        lambda config: config.update(parameters=[]),
    ],
)
def test_a_model_of_others(run, server, tmp_path, change):
    server.change = change
    refuses(run("colour", *images(tmp_path, 1), "--url", server.url), "model colour was not made by rd-export")


def test_other_classes_than_logits(run, server, tmp_path):
    server.change = lambda config: config["parameters"]["classes"].update(string_value='["one"]')
    refuses(run("colour", *images(tmp_path, 1), "--url", server.url), "gives no logits for 1 classes")
    server.change, server.whole = lambda config: None, False
    refuses(run("colour", *images(tmp_path, 1), "--url", server.url), "gives no logits for 5 classes")


def test_the_server_refuses(run, server, tmp_path):
    server.change = lambda config: config["input"][0].update(dims=["3", "13", "12"])
    refuses(run("colour", *images(tmp_path, 1), "--url", server.url), "fails: .*not the protocol")


def test_bad_images_and_arguments(run, server, tmp_path):
    (path,) = images(tmp_path, 1)
    (tmp_path / "a.png").write_bytes(b"PNG?")
    refuses(run("colour", tmp_path / "gone.png", "--url", server.url), "gone.png does not exist")
    refuses(run("colour", path, tmp_path / "a.png", "--url", server.url), r"a\.png cannot be decoded")
    refuses(run("colour", path, "--url", server.url, "--top", 0), "--top must be at least 1")
