"""Classify image files on a Triton Inference Server that serves a model of ``rd-export --triton-server``.

    python examples/triton_client/classify.py MODEL IMAGE... [--url localhost:8000] [--top 5]

What has to happen to an image, and the names of the classes, come from the server: no file of the model is needed here.
Needs the toolkit (`pip install .`), `pip install 'tritonclient[http]' pillow`, and no torch.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

try:
    import tritonclient.http as triton
    from geventhttpclient.response import HTTPParseError
    from PIL import Image
    from tritonclient.utils import InferenceServerException
except ImportError as error:
    sys.exit(f"classify: error: {error}; pip install 'tritonclient[http]' pillow")

from rd_deploy.common import UserError, check_file, run_command
from rd_deploy.preprocessing import MAX_PIXELS, Preprocessing

# A server that refuses, is absent, or is something else.
TROUBLE = (InferenceServerException, OSError, HTTPParseError)
# Images in one request: 32 of 3x224x224 are 19 MB, and servers take 64 MB unless they are started otherwise.
REQUEST = 32


@dataclass(frozen=True)
class Model:
    """What the server says about a model of ours; ``batch``: images per request."""

    name: str
    images: str
    logits: str
    preprocessing: Preprocessing
    classes: list[str]
    batch: int


def connect(url: str, model: str) -> triton.InferenceServerClient:
    """A client of a server that is ready to run the model."""
    host, _, port = url.rpartition(":")
    if not host or "/" in url or not (port.isdecimal() and int(port) < 1 << 16):
        raise UserError(f"--url must be HOST:PORT, not {url}")
    advice = "start it, or name another with --url HOST:PORT"
    try:
        client = triton.InferenceServerClient(url)
        live = client.is_server_live()
    except TROUBLE as error:
        raise UserError(f"no server answers at {url} ({error}); {advice}") from error
    if not live:
        raise UserError(f"what answers at {url} is no Triton Inference Server, or is not live yet; {advice}")
    if not client.is_model_ready(model):
        raise UserError(
            f"model {model} is not ready on {url}; curl {url}/v2/models/{model} or the server's log says why"
        )
    return client


def read_model(client: triton.InferenceServerClient, name: str) -> Model:
    """The model's tensors, preprocessing and classes from its configuration."""
    config = client.get_model_config(name)
    try:
        parameters = {key: entry["string_value"] for key, entry in config["parameters"].items()}
        preprocessing = Preprocessing.from_dict(json.loads(parameters["preprocessing"]))
        classes = json.loads(parameters["classes"])
        images, logits = config["input"][0]["name"], config["output"][0]["name"]
        batch = min(int(config["max_batch_size"]), REQUEST)
        if batch < 1 or not isinstance(classes, list):
            raise ValueError("batch or classes")
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"model {name} was not made by rd-export --triton-server ({error!r} in its config)") from error
    return Model(name, images, logits, preprocessing, classes, batch)


def read_image(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """A file as the network wants it: float32 (1, C, size, size)."""
    check_file(path, "image")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"image {path} is larger than {MAX_PIXELS:,} pixels; shrink it")
            pixels = np.asarray(image.convert("L" if preprocessing.channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be decoded ({error}); is it an image?") from error
    return preprocessing.apply(pixels.reshape(*pixels.shape[:2], -1))


def infer(client: triton.InferenceServerClient, model: Model, images: np.ndarray) -> np.ndarray:
    """Logits (N, classes) of images (N, C, H, W) in one request; both travel as binary data, not as JSON."""
    tensor = triton.InferInput(model.images, list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, binary_data=True)
    wanted = triton.InferRequestedOutput(model.logits, binary_data=True)
    try:
        logits = client.infer(model.name, [tensor], outputs=[wanted]).as_numpy(model.logits)
    except ValueError:  # fewer bytes than their shape says
        logits = None
    if logits is None or logits.shape != (len(images), len(model.classes)):
        raise UserError(f"model {model.name} gives no logits for {len(model.classes)} classes; export it again")
    return logits


def shares(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def printable(name: str) -> str:
    """A class name for one line of a terminal, which would obey some characters."""
    return "".join(sign if sign.isprintable() else " " for sign in name)


def command(arguments: list[str]) -> None:
    """Print the likeliest classes of each image."""
    parser = argparse.ArgumentParser(description="Classify images on a Triton Inference Server.")
    parser.add_argument("model", help="its name on the server: the folder in the model repository")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--url", default="localhost:8000", help="HTTP address (default: %(default)s)")
    parser.add_argument("--top", type=int, default=5, help="classes to print per image (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise UserError(f"--top must be at least 1, not {options.top}")
    try:
        client = connect(options.url, options.model)
        model = read_model(client, options.model)
        for start in range(0, len(options.images), model.batch):
            paths = options.images[start : start + model.batch]
            images = np.concatenate([read_image(path, model.preprocessing) for path in paths])
            for path, row in zip(paths, shares(infer(client, model, images)), strict=True):
                print(path)
                for index in np.argsort(-row, kind="stable")[: options.top]:
                    print(f"  {row[index]:.4f}  {printable(model.classes[index])}")
    except TROUBLE as error:
        raise UserError(f"the server at {options.url} fails: {error}; see its log") from error


if __name__ == "__main__":
    sys.exit(run_command("classify", lambda: command(sys.argv[1:])))
