"""Windows per second of imm-scale pack-tokens, over a loop around stock webdataset's ShardWriter.

    python -m benchmarks.pack_tokens [--source python] [--tokenizer bytes] [--length 64] [--repeats 3]

Both read the same documents, encode them by the same tokenizer, cut the same windows, shuffle them once and write tars
of KEY.tokens.npy and KEY.cls; ours also writes checked indices, hashes and the manifest, and holds out documents. Runs
alternate, and the ratio is of the medians: of wall-clock time, and of this process's CPU time, which neighbours on the
machine disturb less.
"""

import argparse
import contextlib
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import webdataset as wds

from data_tools import pack_tokens
from data_tools.tokens.texts import texts
from imm_scale.data.manifest import Manifest, TokenCodec
from imm_scale.data.tokens.tokenizers import open_tokenizer

SHARD = 8192


def ours(args: argparse.Namespace, out: str) -> int:
    """Windows written."""
    words = ["--source", args.source, "--tokenizer", args.tokenizer, "--length", str(args.length), "--out", out]
    with contextlib.redirect_stdout(io.StringIO()):
        assert pack_tokens.main([*words, "--shard-samples", str(SHARD)]) == 0
    return sum(Manifest.load(f"{out}/{part}manifest.json").num_samples for part in ("", "heldout/"))


def stock(args: argparse.Namespace, out: str) -> int:
    """Windows written."""
    tokenizer = open_tokenizer(args.tokenizer)
    dtype = TokenCodec(tokenizer.vocabulary, tokenizer.name, tokenizer.hash).stored_dtype
    windows: list[np.ndarray] = []
    for document in texts(args.source, 0.0).documents:
        ids = tokenizer.encode(document.content, document.name).astype(dtype)
        windows += [ids[i : i + args.length] for i in range(0, len(ids) - args.length + 1, args.length)]
    random.Random(0).shuffle(windows)
    with wds.ShardWriter(f"{out}/%06d.tar", maxcount=SHARD, verbose=0) as writer:
        for number, window in enumerate(windows):
            writer.write({"__key__": f"{number:08d}", "tokens.npy": window, "cls": 0})
    return len(windows)


def timed(write: Callable[[argparse.Namespace, str], int], args: argparse.Namespace) -> tuple[float, float]:
    """Windows per second of wall-clock and of CPU time."""
    with tempfile.TemporaryDirectory(prefix="pack-tokens-") as out:
        wall, cpu = time.perf_counter(), time.process_time()
        windows = write(args, out)
        return windows / (time.perf_counter() - wall), windows / (time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="python")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rates = [(timed(ours, args), timed(stock, args)) for _ in range(args.repeats)]
    for kind, name in enumerate(("wall-clock", "CPU")):
        mine, theirs = (statistics.median(pair[who][kind] for pair in rates) for who in (0, 1))
        print(f"{name:10s}  ours {mine:9.0f} windows/s  ShardWriter {theirs:9.0f} windows/s  ratio {mine / theirs:.2f}")


if __name__ == "__main__":
    main()
