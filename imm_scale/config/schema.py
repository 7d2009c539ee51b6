"""The schema of a run: every key with its type, default and a sentence."""

from dataclasses import dataclass, field
from typing import Any, Literal

from imm_scale.choices import BackboneConfig, MethodConfig, SpaceConfig, option
from imm_scale.registry import BACKBONES, METHODS, SPACES, Registry

SEEDS = "[0, 9223372036854775807]"  # what fits torch's and numpy's generators alike


def _chosen(registry: Registry, name: str) -> Any:
    """A field for one of a registry's classes; by default that of this name."""
    return field(default_factory=lambda: registry.config(name)())


@dataclass(frozen=True)
class RunConfig:
    name: str = option("imm", "Name of the run; the default folder and the wandb name are made from it.")
    dir: str | None = option(
        None, "Folder of the run, a path or any fsspec URL; null means runs/{run.name}.", is_path=True
    )
    allow_change: list[str] = option(
        [], "Config keys (or whole sections) that may differ from the ones this run folder was started with."
    )
    from_scratch: bool = option(
        False, "Start at step 0 where the run folder has checkpoints but none of them is intact; else that is an error."
    )


@dataclass(frozen=True)
class DataConfig:
    manifest: str | None = option(None, "manifest.json of the latent shards, a path or any fsspec URL.", is_path=True)
    codec: str | None = option(
        None, "Codec the shards must come from: pixels, vae or tokens; null takes what the manifest says."
    )
    latent_shape: list[int] | None = option(
        None,
        "Channels, height and width the shards must have, or the length of their sequences of tokens; null: the "
        "manifest's.",
        range="[1, inf)",
        length="[1, 3]",
    )
    vocabulary: int | None = option(
        None, "Vocabulary the shards' tokens must have; null takes the manifest's.", range="[2, 2147483647]"
    )
    num_classes: int | None = option(
        None, "Number of classes the shards must have; null takes the manifest's.", range="[1, inf)"
    )
    block_samples: int = option(
        32, "Neighbouring samples fetched and shuffled as one block: larger reads less often.", range="[1, inf)"
    )
    flip: bool = option(
        False, "Mirror half of the samples, chosen per sample and epoch; vae shards must hold mirrored latents."
    )
    cache_dir: str | None = option(
        None, "Folder on the node's own disk that keeps blocks read from remote storage.", is_path=True
    )
    cache_bytes: int = option(
        1 << 36, "Most bytes in data.cache_dir by all ranks of a node; the oldest make room.", range="[1, inf)"
    )
    on_bad_block: Literal["stop", "skip"] = option(
        "stop", "When a block cannot be read: stop, or train on another block's samples and count it (1 % at most)."
    )
    holdout: float = option(
        0.0,
        "Samples never trained on, whose loss is logged: a share below 1, or a count; whole blocks, by the seed.",
        range="[0, inf)",
    )
    holdout_manifest: str | None = option(
        None,
        "manifest.json of samples never trained on, whose loss is logged in place of data.holdout's share.",
        is_path=True,
    )
    space: SpaceConfig = _chosen(SPACES, "latents")


@dataclass(frozen=True)
class TrainConfig:
    global_batch_size: int = option(
        4096, "Samples of one optimizer step over all ranks, a multiple of M.", range="[1, inf)"
    )
    micro_batch_size: int = option(
        64, "Most samples a rank runs at once, a multiple of M; accumulation follows.", range="[1, inf)"
    )
    max_steps: int = option(1_200_000, "Optimizer steps of the whole run.", range="[1, inf)")
    log_every: int = option(50, "Steps between records of metrics.jsonl.", range="[1, inf)")
    checkpoint_every: int = option(5000, "Steps between checkpoints; the last step always has one.", range="[1, inf)")
    keep_last: int = option(3, "Newest checkpoints kept.", range="[1, inf)")
    keep_every: int | None = option(
        None, "Checkpoints at multiples of this many steps are kept for good.", range="[1, inf)"
    )
    staging_dir: str | None = option(
        None,
        "Local folder for checkpoint files on their way to a remote run.dir; null: in the system's temporary one.",
        is_path=True,
    )
    init_from: str | None = option(
        None,
        "Weights to start from at step 0: a run folder, one of its checkpoints, or an exported file or folder.",
        is_path=True,
    )
    init_ema: float | None = option(
        None,
        "Decay of the average to take from the run in train.init_from; null takes its first, 0 the raw weights.",
        range="[0, 1)",
    )
    init_step: int | None = option(
        None, "Step to take of the run in train.init_from; null takes the newest.", range="[1, inf)"
    )
    init_allow_change: list[str] = option(
        [], "Config keys (or whole sections) in which the net of train.init_from may mean something else than this one."
    )
    activation_checkpointing: bool = option(
        False, "Recompute each block in the backward pass: less memory, a third more work."
    )
    compile: bool = option(False, "torch.compile each block (needs a C++ compiler on CPU; ZeRO stages 0-2).")
    grad_clip: float | None = option(
        None, "Clip the global gradient norm to this; null does not (as published).", range="(0, inf)"
    )
    holdout_every: int = option(
        1000, "Steps between losses of the held-out samples (data.holdout, data.holdout_manifest).", range="[1, inf)"
    )
    stop_signals: list[str] = option(
        ["SIGTERM", "SIGUSR1"],
        "Signals that ask the run to commit a checkpoint and leave; one rank that hears suffices.",
    )
    stop_before: float | None = option(
        None,
        "Commit and leave so that this many seconds remain before the SLURM job's end; null: wait for a signal.",
        range="[0, inf)",
    )
    max_consecutive_skips: int = option(
        32,
        "End the run after this many steps in a row whose gradient was not finite (fp16 may skip a dozen at first).",
        range="[1, inf)",
    )
    spike_factor: float | None = option(
        None,
        "A loss or gradient norm above this times its running median rewinds to the last checkpoint and steps "
        "over the batch; 10 is a beginning, null does not look.",
        range="(1, inf)",
    )
    max_rewinds: int = option(3, "Rewinds after which a spike ends the run (train.spike_factor).", range="[0, inf)")
    step_timeout: float | None = option(
        None,
        "Seconds after which a step counts as hanging and the job is ended, naming the rank; null: 20 times the "
        "median step, at least 600.",
        range="(0, inf)",
    )
    peak_flops: float | None = option(
        None,
        "FLOP/s one rank could reach, for the utilization (989e12: H100, bf16); null measures a matmul at start.",
        range="(0, inf)",
    )
    profile_steps: list[int] = option(
        [],
        "First and last step that rank 0 writes a torch profiler trace of, into RUN/profile; [] writes none.",
        range="[1, inf)",
        length="[0, 2]",
    )


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "radam"] = option("adamw", "AdamW (ImageNet) or RAdam (CIFAR-10).")
    lr: float = option(1e-4, "Learning rate.", range="(0, inf)")
    betas: list[float] = option([0.9, 0.999], "Decay rates of Adam's moments.", range="[0, 1)", length="[2, 2]")
    eps: float = option(
        1e-8, "Adam's epsilon; IMM's gradients are of order 1 / D, near it: watch both.", range="(0, inf)"
    )
    weight_decay: float = option(0.0, "Decoupled weight decay.", range="[0, inf)")
    warmup_images: int = option(0, "Images over which the learning rate rises linearly from 0.", range="[0, inf)")
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = option(
        "constant",
        "Learning rate after the warm-up: constant (as published), a cosine to 0 at train.max_steps, or "
        "falling with the square root of the images from optimizer.reference_images on.",
    )
    reference_images: int = option(
        143_360_000,
        "Images up to which schedule=inverse_sqrt keeps the full rate; EDM2: 70,000 batches of 2,048.",
        range="[1, inf)",
    )


@dataclass(frozen=True)
class EmaConfig:
    decays: list[float] = option(
        [0.9999], "Decay per step of each average of the weights; the first is sampled.", range="(0, 1)"
    )
    images: int | None = option(
        None,
        "Images the decays hold for, in place of a step: averages as long at any train.global_batch_size.",
        range="[1, inf)",
    )
    warmup: bool = option(
        False, "Averages start short: each reaches back a tenth of the images seen so far until its decay is longer."
    )


@dataclass(frozen=True)
class ZeroConfig:
    stage: int = option(
        1, "What ranks share: nothing (0), optimizer state (1), gradients too (2), weights too (3).", range="[0, 3]"
    )
    offload: Literal["none", "optimizer", "parameters"] = option(
        "none", "Keep in host memory: the optimizer's state (stages 1-3), or that and the weights (stage 3)."
    )
    reduce_precision: Literal["fp32", "autocast"] = option(
        "fp32",
        "Sum gradients over ranks in fp32, or in the 16 bits autocast computes them in (plain linear and conv layers): "
        "half the bytes, but a sum of many ranks loses what is small beside it.",
    )
    extra: dict[str, Any] = option({}, "DeepSpeed config keys, merged over the generated ones as they are.")


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = option(
        "auto", "auto: online where a key is set up, else offline; disabled writes nothing."
    )
    project: str = option("imm-scale", "wandb project.")
    name: str | None = option(None, "wandb name; null takes run.name.")
    group: str | None = option(None, "wandb group, for the cells of a sweep.")
    tags: list[str] = option([], "wandb tags.")


@dataclass(frozen=True)
class GuideConfig:
    """The guide of autoguidance; there is one where any of these is set."""

    source: str | None = option(
        None,
        "A weaker net to lead away from, not the null label: a run, a checkpoint, an export; null: the run itself.",
        is_path=True,
    )
    step: int | None = option(
        None, "Of the guide's run; null its newest, of the same run the model's own.", range="[1, inf)"
    )
    ema: float | None = option(
        None,
        "Decay of the guide's average, 0 its raw weights; null: of the same run sampling.ema, else its first.",
        range="[0, 1)",
    )

    @property
    def is_set(self) -> bool:
        return self != GuideConfig()


@dataclass(frozen=True)
class SamplingConfig:
    steps: list[int] = option(
        [1, 2, 4, 8], "Step counts to sample with, one result for each.", range="[1, inf)", length="[1, inf)"
    )
    num: int = option(64, "Images per step count.", range="[1, inf)")
    seed: int = option(0, "Seed of the starting noise; image i depends on it and on i alone.", range=SEEDS)
    guidance_scale: float = option(
        1.0,
        "w of w G(label) + (1 - w) G(null), the latter sampling.guide's where there is one; 1 is off, 1.5 best at XL. "
        "A net that is told its guidance (method.guidance.kind=condition) has it for one pass.",
        range="[0, inf)",
    )
    labels: str = option(
        "all", "Classes in turn: all, a range (0-9) or a list (3,7); or how many of each, as in 0:500,3-4:100."
    )
    batch_size: int = option(
        256,
        "Images held at once and kept as one part when stopped; rounded up to 64s. Image i is the same whatever.",
        range="[1, inf)",
    )
    guide: GuideConfig = field(default_factory=GuideConfig)
    sampler: Literal[
        "auto", "pushforward", "restart", "pushforward_restart", "heun", "unmask", "blocks", "verified"
    ] = option(
        "auto",
        "auto: the first that fits the method. Flow maps: pushforward (Euler for flow matching), restart (noise added "
        "between jumps), both, or heun. Tokens: unmask of masked nets; blocks or verified of causal ones.",
    )
    order: Literal["random", "left_to_right", "confidence"] = option(
        "random", "Order in which unmask draws tokens: random, left to right, or the most probable of each step."
    )
    guidance_interval: list[float] = option(
        [0.0, 1.0],
        "Guidance is in force at times above the first, up to the second, both told to nets that are told guidance.",
        range="[0, 1]",
        length="[2, 2]",
    )
    grid: str = option(
        "auto",
        "Times visited: uniform, edm (rho = 7 in eta), eta_1.4 (two steps), or a list as in 0.994,0.5,0; "
        "auto takes eta_1.4 for imm in two steps, else uniform. Of masked tokens how many each step draws: uniform, "
        "cosine, best (of the evaluation's profile), or a list as in 1,3,12,48.",
    )
    block_steps: str | None = option(
        None,
        "model.blocks above 1: steps of each block, as in 4-2-1-1, the largest of them the only one of sampling.steps; "
        "null takes all in every block.",
    )
    given: str | None = option(
        None,
        "What samples are given, in turn. Tokens: ids (n, T), -1 what is to be drawn (.npy), or jsonl with `tokens`, "
        "null the same. model.blocks above 1: npz whose latents (sample --latents) are continued after the first.",
        is_path=True,
    )
    prompt: str | None = option(None, "Text that every sample of tokens begins with.")
    given_blocks: int = option(1, "Blocks that are taken from sampling.given.", range="[1, inf)")
    profile: str | None = option(
        None,
        "Profile that grid=best takes its sizes from, as imm-scale evaluate writes it; null: the run's own.",
        is_path=True,
    )
    vae: str | None = option(
        None,
        "Folder or hub name of the AutoencoderKL that decodes vae latents (FOLDER:vae: a pipeline's); of tokens the "
        "folder of their tokenizer.json, or of the autoencoder of their codes.",
        is_path=True,
    )
    ema: float | None = option(
        None, "Decay of the moving average to sample from; null takes the first, 0 the raw weights.", range="[0, 1)"
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = option(
        "fp32", "Precision of the network's matrix products in sampling, whatever it was trained in; see precision."
    )
    compile: bool = option(
        False, "torch.compile each block for sampling: minutes at first (C++ compiler on CPU, triton on GPUs)."
    )
    vae_precision: Literal["fp32", "tf32"] = option(
        "fp32", "Precision of the autoencoder that decodes: tf32 is faster on NVIDIA GPUs."
    )


@dataclass(frozen=True)
class ExtractorConfig:
    kind: Literal["latents", "pixels", "torchscript", "onnx"] = option(
        "latents", "What samples are compared by: latents, pixels, or a network's features (torchscript, onnx)."
    )
    file: str | None = option(
        None, "File of the network, as the Inception network of FID; nothing is downloaded.", is_path=True
    )
    sha256: str | None = option(None, "sha256 the network's file must have.")
    features: str = option("0", "Features among the outputs: a number, or a name of an ONNX output.")
    logits: str | None = option(None, "Class logits among the outputs, for the Inception score.")
    spatial: str | None = option(
        None, "Features with places (4 axes, in the order of layout) among the outputs, for spatial_frechet."
    )
    arguments: dict[str, Any] = option({}, "Keyword arguments of the TorchScript network beside the images.")
    resize: int | None = option(
        None, "Side that images are resized to before the network; null leaves them.", range="[1, inf)"
    )
    filter: Literal["bilinear", "bicubic", "bilinear_antialias", "bicubic_antialias"] = option(
        "bicubic_antialias", "How they are resized; without antialiasing other numbers come out."
    )
    round: bool = option(True, "Round resized images to whole values of 0..255, as a saved image would be.")
    range: list[float] = option([0.0, 255.0], "What 0 and 255 become at the network's input.", length="[2, 2]")
    mean: list[float] = option([], "Per channel, subtracted after that.")
    std: list[float] = option([], "Per channel, divided by after that.", range="(0, inf)")
    channels: int | None = option(
        None, "Channels of the input: 3 repeats grey images; null leaves them.", range="[1, inf)"
    )
    layout: Literal["nchw", "nhwc"] = option("nchw", "Order of the input's axes.")
    order: Literal["rgb", "bgr"] = option("rgb", "Order of the input's channels.")
    dtype: Literal["float32", "uint8"] = option("float32", "Type of the input; uint8 needs a range of 0..255.")
    max_dim: int = option(
        2048, "Longer features of latents and pixels go through a fixed random projection to this.", range="[1, inf)"
    )


@dataclass(frozen=True)
class EvaluationConfig:
    steps: list[int] = option([1, 2, 4, 8], "Step counts to measure.", range="[1, inf)", length="[1, inf)")
    repeats: int = option(5, "Sampling seeds per step count; the spread over them is the error bar.", range="[1, inf)")
    num: int | None = option(None, "Samples per repeat; null means as many as the training set has.", range="[1, inf)")
    metrics: list[Any] = option(
        ["frechet"], "What is measured, by name or as {name: NAME, key: value}; the first is frechet."
    )
    reference: str | None = option(
        None,
        "Reference statistics (.npz of --make-reference, ADM or EDM; .pkl of EDM2); null: the training data.",
        is_path=True,
    )
    reference_entry: str | None = option(
        None, "Which statistics of a .pkl with several, as fd_dinov2; null takes fid with the Inception network."
    )
    brier: int = option(
        0,
        "Held-out sequences for each of which two samples are drawn, for the paired Brier score of short windows; 0: "
        "none, or 256 for samplers without a likelihood.",
        range="[0, inf)",
    )
    compared: int = option(
        10_000, "Most samples, of either side, that kernel and neighbour metrics compare.", range="[1, inf)"
    )
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Config:
    plugins: list[str] = option([], "Modules that register methods, backbones, sample spaces or metrics of your own.")
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = option(0, "Seed of weights, sample order and every draw.", range=SEEDS)
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = option(
        "fp32", "Precision of the network's matrix products; everything around the network stays in fp32 or better."
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: BackboneConfig = _chosen(BACKBONES, "dit")
    method: MethodConfig = _chosen(METHODS, "imm")
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.run.name}"

    @property
    def ema_power(self) -> float:
        """What a decay is raised to for one step: its images over those the decay is meant for."""
        return 1.0 if self.ema.images is None else self.train.global_batch_size / self.ema.images
