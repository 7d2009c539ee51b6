"""What samples are compared with: moments of a reference set's features, and a random subset of them.

The .npz file has the keys `mu` and `sigma` of the ADM and EDM evaluators, and reads in theirs; theirs read here. Its
further keys say which extractor made it: `count`, `features` (K, F) fp32, and `imm_scale`, a JSON text. `mu_s` and
`sigma_s` are ADM's too, of features with places. EDM2's .pkl files, {name: {mu, sigma}, num_images}, are read as data.
"""

import hashlib
import io
import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from imm_scale import storage
from imm_scale.checkpoint.released import arrays as arrays_of
from imm_scale.config.schema import EvaluationConfig
from imm_scale.data.dataset import Dataset, read_indexed
from imm_scale.data.spaces import SampleSpace
from imm_scale.errors import UserError
from imm_scale.evaluation import extractors
from imm_scale.evaluation.collect import Collector, Features
from imm_scale.evaluation.extractors import Extractor
from imm_scale.evaluation.images import CHUNK, ImageSet
from imm_scale.evaluation.metrics.frechet import Given, Moments, Root, square_root
from imm_scale.evaluation.networks import STANDARD_ID
from imm_scale.parallel.world import World

FORMAT_VERSION = 1
log = logging.getLogger("imm_scale")
_Batch = TypeVar("_Batch")


@dataclass(frozen=True)
class Reference:
    """A reference set.

    Attributes:
        mean, covariance: (F,) and (F, F) fp64 moments of its features.
        count: images behind them, None where the file does not say.
        kept: (K, F) fp32 features of a random subset, None where the file has none.
        extractor: name, id and identity of what made the features, None where the file does not say.
        source: what it was made from, and how.
        spatial: moments of features with places, None where the file has none.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None
    kept: Tensor | None
    extractor: dict[str, Any] | None
    source: dict[str, Any]
    spatial: Given | None = None

    @cached_property
    def id(self) -> str:
        """sha256 of the moments."""
        digest = hashlib.sha256(self.mean.numpy().tobytes())
        digest.update(self.covariance.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def root(self) -> Root:
        """Square root of the covariance, taken at the first use."""
        return square_root(self.covariance)

    def check(self, extractor: Extractor, image_size: tuple[int, int] | None = None) -> None:
        """Refuses a reference of another extractor; one that does not say is taken at its user's word, with a warning.

        Args:
            image_size: height and width of the images to be measured, None for latents.

        Raises:
            UserError: naming both extractors, or both sizes.
        """
        size = self.source.get("image_size")
        if size is not None and image_size is not None and tuple(size) != image_size:
            raise UserError(
                f"the images have {image_size[1]}x{image_size[0]} pixels, those of the reference {size[1]}x{size[0]}: "
                "make a reference of images of that size"
            )
        ours = extractors.describe(extractor)
        if self.extractor is None:
            log.warning("the reference does not say which extractor made it: it is taken to be %s", ours["name"])
        elif self.extractor["id"] != ours["id"]:
            theirs = self.extractor
            raise UserError(
                f"the reference was made with the extractor {theirs['name']} ({theirs['id'][:12]}), the samples are to "
                f"be measured with {ours['name']} ({ours['id'][:12]}): use one for both "
                f"(reference: {_identity(theirs)}; samples: {_identity(ours)})"
            )

    def save(self, url: str) -> None:
        """Writes an .npz with `mu` and `sigma` as other tools read them, and what `load` needs beside."""
        arrays: dict[str, Any] = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.count is not None:
            arrays["count"] = np.int64(self.count)
        if self.kept is not None:
            arrays["features"] = self.kept.numpy()
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean.numpy(), "sigma_s": self.spatial.covariance.numpy()}
        about = {"format_version": FORMAT_VERSION, "extractor": self.extractor, "source": self.source}
        stream = io.BytesIO()
        np.savez(stream, **arrays, imm_scale=np.array(json.dumps(about, sort_keys=True)))
        storage.write_bytes(url, stream.getvalue())

    @classmethod
    def load(cls, url: str, entry: str | None = None) -> "Reference":
        """Reads a file of ours, of ADM's or of EDM's (keys mu and sigma), or one of EDM2's.

        Args:
            entry: which of an EDM2 file's statistics.

        Raises:
            UserError: no such file, neither .npz nor .pkl, no mu and sigma, no such entry, anything in a .pkl but
                arrays (by its name), or a newer format.
        """
        arrays = _read(url, entry)
        about: dict[str, Any] = {"format_version": 0}
        if "imm_scale" in arrays:
            about = json.loads(str(arrays["imm_scale"]))
        if about["format_version"] > FORMAT_VERSION:
            raise UserError(f"{url} was written by a newer imm-scale (format {about['format_version']}); update it")
        moments = _gaussian(arrays, "mu", "sigma", url)
        return cls(
            moments.mean,
            moments.covariance,
            int(arrays["count"]) if "count" in arrays else None,
            torch.from_numpy(arrays["features"]).float() if "features" in arrays else None,
            about.get("extractor"),
            about.get("source", {"file": storage.shown(url), **({} if entry is None else {"entry": entry})}),
            _gaussian(arrays, "mu_s", "sigma_s", url) if "mu_s" in arrays else None,
        )


# --- files ---

# What numpy and zipfile raise for damaged bytes.
_DAMAGED = (ValueError, EOFError, KeyError, NotImplementedError, BadZipFile, zlib.error)
_KEYS = ("mu", "sigma", "mu_s", "sigma_s", "count", "features", "imm_scale")


def _read(url: str, entry: str | None) -> dict[str, Any]:
    """{key: array} of a file's statistics."""
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise UserError(
            f"the reference {url} does not exist: write it with imm-scale evaluate --make-reference"
        ) from error
    if data[:1] == b"\x80":  # a pickle's first instruction: its protocol
        return _entry(arrays_of.load_arrays(data, f"the reference {url}"), url, entry)
    if entry is not None:
        raise UserError(f"evaluation.reference_entry={entry}: {url} is no .pkl file, and holds one set of statistics")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in _KEYS if name in file}
    except (*_DAMAGED, OSError) as error:
        raise UserError(f"the reference {url} is no .npz file, and no .pkl file of arrays ({error})") from error


def _entry(document: Any, url: str, entry: str | None) -> dict[str, Any]:
    """One of EDM2's {name: {mu, sigma}}, with the count that stands beside them."""
    entries = {}
    if isinstance(document, dict):
        entries = {str(name): value for name, value in document.items() if isinstance(value, dict)}
    if entry is None or entry not in entries:
        given = "" if entry is None else f"evaluation.reference_entry={entry}: "
        has = ", ".join(sorted(entries)) or "none"
        raise UserError(f"{given}the reference {url} has statistics by name ({has}): choose by reference_entry")
    count = document.get("num_images")
    counted = {"count": count} if isinstance(count, int | np.ndarray) and np.ndim(count) == 0 else {}
    return {**{key: value for key, value in entries[entry].items() if isinstance(value, np.ndarray)}, **counted}


def _gaussian(arrays: Mapping[str, Any], mean: str, covariance: str, url: str) -> Given:
    mu, sigma = arrays.get(mean), arrays.get(covariance)
    if mu is None or sigma is None or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(
            f"the reference {url} has no {mean} (F,) and {covariance} (F, F): write it with --make-reference"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"the reference {url} has {mean} or {covariance} that is not finite: it is damaged")
    return Given(torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64)))


def open_reference(config: EvaluationConfig, extractor: Extractor) -> Reference:
    """`evaluation.reference`; of an EDM2 file, the entry that is asked for, or `fid` for the network of FIDs."""
    assert config.reference is not None
    entry = config.reference_entry
    if entry is None and storage.read_bytes(config.reference)[:1] == b"\x80":
        entry = "fid" if extractors.identity_hash(extractor.identity) == STANDARD_ID else None
    return Reference.load(config.reference, entry)


def _identity(extractor: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in extractor.items() if key not in ("name", "id")}, sort_keys=True)


def _reference(features: Features, extractor: Extractor, source: dict[str, Any]) -> Reference:
    moments = features.moments
    spatial = Moments.merged(features.spatial_groups) if features.spatial_groups else None
    return Reference(
        moments.mean,
        moments.covariance,
        moments.count,
        features.kept,
        extractors.describe(extractor),
        source,
        None if spatial is None else Given(spatial.mean, spatial.covariance),
    )


def of_images(images: ImageSet, extractor: Extractor, most: int, world: World) -> Reference:
    """Of a set of images, ranks sharing the work.

    Args:
        most: feature vectors kept.

    Raises:
        UserError: an extractor that takes latents, or images that cannot be read.
    """
    if extractor.takes != "images":
        raise UserError(
            f"{images.url} holds images, the extractor {extractor.name} takes latents: "
            "set evaluation.extractor.kind=pixels, torchscript or onnx, or give a manifest.json of latents"
        )
    collector = Collector(len(images), most, "reference image")
    size = next(images.read())[1].shape[1:3]
    for index, batch in shown(images.read(world.rank, world.size), len(images), world):
        collector.add(index, extractor(batch))
    source = {"images": storage.shown(images.url), "image_size": list(size)}
    return _reference(collector.merge_ranks(), extractor, source)


def shown(batches: Iterable[_Batch], num: int, world: World) -> Iterable[_Batch]:
    """Batches of CHUNK of `num` samples on these ranks, with a progress bar on rank 0's terminal."""
    hidden = None if world.is_main else True
    total = -(-num // (CHUNK * world.size))
    return tqdm(batches, desc="measuring", total=total, unit="batch", disable=hidden, leave=False)


def of_manifest(
    manifest_url: str, extractor: Extractor, most: int, world: World, seed: int, space: SampleSpace, decode: Any
) -> Reference:
    """Of a data set of latents: themselves, or the images the codec makes of them.

    Args:
        seed: of what is drawn of a stored sample.
        space: what samples are to the net.
        decode: latents to uint8 images; called only where the extractor takes images.
    """
    dataset = Dataset(manifest_url)
    collector = Collector(len(dataset), most, "training image")
    batches = read_indexed(dataset, CHUNK, seed, space, world.rank, world.size)
    for index, z, _ in shown(batches, len(dataset), world):
        collector.add(index, extractor(z if extractor.takes == "latents" else decode(z)))
    source: dict[str, Any] = {
        "manifest": storage.shown(manifest_url),
        "manifest_hash": dataset.manifest.hash,
        "codec": space.provenance["weights"] or space.provenance["kind"],
        "posterior_seed": seed,
    }
    if extractor.takes == "images":
        source["image_size"] = None if space.image_shape is None else list(space.image_shape)
    return _reference(collector.merge_ranks(), extractor, source)
