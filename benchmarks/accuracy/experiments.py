"""The experiments of accuracy as data: which rows, depths, data and settings; and the runs that follow from them.

A run is one row at one depth with one seed. Its folder tells every setting that differs between experiments, so that
experiments share the runs they have in common.
"""

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner import IN_ALL_STEPS, Job

from rd_deploy.common import UserError, check_file
from rd_train.recipe import Recipe

# What all runs share unless their row says otherwise, as it may of the optimiser. A method's own default (of clipping,
# say) must not be what makes the difference.
SHARED = {
    **{"size": 32, "batch_size": 128, "lr": 0.1, "clip_norm": 1.0, "optimizer": "sgd"},
    **{"precision": "bf16", "threads": 1},
}
PRESET = "fashion-plain20"
SEEDS = (0, 1, 2)

# Our method: options of rd-train, which adds the branches of a long chain and the logit distillation of a short one by
# itself. The ablation follows from it. What distillation adds is seen against the same start by the same optimiser,
# which the ResNet is trained with, too.
MUON = {"optimizer": "muon", "muon_lr": 0.02, "muon_decay": 0.1}
START = {"init": "identity"}
OURS = {"method": "rd", **START, **MUON}
# What it was before: at a rate that depth 56 bears without branches, and by SGD before that.
SLOW = MUON | {"muon_lr": 0.004}
FORMER_START = {"init": "identity", "init_noise": 0.1, "reparam": "none"}
FORMER_RD = {"method": "rd", "kd_weight": 0.0, **FORMER_START}
# What a lever is without effect, where that is not the default of rd-train.
NEUTRAL = {
    "init": "kaiming",
    "teacher_bn": "eval",
    "splices": "all",
    "splice_weight_end": 0.5,
    "clip_norm": 0.0,
    "splice_weight": 0.0,
    "kd_weight": 0.0,
    "reparam": "none",
    "warm_start": False,
    "mixup": 0.0,
    "cutmix": 0.0,
    "resize_start": 1.0,
    "recalibrate": 0,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "optimizer": "sgd",
}
# Settings of a lever that are none themselves.
PARAMETERS = {
    *("init_noise", "splice_window", "splice_probability", "kd_temperature", "kd_start", "kd_probability"),
    *("warm_start_window", "resize_window", "method", "muon_lr", "muon_decay"),
}


@dataclass(frozen=True)
class Row:
    """A way to train: its name, with {} for the network's depth, what it says in a table, and its settings.

    ``key``: what comparisons call it. ``base``: the name of the row that it varies, and is compared with. ``times``: so
    many times the experiment's epochs. ``teacher``: the row of its teacher, by default the ResNet by SGD. ``was``: the
    name under which earlier files hold its results.
    """

    name: str
    label: str
    settings: dict
    key: str = ""
    base: str = ""
    times: float = 1
    teacher: "Row | None" = None
    was: str = ""

    @property
    def residual(self) -> bool:
        return self.name.startswith("resnet")

    @property
    def taught_by(self) -> "Row | None":
        """The row of its teacher, if its method has one."""
        return None if self.settings["method"] == "ce" else self.teacher or RESNET

    def varied(self, tag: str, what: str, *, key: str = "", **changes: object) -> "Row":
        """A row that changes something of this one, and is compared with it: what is added to its name and label."""
        return replace(self, name=self.name + tag, label=self.label + what, key=key, base=self.name, **changes)


SOME_KD = {"kd_weight": 0.5, "kd_temperature": 4.0}
KD = {"method": "kd", **SOME_KD}
RESNET = Row("resnet{}", "ResNet, cross-entropy", {"method": "ce"}, key="resnet")
RESNET_MUON = Row("resnet{}-muon", "ResNet, cross-entropy by Muon, rate 0.004", {"method": "ce", **SLOW})
# By Muon at the best of the rates that validation has tried for it (`RATES`, seed 0), which ours has, too.
RESNET_TUNED = Row("resnet{}-muon02", "ResNet, cross-entropy by Muon", {"method": "ce", **MUON}, key="resnet-tuned")
RESNET_KD = Row("resnet{}-kd", "ResNet, distilled from itself", KD)
# What ours and its teacher cost together buys this, nearly.
RESNET_TWICE = Row(
    "resnet{}-muon02-twice",
    "ResNet, cross-entropy by Muon, twice the epochs",
    {"method": "ce", **MUON},
    key="resnet-twice",
    times=2,
)
PLAIN = Row("plain{}-ce-kaiming", "plain, cross-entropy, Kaiming", {"method": "ce", "init": "kaiming"}, key="plain")
# PLAIN_START differs from it in the start alone, with its branches where it has them.
PLAIN_BY_MUON = Row(
    "plain{}-ce-kaiming-muon02",
    "plain, cross-entropy, Kaiming, by Muon",
    {"method": "ce", "init": "kaiming", **MUON},
    key="plain-muon",
)
PLAIN_KD = Row("plain{}-kd", "plain, logit distillation, Kaiming", {**KD, "init": "kaiming"})
PLAIN_START = Row(
    "plain{}-ce-start-muon02",
    "plain, cross-entropy, from our start by Muon",
    {"method": "ce", **START, **MUON},
    key="start",
    base=PLAIN_BY_MUON.name,
)
# What the splices and the logits cost at most buys this, and needs no teacher.
PLAIN_LONGER = PLAIN_START.varied("-longer", ", 1.2 times the epochs", key="start-longer", times=1.2)
# What they and the usual teacher's own training cost together buys this, nearly.
PLAIN_TWICE = PLAIN_START.varied("-twice", ", twice the epochs", key="start-twice", times=2)
PLAIN_FORMER_START = Row(
    "plain{}-ce-identity-muon",
    "plain, cross-entropy, from the former start by Muon, rate 0.004",
    {"method": "ce", **FORMER_START, **SLOW},
    key="former-start",
)
PLAIN_START_BY_SGD = Row(
    "plain{}-ce-identity",
    "plain, cross-entropy, from the former start by SGD",
    {"method": "ce", **FORMER_START},
    key="start-sgd",
)
# Initialisation, feature term and BN as in the authors' code; without the shortcuts that it keeps, and clipped as all.
PUBLISHED = Row(
    "plain{}-jointrd-published",
    "plain, the published loss (Kaiming, joint, running statistics)",
    {
        **{"method": "jointrd", "init": "kaiming", "feature_weight": 0.001, "feature_reduction": "sum"},
        "teacher_bn": "eval",
    },
    key="published",
)
PUBLISHED_OPTIONS = Row(
    "plain{}-jointrd-options",
    "plain, the published loss with Dirac start, batch statistics and recalibration",
    {
        **{"method": "jointrd", "init": "dirac", "init_noise": 0.5, "feature_weight": 1.0, "feature_reduction": "mean"},
        **{"teacher_bn": "batch", "recalibrate": 2000},
    },
)
BY_SGD = Row("plain{}-rd", "plain, ours by SGD", FORMER_RD, key="sgd")
FORMER = Row(
    "plain{}-rd-muon",
    "plain, ours from the former start, taught by the ResNet by SGD, rate 0.004",
    FORMER_RD | SLOW,
    key="former",
    base=BY_SGD.name,
)
OUR_ROW = Row("plain{}-rd-tuned", "plain, ours", OURS, key="ours", base=FORMER.name, teacher=RESNET_TUNED)


def _more(name: str, what: str, **settings) -> Row:
    return BY_SGD.varied(f"-{name}", f", {what}", settings=FORMER_RD | settings)


# What might make it better, one lever more at a time than by SGD; Muon did.
WARM = {"warm_start": True, "warm_start_window": 0.7}
MORE = (
    _more("kd", "with logit distillation", **SOME_KD, **IN_ALL_STEPS),
    _more("window1", "with splices to the end", splice_window=1.0),
    _more("warm-start", "started as its teacher", **WARM),
    _more(
        "warm-kd",
        "started as its teacher, then logit distillation in half of the steps",
        **{**WARM, **SOME_KD, "kd_start": 0.5, "kd_probability": 0.5},
    ),
    _more("branches", "with BN branches", init_noise=0.3, reparam="identity"),
)


def _at_rate(row: Row, tag: str, name: str, rate: float) -> Row:
    """A row at another rate of its optimiser."""
    label = row.label.removesuffix(f", rate {SLOW['muon_lr']}")
    return Row(f"{row.name}{tag}", f"{label}, rate {rate}", row.settings | {name: rate})


# What the rates of each optimiser give, for the ResNet and for ours alike.
RATES = tuple(
    varied
    for by_sgd, by_muon in ((RESNET, RESNET_MUON), (BY_SGD, FORMER))
    for varied in (
        by_sgd,
        *(_at_rate(by_sgd, f"-lr{tag}", "lr", rate) for tag, rate in (("2", 0.2), ("05", 0.05))),
        by_muon,
        *(_at_rate(by_muon, tag, "muon_lr", rate) for tag, rate in (("02", 0.02), ("008", 0.008), ("002", 0.002))),
    )
)

# What logit distillation adds to ours where it has it, and would add where it has none.
OURS_ALONE = OUR_ROW.varied(
    "-alone",
    " without logit distillation",
    key="ours-alone",
    settings=OURS | {"kd_weight": 0.0},
    was=OUR_ROW.name,
)
# A better teacher than the ResNet that ours is compared with. Its training costs twice as much, the student's the same.
OURS_TAUGHT_LONGER = OUR_ROW.varied(
    "-teacher-twice",
    ", taught by the ResNet of twice the epochs",
    key="ours-taught-longer",
    teacher=RESNET_TWICE,
)
# Whether plain networks stay level with ResNets that both train for longer, which is what deployed ones do.
OURS_TWICE = OUR_ROW.varied("-twice", ", twice the epochs", key="ours-twice", times=2, teacher=RESNET_TWICE)
OURS_KD = OUR_ROW.varied(
    "-kd",
    ", with logit distillation in two thirds of the steps of the second half",
    settings=OURS | SOME_KD | {"kd_start": 0.5, "kd_probability": 0.66},
)

# Rows whose runs come first, in this order.
MUST = [row.name for row in (RESNET, RESNET_TUNED, OUR_ROW, PLAIN_START, PLAIN, PUBLISHED)]


ABLATED = 56  # the depth of the ablation


def ablations(ours: dict = OURS) -> list[Row]:
    """Our row with one lever out at a time: each that ``ours`` names or that rd-train turns on by default.

    A lever takes its neutral value or, if it has none in `NEUTRAL`, the default of rd-train. What then has no effect
    any more goes too.
    """
    shared = SHARED | {"arch": f"plain{ABLATED}"}
    recipe = Recipe(**shared | ours)
    given, ours = ours, ours | {"reparam": recipe.reparam}  # which would go with the start or the optimiser
    rows = []
    for name in dict.fromkeys([*ours, *NEUTRAL]):
        settings = {key: value for key, value in ours.items() if key != name}
        if name in NEUTRAL:
            settings[name] = NEUTRAL[name]
        while idle := [key for key in Recipe(**shared | settings).unused() if key in settings and key != name]:
            settings = {key: value for key, value in settings.items() if key not in idle}
        without = Recipe(**shared | settings)
        if name in PARAMETERS or without == recipe or name in without.unused():
            continue
        if name == "splice_weight" and given == OURS:  # cross-entropy from the same start
            rows.append(replace(PLAIN_START, label=f"without splices: {PLAIN_START.label}", key="", base=OUR_ROW.name))
            continue
        label = f"without {name.replace('_', ' ')} ({getattr(without, name)} instead of {getattr(recipe, name)})"
        tag = f"-without-{name.replace('_', '-')}"
        rows.append(Row(f"{OUR_ROW.name}{tag}", label, settings, base=OUR_ROW.name, teacher=OUR_ROW.teacher))
    return rows


@dataclass(frozen=True)
class Experiment:
    """Rows at some depths on one data set, over seeds.

    ``settings``: those of all rows, over `SHARED`; ``tag`` names them in every run, after the depth. ``seeds``: those
    that make it complete; of ``more_seeds`` it has what is there or is asked for.
    """

    what: str
    rows: tuple[Row, ...]
    depths: tuple[int, ...]
    epochs: int = 10
    train_images: int = 20_000
    settings: dict = field(default_factory=dict)
    tag: str = ""
    seeds: tuple[int, ...] = SEEDS
    more_seeds: tuple[int, ...] = ()

    def with_epochs(self, epochs: int | None) -> "Experiment":
        """The same with another number of epochs, or as it is."""
        return self if epochs is None else replace(self, epochs=epochs)

    def name(self, row: Row, depth: int) -> str:
        """A run's name, without its seed."""
        return row.name.format(f"{depth}{self.tag}")

    def epochs_of(self, row: Row) -> int:
        """How long a row trains."""
        return math.ceil(self.epochs * row.times)

    def job(self, row: Row, depth: int, seed: int, out: Path) -> Job:
        """One run; its teacher, where it has one, is the ResNet of this depth and seed."""

        def folder(each: Row) -> Path:
            return out / f"{self.name(each, depth)}-n{self.train_images}-e{self.epochs_of(each)}-s{seed}"

        kind = "resnet" if row.residual else "plain"
        shared = SHARED | {"train_limit": self.train_images, "epochs": self.epochs_of(row), "seed": seed}
        settings = shared | {"arch": f"{kind}{depth}"} | self.settings | row.settings
        teacher = None if row.taught_by is None else folder(row.taught_by)
        was = row.was and self.name(replace(row, name=row.was), depth)
        return Job(self.name(row, depth), folder(row), PRESET, settings, teacher, row.name in MUST, was)

    def depths_of(self, row: Row) -> list[int]:
        """The depths of a row: not where it is what it varies, as what has no logits to do without."""

        def recipe(each: Row, depth: int) -> Recipe:
            return self.job(each, depth, 0, Path()).recipe()

        base = next((each for each in self.rows if each.name == row.base), None)
        return [depth for depth in self.depths if base is None or recipe(row, depth) != recipe(base, depth)]

    def jobs(self, seeds: tuple[int, ...], out: Path) -> list[Job]:
        """All runs, those that the comparisons need first, and of these a seed after the other."""
        first = sorted((row for row in self.rows if row.name in MUST), key=lambda row: MUST.index(row.name))
        others = [row for row in self.rows if row not in first]
        return [
            self.job(row, depth, seed, out)
            for rows in (first, others)
            for seed in seeds
            for row in rows
            for depth in self.depths_of(row)
        ]


FASHION = "Fashion-MNIST padded to 32x32, {}, 5,000 validation, 10,000 test images"
SUBSET = FASHION.format("a fixed subset of 20,000 training images")
MAIN = (
    *(RESNET, RESNET_TUNED, RESNET_TWICE, RESNET_KD),
    *(PLAIN, PLAIN_BY_MUON, PLAIN_KD, PLAIN_START_BY_SGD, PLAIN_FORMER_START, PLAIN_START),
    *(PLAIN_LONGER, PLAIN_TWICE),
    *(PUBLISHED, PUBLISHED_OPTIONS),
    *(BY_SGD, FORMER, OURS_ALONE, OUR_ROW, OURS_TAUGHT_LONGER, OURS_TWICE),
)
CONTROLS = (
    *(RESNET_TWICE, PLAIN_BY_MUON, PLAIN_LONGER, PLAIN_TWICE, PLAIN_FORMER_START, FORMER),
    *(OURS_ALONE, OURS_TAUGHT_LONGER, OURS_TWICE),
)
EVERY = tuple(row for row in MAIN if row not in CONTROLS)
DECIDE = (RESNET, RESNET_TUNED, PLAIN, PLAIN_START, PUBLISHED, OUR_ROW)


def experiments(glyphs: Path | None = None) -> dict[str, Experiment]:
    """All experiments; the one on glyphs only where their file is given (`glyphs.py` makes it)."""
    found = {
        # Seed 0 had part in the choice of our optimiser, 0 to 4 in that of logit distillation, the others in none.
        "main": Experiment(SUBSET, MAIN, (20, 56), more_seeds=(3, 4, 5, 6, 7)),
        "full": Experiment(
            FASHION.format("all 55,000 training images"),
            (*DECIDE, OURS_ALONE),
            (20, 56),
            train_images=55_000,
            seeds=SEEDS[:1],
            more_seeds=SEEDS[1:],
        ),
        "ablation": Experiment(
            f"{SUBSET}; ours with one lever out", (RESNET_TUNED, replace(OUR_ROW, base=""), *ablations()), (ABLATED,)
        ),
        "levers": Experiment(
            f"{SUBSET}; ours by SGD, or as it is, with one lever more",
            (RESNET, RESNET_TUNED, BY_SGD, *MORE, FORMER, OUR_ROW, OURS_KD),
            (56,),
        ),
        "rates": Experiment(f"{SUBSET}; rates of both optimisers", RATES, (56,), seeds=SEEDS[:1]),
        "fp32": Experiment(
            SUBSET,
            (RESNET, PLAIN, FORMER),
            (20,),
            settings={"precision": "fp32"},
            tag="-fp32",
            seeds=SEEDS[:2],
            more_seeds=SEEDS[2:],
        ),
        "depth": Experiment(
            f"{SUBSET}; by depth",
            (RESNET, RESNET_TUNED, PLAIN, FORMER, OUR_ROW),
            (20, 32, 44, 56, 110),
            seeds=SEEDS[:1],
            more_seeds=SEEDS[1:],
        ),
        "bottleneck": Experiment(
            f"{SUBSET}; bottlenecks, a quarter of the width, 3x3 stem",
            (*EVERY, PLAIN_FORMER_START, FORMER),
            (50,),
            settings={"stem": "small", "width": 0.25},
            tag="-small-w0.25",
        ),
    }
    if glyphs is not None:
        found["glyphs"] = _on_glyphs(glyphs)
    return found


NAMES = (*experiments(), "glyphs")


def _on_glyphs(path: Path) -> Experiment:
    """The second data set."""
    what = f"coloured glyphs of fonts that training has not seen, 32x32 ({path.name}, {digest_of(path)})"
    settings = {"data": "npz", "data_dir": str(path)}
    return Experiment(
        what,
        (*DECIDE, OURS_ALONE, RESNET_MUON, PLAIN_FORMER_START, FORMER),
        (20, 56),
        settings=settings,
        tag=f"-glyphs-{digest_of(path)}",
    )


def digest_of(path: Path) -> str:
    """The first digits of a data file's SHA-256, which name it in every run."""
    with check_file(path, "data file").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def check_names(names: list[str]) -> None:
    """Refuse an unknown experiment."""
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"no experiment '{unknown[0]}'; there are {', '.join(NAMES)}")
