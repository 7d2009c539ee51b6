import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imm_scale.data.manifest import Codec, Manifest, ShardInfo, check_expectations
from imm_scale.errors import UserError

CODEC = Codec("vae", "f" * 64, 256, 4, 8, (0.86488, -0.27787343, 0.21616915, 0.3738409), (4.855, 5.319, 3.937, 3.987))
SHARDS = (ShardInfo("a.tar", 3, 4096, "0" * 64, "1" * 64), ShardInfo("b.tar", 2, 2048, "2" * 64, "3" * 64))
MANIFEST = Manifest(CODEC, (4, 32, 32), 2, ("cat", "dög"), SHARDS)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    url = str(tmp_path / "manifest.json")
    MANIFEST.save(url)
    assert Manifest.load(url) == MANIFEST
    assert Manifest.load(f"file://{url}").hash == MANIFEST.hash


def test_derived_values() -> None:
    assert MANIFEST.num_samples == 5
    assert MANIFEST.stored_shape == (8, 32, 32)
    assert SHARDS[0].index_name == "a.index.npy"


def test_hash_depends_on_content_not_on_layout(tmp_path: Path) -> None:
    url = tmp_path / "manifest.json"
    url.write_text(json.dumps(json.loads(MANIFEST.to_json())))
    assert Manifest.load(str(url)).hash == MANIFEST.hash
    assert replace(MANIFEST, class_names=()).hash != MANIFEST.hash


def test_hashes_that_checkpoints_hold_stay():
    """Runs go on only with the data whose hash they recorded: these are of before there were tokens."""
    assert MANIFEST.hash == "3a71285becaeff50fdbe3aa0f7d7f9b8597d9b576bd6c6662d12b0c68bc51fbf"
    second = replace(MANIFEST, codec=replace(CODEC, moments="sample", scale=0.5))
    assert second.hash == "8b6b437777e62b79f9d3e15757961927c749c1b4ae03615ca1db01cce93cb4b7"
    assert (MANIFEST.format_version, second.format_version) == (1, 2)


def _set(path: str, value: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        target: Any = document
        for key in parents:
            target = target[int(key) if key.isdecimal() else key]
        target[int(last) if last.isdecimal() else last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format_version", 3), "format version 3, this program reads up to 2: upgrade"),
        (_set("format_version", "1"), "format_version is '1': int is needed"),
        (_set("num_classes", "2"), "num_classes is '2': int is needed"),
        (_set("num_classes", True), "num_classes is True: int is needed"),
        (_set("num_classes", 3), "2 class_names for num_classes 3"),
        (_set("codec", None), "codec is None: an object"),
        (_set("codec.kind", "jpeg"), "codec kind 'jpeg' is none of pixels, vae"),
        (_set("codec.factor", 4), r"latent_shape \[4, 32, 32\] does not follow.*\[4, 64, 64\]"),
        (_set("codec.std", [1.0, 1.0]), "4 and 2 entries for 4 channels"),
        (_set("codec.std", [1.0, 1.0, 0, 1.0]), "must be positive"),
        (_set("codec.mean", [1.0, "x", 0, 1.0]), "codec.mean holds 'x'"),
        (_set("codec.mean", [1.0, float("nan"), 0, 1.0]), "must be finite"),
        (_set("latent_shape", 4), "latent_shape is 4: a list is needed"),
        (_set("shards", []), "there are no shards"),
        (_set("shards.0", "a.tar"), r"shards\[0\] is 'a.tar': an object"),
        (_set("shards.0.samples", 0), "a shard has no samples"),
        (_set("shards.1.name", "a.tar"), "two shards have the same name"),
        (_set("colour", 1), "unknown field 'colour'"),
        (lambda document: document["codec"].pop("mean"), "codec has no field 'mean'"),
    ],
)
def test_bad_manifests_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    document = json.loads(MANIFEST.to_json())
    change(document)
    url = tmp_path / "manifest.json"
    url.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        Manifest.load(str(url))


def test_missing_and_unparsable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest at .*nowhere.json"):
        Manifest.load(str(tmp_path / "nowhere.json"))
    with pytest.raises(UserError, match="no manifest at"):
        Manifest.load(str(tmp_path))
    for text in (b"{", b"[1]", b"\xff\xfe"):
        (tmp_path / "m.json").write_bytes(text)
        with pytest.raises(UserError, match=r"m\.json"):
            Manifest.load(str(tmp_path / "m.json"))


def test_expectations() -> None:
    check_expectations(MANIFEST)
    check_expectations(MANIFEST, codec="vae", latent_shape=(4, 32, 32), num_classes=2)
    with pytest.raises(UserError, match=r"codec is vae.* expects pixels"):
        check_expectations(MANIFEST, codec="pixels")
    with pytest.raises(UserError, match=r"\(4, 32, 32\).*\(1, 8, 8\)"):
        check_expectations(MANIFEST, latent_shape=(1, 8, 8))
    with pytest.raises(UserError, match="2 classes, the model 1000"):
        check_expectations(MANIFEST, num_classes=1000)
