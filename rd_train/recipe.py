"""The recipe of a run: one frozen dataclass; presets are YAML files that name what differs from its defaults."""

from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml

from rd_deploy.common import UserError, check_file, nearest

PRESETS = resources.files("rd_train") / "recipes"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run; saved beside it as ``recipe.yaml``.

    Args:
        summary: What the preset is for; shown by --list.
        data: Data set: digits, fashion-mnist, idx, cifar10, cifar100 or folder (of images).
        data_dir: Folder of the data set; not needed for digits, nor for an installed Debian package of Fashion-MNIST.
        download: Let torchvision download the data set into data_dir when it is not there.
        size: Image size in pixels; the data set's own when not given.
        train_limit: Train on this many images of the training split only.
        arch: Network to train, e.g. plain20, plain56, plain50, resnet20.
        shortcuts: Override the shortcuts of arch: all, projection (the released variant of the paper) or none.
        stem: Override the stem of arch: imagenet (7x7/2 and max-pool) or small (3x3).
        width: Multiplier of all widths.
        init: Initialisation of blocks without shortcut: kaiming, or dirac (identity plus noise).
        init_noise: Weight of the Kaiming noise in a Dirac initialisation.
        method: ce (ordinary), kd (logit distillation) or jointrd (residual distillation, the paper's).
        teacher: Teacher network; auto is the ResNet of arch's depth.
        teacher_weights: A model.pt or a torchvision-style state_dict; without it the run trains the teacher first.
        teacher_mode: frozen (pretrained), or joint (trained from scratch beside the student, by its own loss).
        teacher_epochs: Epochs of the teacher that the run trains first; as many as the student's when not given.
        teacher_bn: BN of the spliced teacher stages: eval (running statistics) or batch.
        splice_weight: Weight m of the spliced branches at the start; 0 leaves them out.
        splice_weight_end: Weight m after the window.
        splice_window: Fraction of training over which m falls along a cosine.
        feature_weight: Weight w of the margin-ReLU feature distance; 0 leaves it out.
        feature_reduction: mean over C, H, W (one weight for all sizes) or sum (the paper's: 1e-4 at 224, 1e-3 at 32).
        kd_weight: Weight of the logit distillation against the cross-entropy.
        kd_temperature: Temperature of the logit distillation.
        epochs: Passes over the training split.
        batch_size: Images per step.
        lr: Peak learning rate of SGD with Nesterov momentum.
        momentum: Momentum.
        weight_decay: L2 penalty.
        decay_bn_bias: Apply weight decay to BN parameters and biases too.
        schedule: cosine, or step (times 0.1 at 50% and 75%).
        warmup_epochs: Epochs of linear warm-up; may be fractional.
        label_smoothing: Label smoothing of every cross-entropy.
        clip_norm: Clip the norm of the gradient to this; 0 does not clip.
        ema: Decay of an exponential moving average of the weights, which is then what is evaluated; 0 is none.
        precision: fp32, bf16 (autocast), or auto (bf16 where the hardware multiplies it).
        channels_last: NHWC memory format.
        compile: Compile the step with torch.compile.
        device: cpu, cuda, or auto.
        threads: CPU threads; the available CPUs when not given.
        seed: Seed of initialisation, order and augmentation.
    """

    summary: str = ""
    data: str = "digits"
    data_dir: str | None = None
    download: bool = False
    size: int | None = None
    train_limit: int | None = None
    arch: str = "plain20"
    shortcuts: Literal["all", "projection", "none"] | None = None
    stem: Literal["imagenet", "small"] | None = None
    width: float = 1.0
    init: Literal["kaiming", "dirac"] = "dirac"
    init_noise: float = 0.5
    method: Literal["ce", "kd", "jointrd"] = "jointrd"
    teacher: str = "auto"
    teacher_weights: str | None = None
    teacher_mode: Literal["frozen", "joint"] = "frozen"
    teacher_epochs: int | None = None
    teacher_bn: Literal["eval", "batch"] = "eval"
    splice_weight: float = 1.0
    splice_weight_end: float = 0.5
    splice_window: float = 0.5
    feature_weight: float = 1.0
    feature_reduction: Literal["mean", "sum"] = "mean"
    kd_weight: float = 0.5
    kd_temperature: float = 4.0
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_bn_bias: bool = False
    schedule: Literal["cosine", "step"] = "cosine"
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    ema: float = 0.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = True
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "lr", "kd_temperature", "splice_window", "width")
        optional = ("size", "train_limit", "teacher_epochs", "threads")
        not_negative = (
            *("init_noise", "splice_weight", "splice_weight_end", "feature_weight", "weight_decay"),
            *("warmup_epochs", "clip_norm", "seed"),
        )
        fractions = ("momentum", "ema", "label_smoothing")
        for name in (*positive, *(name for name in optional if getattr(self, name) is not None)):
            _check(getattr(self, name) > 0, name, "must be positive", self)
        for name in not_negative:
            _check(getattr(self, name) >= 0, name, "must not be negative", self)
        for name in fractions:
            _check(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1", self)
        for name in ("kd_weight", "splice_window"):
            _check(0 <= getattr(self, name) <= 1, name, "must be from 0 to 1", self)
        _check(self.batch_size >= 2, "batch_size", "must be at least 2 (BN needs batch statistics)", self)
        _check(self.warmup_epochs < self.epochs, "warmup_epochs", f"must be less than epochs={self.epochs}", self)
        if self.teacher_mode == "joint" and self.method == "kd":
            raise UserError("method=kd needs a frozen teacher; teacher_mode=joint goes with method=jointrd")

    def to_dict(self) -> dict:
        """Plain containers for YAML and the checkpoint."""
        return asdict(self)


def _check(condition: bool, name: str, rule: str, recipe: Recipe) -> None:
    if not condition:
        raise UserError(f"{name}={getattr(recipe, name)} {rule}")


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


def preset_values(name: str) -> dict:
    """The entries of a preset, or of a recipe file if ``name`` ends in .yaml; names are checked, values are not yet."""
    if name.endswith((".yaml", ".yml")):
        return read_values(name)
    if name not in preset_names():
        raise UserError(
            f"unknown preset '{name}'{nearest(name, preset_names())}; or give a recipe file ending in .yaml"
        )
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))


def read_values(path: str | Path) -> dict:
    """The entries of a recipe file; anything but a mapping of known names to scalars is a `UserError`."""
    path = check_file(path, "recipe", max_bytes=1 << 16)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"recipe {path} is not YAML ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} must be a mapping of names to values")
    known = {field.name for field in fields(Recipe)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"recipe {path}: unknown entry '{name}'{nearest(str(name), known)}")
        if not isinstance(value, str | int | float | bool | None):
            raise UserError(f"recipe {path}: {name} must be a single value")
    return values


def dump_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, in the order of its definition; read back by `read_values`."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False)
