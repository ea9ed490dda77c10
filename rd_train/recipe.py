"""The recipe of a run: one frozen dataclass. Its files, presets included, are `rd_train.recipe_files`'s."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

from rd_deploy.common import UserError
from rd_train.skipped import MAX_CORRUPT

# Everything a run writes, but for TensorBoard's logs; ``result.json`` comes last and marks the run as complete.
RUN_FILES = (
    *("recipe.yaml", "metrics.jsonl", "teacher-state.pt", "student-state.pt", "teacher.pt", "model.pt", "skipped.txt"),
    *("curves.png", "audit.png", "report.md", "report.html", "result.json"),
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run; saved beside it as ``recipe.yaml``.

    Args:
        summary: What the preset is for; shown by --list.
        data: Data set: digits, fashion-mnist, idx, npz, cifar10, cifar100, folder, webdataset, mit67 or caltech101.
        data_dir: Folder of the data set, or npz's file; not needed for digits and Debian's Fashion-MNIST.
        download: Let torchvision download the data set into data_dir when it is not there.
        size: Image size in pixels; the data set's own when not given.
        train_limit: Train on this many images of the training split only.
        split_seed: Which division of Caltech101 into training and test images; its protocol averages over several.
        workers: Processes that decode image files; by default the CPUs, at most 16. They do not change the result.
        max_corrupt: So many images that cannot be read are skipped, and named in skipped.txt; one more is an error.
        flip: Mirror half of the training images left to right, which suits neither letters nor signs; when not given,
            as is usual for the data set (docs/training-reference.md).
        crop_padding: Shift training images by up to so many pixels; when not given, as is usual for the data set.
        smallest_crop: The smallest share of the area of a random-resized crop of image files: 0.08 when not given, 1 is
            none.
        start_weights: A model.pt whose network, but for its classifier, training starts from (rd-train finetune); or a
            published ResNet, by its name (torchvision/resnet50) or as a file of its weights.
        arch: Network to train, e.g. plain20, plain56, plain50, resnet20.
        shortcuts: Override the shortcuts of arch: all, projection (the released variant of the paper) or none.
        stem: Override the stem of arch: imagenet (7x7/2 and max-pool) or small (3x3).
        width: Multiplier of all widths.
        init: Initialisation of blocks without shortcut: kaiming, dirac (identity plus noise) or identity (BN too).
        init_noise: Weight of the Kaiming noise in a dirac or identity initialisation, in the kernel; where branches
            pass the input on, it is the share of the convolution's own path. 0.3 there, else 0.1, when not given.
        reparam: Training form of plain blocks, folded at export: none, dirac, skip (each convolution's input beside
            it), identity (a BN of it), branches (and a 1x1 convolution); when not given, identity where a network of
            depth 38 or more starts by init=identity and learns by Muon, else none.
        method: ce (ordinary), kd (logit distillation), jointrd (residual distillation, the paper's) or rd (ours).
        teacher: Teacher network; auto is the ResNet of arch's depth. torchvision/resnet50.IMAGENET1K_V2 or
            timm/resnet50.a1_in1k, say, is a published one, which is not trained but fetched.
        teacher_weights: A model.pt or a state_dict with torchvision's names (.safetensors too); without it the run
            fetches a published teacher, and trains any other first.
        teacher_mode: frozen (pretrained), or joint (trained from scratch beside the student, by its own loss).
        teacher_epochs: Epochs of the teacher that the run trains first; as many as the student's when not given.
        teacher_bn: BN of the spliced teacher stages: eval (running statistics) or batch; batch in rd, else eval.
        warm_start: Start as the teacher; its shortcuts fade block by block and are gone after warm_start_window.
        warm_start_window: Fraction of training in which the shortcuts fade.
        splice_weight: Weight m of the spliced branches at the start; 0 leaves them out.
        splice_weight_end: Weight m after the window; 0 in rd, else 0.5.
        splices: Splices in a step of rd: one drawn at random (the cheaper step), or all of them.
        splice_probability: Share of the first steps with a splice where one is drawn; falls with m, to 0 where m does.
        splice_window: Fraction of training over which m falls along a cosine.
        feature_weight: Weight w of the margin-ReLU feature distance; 0 leaves it out.
        feature_reduction: mean over C, H, W (one weight for all sizes) or sum (the paper's: 1e-4 at 224, 1e-3 at 32).
        kd_weight: Weight of the logit distillation against the cross-entropy; 0.5, but 0 in rd from depth 38 on.
        kd_temperature: Temperature of the logit distillation.
        kd_start: Fraction of training after which the logit distillation begins; 0.5 in rd, else 0.
        kd_probability: Share of the steps from then on with logit distillation (the cheaper, the fewer); 0.6 in rd,
            else 1.
        mixup: Beta parameter of mixup; 0 is none. The teacher sees the same mixed images.
        cutmix: Beta parameter of CutMix; 0 is none. With both, each batch has one of them.
        resize_start: Size of the first training images as a share of the full size; 1 is full size all along.
        resize_window: Fraction of training over which they grow to the full size.
        recalibrate: Recompute BN statistics on so many training images before each evaluation; 0 does not.
        audit: Log and draw, per stage, gradients of the plain and of the teacher path once an epoch.
        epochs: Passes over the training split.
        save_minutes: Save the state of a training whenever so many minutes have passed, and after each epoch.
        batch_size: Images per step, of all processes together.
        optimizer: sgd (Nesterov's momentum), or muon for kernels of convolutions and sgd for the rest, a teacher that
            learns beside the student included; muon in rd, else sgd.
        lr: Peak learning rate of SGD.
        momentum: Momentum, of Muon too.
        muon_lr: Peak learning rate of Muon.
        muon_decay: Decoupled weight decay of Muon: a step shrinks kernels by learning rate times decay.
        weight_decay: L2 penalty.
        decay_bn_bias: Apply weight decay to BN parameters and biases too.
        schedule: cosine, or step (times 0.1 at 50% and 75%).
        warmup_epochs: Epochs of linear warm-up; may be fractional.
        label_smoothing: Label smoothing of every cross-entropy.
        clip_norm: Clip the norm of the gradient to this; 0 does not clip. 1 in rd, else 0.
        ema: Decay of an exponential moving average of the weights, which is then what is evaluated; 0 is none.
        sync_bn: BN by the batch of all processes (torchrun), not by each one's slice; as if there were one.
        precision: fp32, bf16 (autocast), or auto (bf16 where the hardware multiplies it). bf16-emulated:
            bf16 by products in fp32, rounded once, which bf16 becomes on a CPU that does not multiply it.
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
    split_seed: int = 0
    workers: int | None = None
    max_corrupt: int = MAX_CORRUPT
    flip: bool | None = None
    crop_padding: int | None = None
    smallest_crop: float | None = None
    start_weights: str | None = None
    arch: str = "plain20"
    shortcuts: Literal["all", "projection", "none"] | None = None
    stem: Literal["imagenet", "small"] | None = None
    width: float = 1.0
    init: Literal["kaiming", "dirac", "identity"] = "identity"
    init_noise: float | None = None
    reparam: Literal["none", "dirac", "skip", "identity", "branches"] | None = None
    method: Literal["ce", "kd", "jointrd", "rd"] = "rd"
    teacher: str = "auto"
    teacher_weights: str | None = None
    teacher_mode: Literal["frozen", "joint"] = "frozen"
    teacher_epochs: int | None = None
    teacher_bn: Literal["eval", "batch"] | None = None
    warm_start: bool = False
    warm_start_window: float = 0.5
    splice_weight: float = 1.0
    splice_weight_end: float | None = None
    splice_window: float = 0.5
    splices: Literal["one", "all"] = "one"
    splice_probability: float = 1.0
    feature_weight: float = 1.0
    feature_reduction: Literal["mean", "sum"] = "mean"
    kd_weight: float | None = None
    kd_temperature: float = 4.0
    kd_start: float | None = None
    kd_probability: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    resize_start: float = 1.0
    resize_window: float = 0.5
    recalibrate: int = 0
    audit: bool = False
    epochs: int = 10
    save_minutes: float = 10.0
    batch_size: int = 128
    optimizer: Literal["sgd", "muon"] | None = None
    lr: float = 0.1
    momentum: float = 0.9
    muon_lr: float = 0.02
    muon_decay: float = 0.1
    weight_decay: float = 5e-4
    decay_bn_bias: bool = False
    schedule: Literal["cosine", "step"] = "cosine"
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    ema: float = 0.0
    sync_bn: bool = False
    precision: Literal["auto", "fp32", "bf16", "bf16-emulated"] = "auto"
    channels_last: bool = True
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        settled = when_not_given(vars(self))
        for name, annotation in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, int) and value.bit_length() > 63:  # too large for a float, or even to be printed
                raise UserError(f"{name} is a number of more than 63 bits; give a smaller one")
            if value is None and name in settled:
                object.__setattr__(self, name, settled[name])
            elif float in (annotation, *get_args(annotation)) and type(value) is int:  # YAML's 1 for 1.0
                object.__setattr__(self, name, float(value))
            elif not _is_a(value, annotation):
                raise UserError(f"{name}={value} is not {what_it_takes(annotation)}")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name}={value} must be from {low:g} to {high:g}")
        shortest = self.epochs if self.teacher_epochs is None else min(self.epochs, self.teacher_epochs)
        if self.warmup_epochs >= shortest:
            many = f"must be less than the {shortest} epochs of a training"
            raise UserError(f"warmup_epochs={self.warmup_epochs:g} {many}; give less of it, or more epochs")
        for refused, reason in self._conflicts():
            if refused:
                raise UserError(reason)

    @property
    def _warm(self) -> bool:
        """Whether the network starts as its teacher."""
        return is_warm(vars(self))

    def _conflicts(self) -> list[tuple[bool, str]]:
        """Combinations that make no sense: (whether this recipe has it, what to say)."""
        start, end = self.splice_weight, self.splice_weight_end
        joint = self.teacher_mode == "joint"
        return [
            (
                0 < start < end,
                f"splice_weight_end={end:g} must not exceed splice_weight={start:g}",
            ),
            (
                joint and (self.method in ("kd", "rd") or self.teacher_weights is not None),
                "teacher_mode=joint trains a teacher from scratch beside a student of method=jointrd: "
                "it goes neither with method=kd or rd nor with teacher_weights",
            ),
            (
                self.method == "kd" and self.kd_weight == 0,
                "method=kd with kd_weight=0 distils nothing; give a kd_weight (0.5, say), or method=ce",
            ),
            (
                joint and "/" in self.teacher,
                f"teacher_mode=joint trains a teacher from scratch; {self.teacher} is a trained one",
            ),
            (
                self.sync_bn and self.compile,
                "sync_bn communicates within a step, which torch.compile cannot compile; use one of the two",
            ),
            (
                self.precision == "bf16-emulated" and (self.compile or self.device == "cuda"),
                "precision=bf16-emulated, which bf16 becomes on a CPU that does not multiply it, is neither for "
                "torch.compile nor for GPUs; take compile=false and device=cpu, or another precision",
            ),
            (
                self._warm and (joint or self.reparam != "none"),
                "warm_start copies a trained teacher: it goes neither with teacher_mode=joint nor with reparam",
            ),
            (
                self.start_weights is not None and self.warm_start,
                "start_weights and warm_start are two different starts; give one",
            ),
            (
                self.start_weights is not None and self.method != "ce" and self.teacher_weights is None,
                f"method={self.method} with start_weights needs a teacher that knows these classes: "
                "fine-tune a ResNet first (rd-train finetune RESNET.pt) and give its model.pt as teacher_weights",
            ),
        ]

    def unused(self) -> list[str]:
        """Entries that differ from their defaults and have no effect in this recipe."""
        usual = defaults(vars(self))
        return [name for name in self.without_effect() if getattr(self, name) != usual[name]]

    def without_effect(self) -> list[str]:
        """Entries that have no effect in this recipe, whatever they are."""
        ce, jointrd, rd = (self.method == name for name in ("ce", "jointrd", "rd"))
        no_splices = not (jointrd or rd) or self.splice_weight == 0
        no_kd = not (self.method == "kd" or rd)
        given = self.teacher_weights is not None or "/" in self.teacher
        no_teacher_phase = ce or self.teacher_mode == "joint" or given
        warm, started = self._warm, self.start_weights is not None
        residual = is_residual(vars(self))
        without = {
            "teacher": ce,
            "teacher_weights": ce,
            "teacher_mode": ce,
            "teacher_epochs": no_teacher_phase,
            "teacher_bn": no_splices,
            "warm_start": ce,
            "warm_start_window": not warm,
            "splice_weight": not (jointrd or rd),
            "splice_weight_end": no_splices,
            "splice_window": no_splices,
            "splices": no_splices or jointrd,
            "splice_probability": no_splices or jointrd or self.splices == "all",
            "feature_weight": not jointrd,
            "feature_reduction": not jointrd or self.feature_weight == 0,
            "kd_weight": no_kd,
            **dict.fromkeys(("kd_temperature", "kd_start", "kd_probability"), no_kd or self.kd_weight == 0),
            "resize_window": self.resize_start == 1,
            **dict.fromkeys(("muon_lr", "muon_decay"), self.optimizer == "sgd"),
            "audit": no_splices,
            "init": warm or started or residual,
            "init_noise": self.init == "kaiming" or warm or started or residual,
            "reparam": residual,
            "data_dir": self.data == "digits",
            "split_seed": self.data != "caltech101",
            "workers": self.data in IN_MEMORY,
            "max_corrupt": self.data in IN_MEMORY,
        }
        return [name for name, unused in without.items() if unused]

    def to_dict(self) -> dict:
        """Plain containers for YAML and the checkpoint."""
        return asdict(self)


# What the authors' released code runs as its joint mode (docs/method.md), additions of ours off; see `as_released`.
AS_RELEASED = {
    "method": "jointrd",
    "shortcuts": "projection",
    "init": "kaiming",
    "teacher_bn": "eval",
    "splice_weight": 1.0,
    "splice_window": 0.5,
    "clip_norm": 0.0,
    "optimizer": "sgd",
    "reparam": "none",
    "warm_start": False,
    "mixup": 0.0,
    "cutmix": 0.0,
    "resize_start": 1.0,
    "recalibrate": 0,
    "ema": 0.0,
}
# And by the student's stem: theirs for ImageNet, and that of their scripts for CIFAR.
AS_RELEASED_BY_STEM = {
    "imagenet": {"feature_weight": 1e-4, "feature_reduction": "sum", "splice_weight_end": 5e-3},
    "small": {"feature_weight": 0.0, "splice_weight_end": 0.5},
}
# What entries that are not given become: (in every other method, in rd).
BY_METHOD = {
    "teacher_bn": ("eval", "batch"),
    "splice_weight_end": (0.5, 0.0),
    "kd_start": (0.0, 0.5),
    "kd_probability": (1.0, 0.6),
    "clip_norm": (0.0, 1.0),
    "optimizer": ("sgd", "muon"),
}
# And by the data set, as is usual for it.
OF_FILES = {"crop_padding": 0, "flip": True, "smallest_crop": 0.08}  # Szegedy et al. 2015
BY_DATA = {
    "digits": {"crop_padding": 1, "flip": False, "smallest_crop": 1.0},
    "fashion-mnist": {"crop_padding": 2, "flip": True, "smallest_crop": 1.0},
    "idx": {"crop_padding": 2, "flip": False, "smallest_crop": 1.0},
    "npz": {"crop_padding": 2, "flip": False, "smallest_crop": 1.0},
    "cifar10": {"crop_padding": 4, "flip": True, "smallest_crop": 1.0},
    "cifar100": {"crop_padding": 4, "flip": True, "smallest_crop": 1.0},
    **dict.fromkeys(("folder", "webdataset", "mit67", "caltech101"), OF_FILES),
}
# From this depth on plain networks that start as the identity and learn by Muon keep it in branches, and rd distils no
# logits: 56 gained by branches and, on one seed, nothing by logits, 20 by logits and not by branches, and between them
# nothing was tried (docs/accuracy-choice.md).
LONG = 38
# Data sets that are read at once: no files to decode later, by workers.
IN_MEMORY = ("digits", "fashion-mnist", "idx", "npz", "cifar10", "cifar100")
# Inclusive; the smallest positive values stand for "more than 0".
BOUNDS = {
    "size": (1, 4096),
    "train_limit": (2, 10**9),
    "split_seed": (0, 2**62),
    "workers": (0, 256),
    "max_corrupt": (0, 10**9),
    "crop_padding": (0, 256),
    "smallest_crop": (1e-3, 1),
    "save_minutes": (1e-6, 1e6),
    "width": (1 / 64, 16),
    "init_noise": (0, 100),
    "teacher_epochs": (1, 10**6),
    "splice_weight": (0, 1e6),
    "splice_weight_end": (0, 1e6),
    "splice_window": (1e-6, 1),
    "feature_weight": (0, 1e6),
    "splice_probability": (1e-6, 1),
    "warm_start_window": (1e-6, 0.95),  # the network that is kept must train as a plain one for a while
    "mixup": (0, 100),
    "cutmix": (0, 100),
    "resize_start": (0.1, 1),
    "resize_window": (1e-6, 1),
    "recalibrate": (0, 10**9),
    "kd_weight": (0, 1),
    "kd_temperature": (1e-3, 1e6),
    "kd_start": (0, 0.95),
    "kd_probability": (1e-6, 1),
    "epochs": (1, 10**6),
    "batch_size": (2, 10**6),  # BN needs batch statistics
    "lr": (1e-12, 1e6),
    "momentum": (0, 0.9999),
    "muon_lr": (1e-12, 1e3),
    "muon_decay": (0, 1e3),
    "weight_decay": (0, 1e3),
    "warmup_epochs": (0, 10**6),
    "label_smoothing": (0, 0.9999),
    "clip_norm": (0, 1e9),
    "ema": (0, 0.999999),
    "threads": (1, 1024),
    "seed": (0, 2**62),
}


def when_not_given(values: dict) -> dict:
    """What entries become that others decide: the method, the data, the depth, and how a long chain starts."""
    by_data = BY_DATA.get(values["data"], OF_FILES)  # an unknown set is refused when it is read
    by_method = {name: defaults[values["method"] == "rd"] for name, defaults in BY_METHOD.items()}
    from_identity = values["init"] == "identity" and values["start_weights"] is None and not is_warm(values)
    by_muon = (values["optimizer"] or by_method["optimizer"]) == "muon"
    long = _depth(values) >= LONG
    own = "identity" if from_identity and by_muon and long and not is_residual(values) else "none"
    reparam = own if values["reparam"] is None else values["reparam"]
    beside = from_identity and reparam in ("skip", "identity", "branches")
    # The noise is of a path beside the one that passes on, or else in the kernel that does.
    noise = 0.3 if beside else 0.1
    kd_weight = 0.0 if values["method"] == "rd" and long else 0.5
    return by_data | by_method | {"reparam": own, "init_noise": noise, "kd_weight": kd_weight}


def defaults(values: dict) -> dict:
    """Every entry's default beside the others."""
    return {field.name: field.default for field in fields(Recipe)} | when_not_given(values)


def is_warm(values: dict) -> bool:
    """Whether a recipe's network starts as its teacher."""
    return values["warm_start"] and values["method"] != "ce"


def _depth(values: dict) -> int:
    """The depth in the name of the network, 0 where it has none."""
    found = re.search(r"\d{1,6}$", str(values["arch"]))
    return int(found[0]) if found else 0


def is_residual(values: dict) -> bool:
    """Whether a recipe's network has all its shortcuts, and so no plain blocks."""
    return values["shortcuts"] == "all" or (values["shortcuts"] is None and str(values["arch"]).startswith("resnet"))


def _is_a(value: object, annotation: object) -> bool:
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_args(annotation):  # optional
        return any(_is_a(value, part) for part in get_args(annotation))
    return type(value) is annotation


def what_it_takes(annotation: object) -> str:
    """In words, the values of an entry with this type."""
    choices = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(choices)
    if choices:  # optional
        return what_it_takes(choices[0])
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[annotation]


def as_released(stem: str) -> dict:
    """The entries that ``rd-train --as-released`` sets, for a student with this stem."""
    return AS_RELEASED | AS_RELEASED_BY_STEM[stem]


def check_as_released(values: dict, stem: str) -> None:
    """Refuse entries (name: value) that contradict `as_released`; names that it does not set may be anything."""
    for name, released in as_released(stem).items():
        if name in values and values[name] not in (released, None):
            raise UserError(
                f"--as-released sets {name}={released}, this run {name}={values[name]}; leave one of the two away"
            )
