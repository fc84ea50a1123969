"""The recipe of a network that is trained here: its data, its training, its export. Nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from compress.schema.recipe import AnyRecipe
from compress.schema.section import Clash, Once, Section, Seed

SOURCES = ("package", "folder", "table", "hub")  # of data: one is named
OF_TABLES = ("images", "path_column", "split_column", "columns", "unknown")


class DataSpec(Section):
    """Where images or signals come from: one of ``package``, ``folder``, ``table`` and ``hub``; the model's own by
    default."""

    package: Literal["emoji", "emoji-scenes", "watch", "mnist"] | None = Field(
        None, description="data that a package carries; emoji-scenes: emoji pasted on canvases, for detectors"
    )
    folder: Path | None = Field(
        None,
        description="train/CLASS/*.png (ImageNet), data_batch_1.bin ... (CIFAR-10), train/Inertial Signals (HAR),"
        " gt_sets/*.txt (NYUDv2), JPEGImages/ (PASCAL-Context), images/ and labels/ (YOLO), annotations/*.json (COCO)",
    )
    table: Path | None = Field(
        None, description="a CSV file: the path of an image a row, and columns of classes, attributes and numbers"
    )
    images: Path | None = Field(None, description="table: the folder that its paths are in; its own by default")
    path_column: str | None = Field(None, description="table: the column of paths; the first by default")
    split_column: str | None = Field(
        None, description="table: a column that says train, calibration or test; drawn by the seed by default"
    )
    columns: dict[str, Literal["classes", "attribute", "number"]] = Field(
        {},
        description="table: which columns are tasks, and of what kind; attributes are one task together. All columns of"
        " text by default, as classes",
    )
    unknown: str | None = Field(None, description="table: what stands in a cell of which nothing is known, such as '?'")
    hub: str | None = Field(None, description="data set id on the Hugging Face hub")
    image_column: str = Field("img", description="the column of images (hub)")
    label_column: str = Field("label", description="the column of labels (hub)")
    size: int | None = Field(
        None, ge=4, le=4096, description="images are resized to size x size pixels; their own by default"
    )
    fit: Literal["crop", "stretch"] = Field(
        "crop", description="images from disk: the middle is cut out, or the whole is made square"
    )
    crop: float = Field(
        0.875, gt=0, le=1, description="fit: crop: the side of what is cut out, as a share of the image's short side"
    )
    resample: Literal["bilinear", "bicubic"] = Field("bilinear", description="images from disk: how they are resized")
    mean: list[float] | None = Field(
        None, min_length=1, description="what is taken off every channel (of values 0 to 1); measured by default"
    )
    std: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, min_length=1, description="what every channel is then divided by; measured by default"
    )
    labels: list[str] = Field(
        [],
        description="the classes in the order of the network's outputs, where all of the data's are among them; a model"
        " by its name brings its own",
    )
    workers: int | None = Field(
        None, ge=1, le=256, description="threads that decode images from disk; as many as processors by default"
    )
    white: float | None = Field(
        None,
        gt=0,
        description="the value that is white in images of more than 8 bits, such as 4095 of 12 in 16; their format's"
        " by default",
    )
    skin_tones: bool = Field(False, description="emoji: with all skin tones, half of all images then show people")
    tasks: Annotated[list[str], Once] = Field([], description="the tasks to keep; the source's first by default")
    seed: Seed = Field(0, description="decides every split that the source does not make itself")

    @model_validator(mode="after")
    def _one(self) -> DataSpec:
        named = self.named()
        if len(named) > 1:
            raise Clash(f"name one of {', '.join(SOURCES)} (here: {', '.join(named)})", "set the others to null")
        strange = [] if self.table is not None else [k for k in OF_TABLES if getattr(self, k)]
        if strange and named:
            raise Clash(f"{strange[0]} is for a table, and the data is {named[0]}", "name data.table, or leave it out")
        if (self.mean is None) != (self.std is None):
            raise Clash("mean and std go together, and one is given", "give both, or neither")
        return self

    def named(self) -> list[str]:
        """The sources that are named."""
        return [k for k in SOURCES if getattr(self, k) is not None]

    @property
    def title(self) -> str:
        return self.hub or self.package or str(self.table or self.folder)


class TrainSpec(Section):
    """How a network is trained. The rate warms up linearly, then follows half a cosine down to zero."""

    epochs: int = Field(ge=0)
    batch: int = Field(128, ge=1, description="samples of one step, over all processes together")
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)
    warmup_epochs: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights, which are what is kept")
    weights: dict[str, Annotated[float, Field(ge=0)]] | Literal["uncertainty"] = Field(
        {}, description="of the tasks' losses, 1 where none is said; uncertainty: learnt along (Kendall et al. 2018)"
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast in forward passes")
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    flip: bool = Field(False, description="images are mirrored half of the time")
    shift: int = Field(0, ge=0, description="images are moved by up to so many pixels; what comes in is zero")
    checkpoint_steps: int | None = Field(
        None, ge=1, description="checkpoint every so many steps; every epoch by default"
    )

    @model_validator(mode="after")
    def _fits(self) -> TrainSpec:
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise Clash(
                f"warmup_epochs ({self.warmup_epochs:g}) must be fewer than epochs ({self.epochs})",
                f"set warmup_epochs=0, or epochs above {self.warmup_epochs:g}",
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise Clash(
                "nesterov needs optimizer: sgd with momentum above 0",
                "set nesterov: false, or optimizer: sgd and momentum: 0.9",
            )
        return self


class NetworkExport(Section):
    """ONNX, checked against torch output by output on held-out samples; and what is made of it."""

    formats: Annotated[
        list[Literal["onnx", "mnn", "ort", "openvino", "executorch", "litert", "tensorrt", "tensorrt_rtx"]], Once
    ] = Field(
        ["onnx"],
        min_length=1,
        description="mnn: for phones and PCs, its kernels skip zeros; the others see `compress export --help`",
    )
    tolerance: float = Field(1e-3, gt=0, description="largest difference allowed, relative to the largest output")
    samples: int = Field(16, ge=2, description="held-out samples that both must agree on")

    @model_validator(mode="after")
    def _made_of_onnx(self) -> NetworkExport:
        if "onnx" not in self.formats:
            raise Clash("formats must name onnx: the others are made of it", "add onnx to formats")
        return self


class NetworkBench(Section):
    """Latency of the dense and the pruned export in ONNX Runtime on this machine."""

    batch: int = Field(1, ge=1)
    processes: int = Field(5, ge=1, description="fresh processes per model, interleaved ABBA")
    threads: int = Field(1, ge=1)
    min_seconds: float = Field(1.0, gt=0)
    min_runs: int = Field(5, ge=2)


class NetworkRecipe(AnyRecipe):
    """A recipe for a plain network, trained here and judged by the measures of its tasks."""

    task: Literal["network"]
    sparsity: float | None = Field(  # type: ignore[assignment]
        None, gt=0, lt=1, description="share of all weights of convolutions and linear layers to prune"
    )
    data: DataSpec | None = Field(None, description="the model's own data where it is not said")
    arguments: dict[str, Any] = Field({}, description="of the network's function, over those of the model file")
    weights: Path | None = Field(None, description="safetensors to start from; the seed draws them otherwise")
    train: TrainSpec = Field(description="of the dense network, and of one that is pruned while it is trained")
    finetune: TrainSpec | None = Field(None, description="after pruning; by default nothing is trained then")
    sweep: list[Annotated[float, Field(gt=0, lt=1)]] = Field([], description="more sparsities to train and measure")
    export: NetworkExport | None = NetworkExport()
    bench: NetworkBench | None = NetworkBench()
