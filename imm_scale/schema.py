"""The schema of a run: every key with its type, default and a sentence."""

from dataclasses import dataclass, field
from typing import Any, Literal


def _opt(default: Any, help: str) -> Any:
    """A field with its sentence; mutable defaults are copied for each instance."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    name: str = _opt("imm", "Name of the run; the default folder and the wandb name are made from it.")
    dir: str | None = _opt(None, "Folder of the run, a path or any fsspec URL; null means runs/{run.name}.")
    allow_change: list[str] = _opt(
        [], "Config keys (or whole sections) that may differ from the ones this run folder was started with."
    )
    from_scratch: bool = _opt(
        False, "Start at step 0 where the run folder has checkpoints but none of them is intact; else that is an error."
    )


@dataclass(frozen=True)
class DataConfig:
    manifest: str | None = _opt(None, "manifest.json of the latent shards, a path or any fsspec URL.")
    codec: str | None = _opt(None, "Codec the shards must come from: pixels or vae; null takes what the manifest says.")
    latent_shape: list[int] | None = _opt(
        None, "Channels, height and width the shards must have; null: the manifest's."
    )
    num_classes: int | None = _opt(None, "Number of classes the shards must have; null takes the manifest's.")
    block_samples: int = _opt(32, "Neighbouring samples fetched and shuffled as one block: larger reads less often.")
    flip: bool = _opt(
        False, "Mirror half of the samples, chosen per sample and epoch; vae shards must hold mirrored latents."
    )
    cache_dir: str | None = _opt(None, "Folder on the node's own disk that keeps blocks read from remote storage.")
    cache_bytes: int = _opt(1 << 36, "Most bytes kept in data.cache_dir by all ranks of a node; the oldest make room.")
    on_bad_block: Literal["stop", "skip"] = _opt(
        "stop", "When a block cannot be read: stop, or train on another block's samples and count it (1 % at most)."
    )
    holdout: float = _opt(
        0.0, "Samples never trained on, whose loss is logged: a share below 1, or a count; whole blocks, by the seed."
    )


@dataclass(frozen=True)
class ModelConfig:
    size: str = _opt("DiT-S/2", "Row of the size table: DiT-{S,B,L,XL}/{2,4,8}; the other keys override its numbers.")
    width: int | None = _opt(None, "Channels of the transformer; null takes the size's.")
    depth: int | None = _opt(None, "Number of blocks; null takes the size's.")
    heads: int | None = _opt(None, "Attention heads, a divisor of the width; null takes the size's.")
    patch_size: int | None = _opt(None, "Side of a patch in latent pixels; null takes the size's.")
    mlp_ratio: float = _opt(4.0, "Hidden width of the MLP over the width.")
    qk_norm: bool = _opt(False, "RMS-normalize queries and keys: steadier at high learning rates, not in the paper.")
    dropout: float = _opt(0.0, "Dropout inside the blocks; both branches of IMM share the mask.")
    attention: Literal["sdpa", "xformers"] = _opt(
        "sdpa", "Attention kernel: torch's, or xformers' where CUDA and the package are there."
    )


@dataclass(frozen=True)
class FlowMapConfig:
    trajectory: Literal["ot_fm", "vp_cosine"] = _opt(
        "ot_fm", "Path from data to noise: straight lines (ot_fm, the paper's choice) or variance preserving."
    )
    parameterization: Literal["identity", "simple_edm", "euler_fm"] = _opt(
        "euler_fm", "What the net predicts: data, an EDM-like velocity (any trajectory), or the mean velocity (ot_fm)."
    )
    second_time: Literal["s", "t_minus_s", "none"] = _opt(
        "s", "How the net is told where to land: s, t - s (best at XL with a = 2), or not at all (flow matching)."
    )
    sigma_data: float = _opt(0.5, "Standard deviation of data and prior after normalization.")
    time_embedding: Literal["positional", "fourier"] = _opt(
        "positional", "Sinusoids of the times: geometric frequencies (stable) or random ones of scale 16."
    )
    time_scale: float = _opt(1000.0, "Times are multiplied by this before they are embedded.")


@dataclass(frozen=True)
class ObjectiveConfig:
    name: Literal["imm", "flow_matching", "consistency", "gmmn"] = _opt(
        "imm", "Training loss: inductive moment matching, the baseline, or one of the two methods IMM contains."
    )
    particles: int = _opt(4, "M, samples that share one (s, r, t): 4 is best at fixed batch, 1 and 2 collapse.")
    kernel: Literal["laplace", "rbf", "energy", "pseudo_huber"] = _opt("laplace", "Kernel of the discrepancy.")
    mapping: Literal["eta", "t", "log_snr", "inverse_eta"] = _opt(
        "eta", "Coordinate in which r lies a constant step nearer to the data than t."
    )
    k: int = _opt(12, "The step is the coordinate's range / 2^k: 11 to 13 are stable on latents, 15 on CIFAR-10.")
    min_gap: float | None = _opt(None, "Least t - r; null means 0 in fp32 and tf32, 1e-4 in fp16 and bf16.")
    eta_max: float = _opt(160.0, "Upper end of the range of sigma / alpha.")
    eta_min: float = _opt(0.0, "Lower end of the range of sigma / alpha.")
    t_min: float = _opt(0.0, "Smallest time: 0 on latents, 0.006 on pixels.")
    t_max: float | None = _opt(
        None, "Largest time; null: 0.994 on ot_fm and 0.996 on vp_cosine for imm, 1 for flow_matching."
    )
    a: float = _opt(1.0, "Power of alpha in the weight: 1, or 2 with second_time=t_minus_s.")
    b: float = _opt(4.0, "Shift of the sigmoid in the weight: 4 on latents, 5 on CIFAR-10.")
    weight_factors: list[Literal["sigmoid", "dlog_snr_dt", "alpha"]] = _opt(
        ["sigmoid", "dlog_snr_dt", "alpha"], "Factors of the weight; leave some out only to see what they do."
    )
    label_drop: float = _opt(0.1, "Share of samples trained without their label; guidance needs it above 0.")


@dataclass(frozen=True)
class TrainConfig:
    global_batch_size: int = _opt(4096, "Samples of one optimizer step over all ranks, a multiple of M.")
    micro_batch_size: int = _opt(64, "Most samples a rank runs at once, a multiple of M; accumulation follows.")
    max_steps: int = _opt(1_200_000, "Optimizer steps of the whole run.")
    log_every: int = _opt(50, "Steps between records of metrics.jsonl.")
    checkpoint_every: int = _opt(5000, "Steps between checkpoints; the last step always has one.")
    keep_last: int = _opt(3, "Newest checkpoints kept.")
    keep_every: int | None = _opt(None, "Checkpoints at multiples of this many steps are kept for good.")
    staging_dir: str | None = _opt(
        None, "Local folder for checkpoint files on their way to a remote run.dir; null: in the system's temporary one."
    )
    init_from: str | None = _opt(None, "Weights to start from: a run folder, or an exported file or folder.")
    activation_checkpointing: bool = _opt(
        False, "Recompute each block in the backward pass: less memory, a third more work."
    )
    compile: bool = _opt(False, "torch.compile each block (needs a C++ compiler on CPU; ZeRO stages 0-2).")
    grad_clip: float | None = _opt(None, "Clip the global gradient norm to this; null does not (as published).")
    holdout_every: int = _opt(1000, "Steps between losses of the held-out samples (data.holdout).")
    stop_signals: list[str] = _opt(
        ["SIGTERM", "SIGUSR1"],
        "Signals that ask the run to commit a checkpoint and leave; one rank that hears suffices.",
    )
    stop_before: float | None = _opt(
        None, "Commit and leave so that this many seconds remain before the SLURM job's end; null: wait for a signal."
    )
    max_consecutive_skips: int = _opt(
        32, "End the run after this many steps in a row whose gradient was not finite (fp16 may skip a dozen at first)."
    )
    spike_factor: float | None = _opt(
        None,
        "A loss or gradient norm above this times its running median rewinds to the last checkpoint and steps "
        "over the batch; 10 is a beginning, null does not look.",
    )
    max_rewinds: int = _opt(3, "Rewinds after which a spike ends the run (train.spike_factor).")
    step_timeout: float | None = _opt(
        None,
        "Seconds after which a step counts as hanging and the job is ended, naming the rank; null: 20 times the "
        "median step, at least 600.",
    )
    peak_flops: float | None = _opt(
        None, "FLOP/s one rank could reach, for the utilization (989e12: H100, bf16); null measures a matmul at start."
    )
    profile_steps: list[int] = _opt(
        [], "First and last step that rank 0 writes a torch profiler trace of, into RUN/profile; [] writes none."
    )


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "radam"] = _opt("adamw", "AdamW (ImageNet) or RAdam (CIFAR-10).")
    lr: float = _opt(1e-4, "Learning rate.")
    betas: list[float] = _opt([0.9, 0.999], "Decay rates of Adam's moments.")
    eps: float = _opt(1e-8, "Adam's epsilon; IMM's gradients are of order 1 / D, near it: watch both.")
    weight_decay: float = _opt(0.0, "Decoupled weight decay.")
    warmup_images: int = _opt(0, "Images over which the learning rate rises linearly from 0.")
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = _opt(
        "constant",
        "Learning rate after the warm-up: constant (as published), a cosine to 0 at train.max_steps, or "
        "falling with the square root of the images from optimizer.reference_images on.",
    )
    reference_images: int = _opt(
        143_360_000, "Images up to which schedule=inverse_sqrt keeps the full rate; EDM2: 70,000 batches of 2,048."
    )


@dataclass(frozen=True)
class EmaConfig:
    decays: list[float] = _opt([0.9999], "Decay per step of each moving average of the weights; the first is sampled.")
    images: int | None = _opt(
        None, "Images the decays hold for, in place of a step: averages as long at any train.global_batch_size."
    )


@dataclass(frozen=True)
class ZeroConfig:
    stage: int = _opt(1, "What ranks share: nothing (0), optimizer state (1), gradients too (2), weights too (3).")
    offload: Literal["none", "optimizer", "parameters"] = _opt(
        "none", "Keep in host memory: the optimizer's state (stages 1-3), or that and the weights (stage 3)."
    )
    reduce_precision: Literal["fp32", "autocast"] = _opt(
        "fp32",
        "Sum gradients over ranks in fp32, or in the 16 bits autocast computes them in (plain linear and conv layers): "
        "half the bytes, but a sum of many ranks loses what is small beside it.",
    )
    extra: dict[str, Any] = _opt({}, "DeepSpeed config keys, merged over the generated ones as they are.")


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = _opt(
        "auto", "auto: online where a key is set up, else offline; disabled writes nothing."
    )
    project: str = _opt("imm-scale", "wandb project.")
    name: str | None = _opt(None, "wandb name; null takes run.name.")
    group: str | None = _opt(None, "wandb group, for the cells of a sweep.")
    tags: list[str] = _opt([], "wandb tags.")


@dataclass(frozen=True)
class SamplingConfig:
    steps: list[int] = _opt([1, 2, 4, 8], "Step counts to sample with, one result for each.")
    num: int = _opt(64, "Images per step count.")
    seed: int = _opt(0, "Seed of the starting noise; image i depends on it and on i alone.")
    guidance_scale: float = _opt(1.0, "w of w G(label) + (1 - w) G(null); 1 is off, 1.5 is best at ImageNet XL.")
    labels: str = _opt(
        "all", "Classes in turn: all, a range (0-9) or a list (3,7); or how many of each, as in 0:500,3-4:100."
    )
    batch_size: int = _opt(
        256, "Images held at once and kept as one part when stopped; rounded up to 64s. Image i is the same whatever."
    )
    sampler: Literal["pushforward", "restart", "pushforward_restart", "heun"] = _opt(
        "pushforward", "pushforward (Euler for flow matching), restart (noise added between jumps), both, or heun."
    )
    guidance_interval: list[float] = _opt(
        [0.0, 1.0], "Guidance is in force at times above the first, up to the second."
    )
    grid: str = _opt(
        "auto",
        "Times visited: uniform, edm (rho = 7 in eta), eta_1.4 (two steps), or a list as in 0.994,0.5,0; "
        "auto takes eta_1.4 for imm in two steps, else uniform.",
    )
    vae: str | None = _opt(None, "Folder of the AutoencoderKL that decodes vae latents; pixels need none.")
    ema: float | None = _opt(
        None, "Decay of the moving average to sample from; null takes the first, 0 the raw weights."
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = _opt(
        "fp32", "Precision of the network's matrix products in sampling, whatever it was trained in; see precision."
    )
    compile: bool = _opt(
        False, "torch.compile each block for sampling: minutes at first (C++ compiler on CPU, triton on GPUs)."
    )
    vae_precision: Literal["fp32", "tf32"] = _opt(
        "fp32", "Precision of the autoencoder that decodes: tf32 is faster on NVIDIA GPUs."
    )


@dataclass(frozen=True)
class ExtractorConfig:
    kind: Literal["latents", "pixels", "torchscript", "onnx"] = _opt(
        "latents", "What samples are compared by: latents, pixels, or a network's features (torchscript, onnx)."
    )
    file: str | None = _opt(None, "File of the network, as the Inception network used for FID; nothing is downloaded.")
    sha256: str | None = _opt(None, "sha256 the network's file must have.")
    features: str = _opt("0", "Features among the outputs: a number, or a name of an ONNX output.")
    logits: str | None = _opt(None, "Class logits among the outputs, for the Inception score.")
    arguments: dict[str, Any] = _opt({}, "Keyword arguments of the TorchScript network beside the images.")
    resize: int | None = _opt(None, "Side that images are resized to before the network; null leaves them.")
    filter: Literal["bilinear", "bicubic", "bilinear_antialias", "bicubic_antialias"] = _opt(
        "bicubic_antialias", "How they are resized; without antialiasing other numbers come out."
    )
    round: bool = _opt(True, "Round resized images to whole values of 0..255, as a saved image would be.")
    range: list[float] = _opt([0.0, 255.0], "What 0 and 255 become at the network's input.")
    mean: list[float] = _opt([], "Per channel, subtracted after that.")
    std: list[float] = _opt([], "Per channel, divided by after that.")
    channels: int | None = _opt(None, "Channels of the input: 3 repeats grey images; null leaves them.")
    layout: Literal["nchw", "nhwc"] = _opt("nchw", "Order of the input's axes.")
    order: Literal["rgb", "bgr"] = _opt("rgb", "Order of the input's channels.")
    dtype: Literal["float32", "uint8"] = _opt("float32", "Type of the input; uint8 needs a range of 0..255.")
    max_dim: int = _opt(2048, "Longer features of latents and pixels go through a fixed random projection to this.")


@dataclass(frozen=True)
class EvaluationConfig:
    steps: list[int] = _opt([1, 2, 4, 8], "Step counts to measure.")
    repeats: int = _opt(5, "Sampling seeds per step count; the spread over them is the error bar.")
    num: int | None = _opt(None, "Samples per repeat; null means as many as the training set has.")
    metrics: list[Literal["frechet", "kernel", "precision_recall", "density_coverage", "inception_score"]] = _opt(
        ["frechet"], "What is measured; the first is frechet."
    )
    reference: str | None = _opt(
        None, "Reference statistics (.npz of --make-reference, ADM or EDM); null: the training data."
    )
    compared: int = _opt(10_000, "Most samples, of either side, that kernel and neighbour metrics compare.")
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = _opt(0, "Seed of weights, sample order and every draw.")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = _opt(
        "fp32", "Precision of the network's matrix products; everything around the network stays in fp32 or better."
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow_map: FlowMapConfig = field(default_factory=FlowMapConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
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
