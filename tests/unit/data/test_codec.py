from pathlib import Path

import pytest
import torch

from imm_scale.data import codec as codecs
from imm_scale.data.codec import PixelsCodec, VAECodec
from imm_scale.data.manifest import Codec
from imm_scale.errors import UserError
from tests.small_vae import save_small_vae

CODEC = Codec("pixels", "", 16, 3, 1, (-0.1, 0.2, 0.3), (0.5, 0.25, 2.0))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_value_survives_fp16_and_both_scalings(channels: int) -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, channels)
    codec = Codec("pixels", "", 16, channels, 1, CODEC.mean[:channels], CODEC.std[:channels])
    stored = PixelsCodec().encode(images).half()
    assert stored.shape == (1, channels, 16, 16)
    assert stored.min() == -1 and stored.max() == 1
    z = codecs.normalize(stored, codec.mean, codec.std)
    assert z.dtype == torch.float32
    assert torch.equal(codecs.decode(z, codec, PixelsCodec()), images)


def test_normalize_gives_sigma_data() -> None:
    raw = torch.randn(4000, 2, 2, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
    z = codecs.normalize(raw, (1.0, 1.0), (3.0, 3.0), sigma_data=0.7)
    assert abs(z.std().item() - 0.7) < 0.01 and abs(z.mean().item()) < 0.01
    torch.testing.assert_close(codecs.denormalize(z, (1.0, 1.0), (3.0, 3.0), sigma_data=0.7), raw)


def test_decode_clamps_rounds_and_refuses_nan() -> None:
    codec = Codec("pixels", "", 1, 1, 1, (0.0,), (0.5,))
    raw = torch.tensor([-9.0, -0.9999, 0.0, 0.9999, 9.0]).reshape(-1, 1, 1, 1)
    assert codecs.decode(raw, codec, PixelsCodec()).flatten().tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="not finite"):
        codecs.decode(torch.full((1, 1, 1, 1), torch.nan), codec, PixelsCodec())


def test_a_posterior_is_drawn_per_ordinal() -> None:
    mean, std = torch.full((20, 1, 32, 32), 2.0), torch.full((20, 1, 32, 32), 0.5)
    stored = torch.cat([mean, std], dim=1).half()
    ordinal = torch.arange(100, 120)
    codec = Codec("vae", "", 32, 1, 1, (0.0,), (1.0,))
    raw = codecs.draw_raw(stored, codec, 0, "posterior", ordinal)
    assert raw.shape == (20, 1, 32, 32) and raw.dtype == torch.float32
    assert abs(raw.mean().item() - 2.0) < 0.02 and abs(raw.std().item() - 0.5) < 0.02
    assert torch.equal(raw[7:9], codecs.draw_raw(stored[7:9], codec, 0, "posterior", ordinal[7:9]))
    assert not torch.equal(raw, codecs.draw_raw(stored, codec, 0, "posterior", ordinal + 20))


def test_opening_refuses_missing_weights(tmp_path: Path) -> None:
    vae = Codec("vae", "ab" * 32, 16, 4, 2, (0.0,) * 4, (1.0,) * 4)
    assert codecs.open_codec(CODEC).kind == "pixels"
    with pytest.raises(UserError, match="name the autoencoder's folder"):
        codecs.open_codec(vae)
    with pytest.raises(UserError, match=r"must name a folder written by AutoencoderKL\.save_pretrained"):
        codecs.open_codec(vae, str(tmp_path))


@pytest.fixture
def vae_folder(tmp_path: Path) -> str:
    return save_small_vae(tmp_path / "vae")


def test_vae_codec_matches_diffusers(vae_folder: str) -> None:
    from diffusers import AutoencoderKL

    codec = VAECodec(vae_folder)
    assert codec.factor == 2 and codec.latent_channels(3) == 4 and len(codec.weights_hash) == 64
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    stored = codec.encode(images)
    assert stored.shape == (3, 8, 8, 8)
    model = AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        expected = model.encode(images.permute(0, 3, 1, 2) / 127.5 - 1.0).latent_dist
        picture = model.decode(expected.mean).sample
    torch.testing.assert_close(stored, torch.cat([expected.mean, expected.std], dim=1))
    decoded = codec.decode(stored[:, :4])
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, 16, 16, 3)
    difference = decoded.float() - ((picture + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert difference.abs().max() <= 0.51
    with pytest.raises(UserError, match="takes RGB images"):
        codec.latent_channels(1)


def test_other_weights_are_refused(vae_folder: str) -> None:
    vae = Codec("vae", "ab" * 32, 16, 4, 2, (0.0,) * 4, (1.0,) * 4)
    with pytest.raises(UserError, match="encoded with abababababab"):
        codecs.open_codec(vae, vae_folder)


def _pipeline(folder: Path) -> str:
    """A folder of a pipeline, whose autoencoder lies in `vae`; the hash of its weights."""
    save_small_vae(folder / "vae")
    (folder / "model_index.json").write_text("{}")
    return VAECodec(str(folder / "vae")).weights_hash


def test_an_autoencoder_inside_a_pipeline_is_named_with_a_colon(tmp_path: Path) -> None:
    expected = _pipeline(tmp_path / "pipeline")
    assert VAECodec(f"{tmp_path}/pipeline:vae").weights_hash == expected
    with pytest.raises(UserError, match=r"inside a pipeline, as .*/pipeline:vae"):
        VAECodec(str(tmp_path / "pipeline"))
    with pytest.raises(UserError, match=r"no .*/pipeline/unet/"):
        VAECodec(f"{tmp_path}/pipeline:unet")
    _pipeline(tmp_path / "a:b")  # a folder's own colon is no such colon
    assert VAECodec(f"{tmp_path}/a:b/vae").weights_hash == expected
    # Wherever else one is named: the decoder of samples goes the same way.
    codec = Codec("vae", expected, 16, 4, 2, (0.0,) * 4, (1.0,) * 4)
    assert codecs.open_codec(codec, f"{tmp_path}/pipeline:vae").weights_hash == expected


def test_the_hub_gives_a_folder_of_a_pipeline_and_its_cache_serves_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "cache" / "models--owner--pipeline"
    expected = _pipeline(repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert VAECodec("owner/pipeline:vae").weights_hash == expected
    with pytest.raises(UserError, match="inside a pipeline, as owner/pipeline:vae"):
        VAECodec("owner/pipeline")
    for name in ("owner/other", "owner/other:vae"):
        with pytest.raises(UserError, match=r"owner/other .* HF_HUB_OFFLINE is set, and its cache has no copy"):
            VAECodec(name)
