"""Samples per second into a ready batch, over named peers on the same samples in the same run.

    python -m benchmarks.loader [--samples 32768] [--s3]

Peers: stock webdataset decoding npy, stock webdataset handing out raw bytes, mosaicml-streaming on its own format (in
a virtual environment of its own, made below --folder), and plain reading of the same bytes. The data set is
several times what our loader holds in memory, so that an epoch is read from the files again. Theirs are stacked as
stored, in fp16. Ours are counted three times: as stored, which is what a GPU is given to draw and normalize; normalized
to fp32 on this CPU; and drawn from the posterior and normalized here. Only ratios mean something: run it on a quiet
machine.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import torch
import webdataset as wds

from benchmarks.random_shards import SHAPE, SHARD, write
from imm_scale import storage
from imm_scale.data.loader import Loader
from imm_scale.data.sample_order import Layout

BATCH, EPOCHS = 256, 1
_PEER = ["mosaicml-streaming==0.13.0", "boto3", "s3transfer", "brotli", "python-snappy", "cramjam", "zstd", "paramiko"]
_PEER += ["catalogue", "transformers<5", "tokenizers<0.23", "huggingface_hub<1"]


def rate(batches: Callable[[], Iterator[int]], samples: int) -> float:
    """Samples per second over an epoch, after one that fills caches and touches memory for the first time."""
    began, count = 0.0, 0
    while True:
        for size in batches():
            count += size
            if not began and count >= samples:
                began, count = time.perf_counter(), 0
            if began and count >= EPOCHS * samples:
                return count / (time.perf_counter() - began)


def ours(manifest: str, device: str = "cpu") -> Iterator[int]:
    with Loader(manifest, Layout(BATCH, 4, 1, BATCH), 0, 0, 32, device=device) as loader:
        for batch in loader:
            yield len(batch.x)


def tars_of(url: str) -> list[str]:
    return [f"{url}/{name}" for name in storage.list_names(url) if name.endswith(".tar")]


def stock(url: str, decode: bool) -> Iterator[int]:
    """Stock webdataset over the same tars, batched: decoded and stacked to a tensor, or lists of bytes."""
    wds.gopen_schemes["s3"] = lambda url, mode="rb", bufsize=8192: fsspec.filesystem("s3").open(url, mode)
    data = wds.WebDataset(tars_of(url), shardshuffle=False)
    if decode:
        for batch in data.decode().to_tuple("latent.npy", "cls").batched(BATCH):
            yield len(torch.as_tensor(np.asarray(batch[0])))
    else:
        for raw in data.to_tuple("latent.npy", "cls").batched(BATCH, collation_fn=list):
            yield len(raw)


def sequential(folder: str) -> Iterator[int]:
    for path in tars_of(folder):
        with open(path, "rb", buffering=0) as file:
            while file.read(8 << 20):
                pass
        yield SHARD


def ranged(url: str) -> Iterator[int]:
    """The same tars in ranges of 4 MiB, 16 at once, thrown away: what the server gives on these cores."""
    tars = tars_of(url)
    ranges = [(tar, start) for tar in tars for start in range(0, storage.size(tar), 4 << 20)]
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(lambda one: storage.read_into(*one, memoryview(bytearray(4 << 20))), ranges):
            yield 0
    yield SHARD * len(tars)


def peer_python(folder: Path) -> str:
    """The interpreter of a virtual environment that sees this one's packages and has the peer beside them.

    torchvision, which the peer imports for its vision data sets, is replaced by empty names there: none is used.
    """
    home = folder / "peer"
    python = str(home / "bin" / "python")
    if not (home / "ready").exists():
        venv.create(home, clear=True)
        packages = next(home.glob("lib/python*/site-packages"))
        (packages / "project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(packages), *_PEER], check=True)
        (packages / "torchvision" / "transforms").mkdir(parents=True)
        (packages / "torchvision" / "__init__.py").touch()
        (packages / "torchvision" / "transforms" / "__init__.py").touch()
        (packages / "torchvision" / "datasets.py").write_text("VisionDataset = CIFAR10 = object\n")
        (packages / "torchvision" / "transforms" / "functional.py").write_text("to_tensor = None\n")
        (home / "ready").touch()
    return python


def peer(python: str, folder: Path, shards: int, remote: str | None) -> float:
    """mosaicml-streaming's rate, printed last by its own process."""
    env = {**os.environ, "S3_ENDPOINT_URL": os.environ.get("AWS_ENDPOINT_URL", ""), "TOKENIZERS_PARALLELISM": "false"}
    script = str(Path(__file__).with_name("loader_peer.py"))
    command = [python, script, str(folder / "mds"), str(shards), remote or ""]
    result = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return float(result.stdout.split()[-1])


def measure(name: str, runs: Callable[[], float], repeats: int) -> float:
    rates = [runs() for _ in range(repeats)]
    print(f"  {name:42} {statistics.median(rates):10,.0f} samples/s", flush=True)
    return statistics.median(rates)


def compare(where: str, url: dict[str, str], args: argparse.Namespace, folder: Path, remote: str | None) -> None:
    print(f"{where}, {args.samples} samples of {np.prod(SHAPE) * 2 // 1024} KiB, batches of {BATCH}:")
    root, shards = storage.parent(url["pixels"]), args.samples // SHARD
    python = peer_python(folder)
    counted = {
        # The meta device computes nothing: what is left is the host's part.
        "ours, as stored": lambda: rate(lambda: ours(url["pixels"], "meta"), args.samples),
        "ours, normalized": lambda: rate(lambda: ours(url["pixels"]), args.samples),
        "ours, drawn and normalized": lambda: rate(lambda: ours(url["vae"]), args.samples),
    }
    rates = {name: measure(name, run, args.repeats) for name, run in counted.items()}
    peers = {
        "stock webdataset, npy decoded": lambda: rate(lambda: stock(root, True), args.samples),
        "stock webdataset, raw bytes": lambda: rate(lambda: stock(root, False), args.samples),
        "mosaicml-streaming": lambda: peer(python, folder, shards, remote),
    }
    if remote is None:
        peers["plain sequential reading"] = lambda: rate(lambda: sequential(root), args.samples)
    else:
        peers["plain ranged reading"] = lambda: rate(lambda: ranged(root), args.samples)
    for name, run in peers.items():
        other = measure(name, run, args.repeats)
        print("    " + "; ".join(f"{mine} {value / other:.2f} times" for mine, value in rates.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32768, help="a multiple of 1024 (default 32768)")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts (default 3)")
    parser.add_argument("--folder", help="for data and the peer's environment (default: a temporary one)")
    parser.add_argument("--s3", action="store_true", help="also over a SeaweedFS server on this machine")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(args.folder or tempfile.mkdtemp(prefix="imm-loader-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shards = args.samples // SHARD
        local = {kind: write(str(folder / kind), kind, shards) for kind in ("pixels", "vae")}
        compare("local files", local, args, folder, None)
        if args.s3:
            with s3_server(folder) as bucket:
                url = {kind: write(f"{bucket}/{kind}", kind, shards) for kind in ("pixels", "vae")}
                compare("S3 on this machine", url, args, folder, f"{bucket}/mds")
    finally:
        if not args.folder:
            shutil.rmtree(folder)


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    from tests.storage.seaweed import Server

    shutil.rmtree(folder / "weed", ignore_errors=True)
    (folder / "weed").mkdir()
    server = Server(folder / "weed")
    server.start()
    os.environ.update(server.env())
    try:
        fsspec.filesystem("s3").mkdir("benchmark")
        yield "s3://benchmark"
    finally:
        server.kill()
        shutil.rmtree(folder / "weed")


if __name__ == "__main__":
    main()
