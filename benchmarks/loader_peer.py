"""mosaicml-streaming's side of benchmarks/loader.py, run by its own interpreter: FOLDER SHARDS [REMOTE]."""

import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset

SHAPE, BATCH, SHARD, EPOCHS = (8, 32, 32), 256, 1024, 1


def main() -> None:
    torch.set_num_threads(1)
    folder, shards, remote = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    shutil.rmtree(folder, ignore_errors=True)
    columns = {"latent": "ndarray:float16:" + ",".join(map(str, SHAPE)), "label": "int"}
    with MDSWriter(out=remote or str(folder), columns=columns, size_limit=SHARD * 16500) as writer:
        for s in range(shards):
            values = np.random.default_rng(s).standard_normal((SHARD, *SHAPE), np.float32)
            for latent in np.clip(np.abs(values) / 8, 0, 1).astype(np.float16):
                writer.write({"latent": latent, "label": 0})
    began, count = time.perf_counter(), 0
    data = StreamingDataset(local=str(folder), remote=remote or None, batch_size=BATCH, shuffle=True)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=0)
    for epoch in range(EPOCHS + 1):
        if epoch == 1:
            began, count = time.perf_counter(), 0
        for batch in loader:
            count += len(batch["latent"])
    print(count / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
