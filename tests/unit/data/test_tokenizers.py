"""Texts to tokens and back, by hand and by Python's own tools; and tokenizers that are not the data's."""

import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
import tokenizers

from imm_scale.data.manifest import TokenCodec
from imm_scale.data.tokens.images import BINARY_HASH
from imm_scale.data.tokens.tokenizers import FromFile, open_tokenizer, tokenizer_of
from imm_scale.errors import UserError

ODD = "Ünïcode 'Kelvin' \u212a, 3 naïve\tCAFÉS!\n\n — end… "


def _codec(name: str) -> TokenCodec:
    tokenizer = open_tokenizer(name)
    return TokenCodec(tokenizer.vocabulary, tokenizer.name, tokenizer.hash)


@pytest.fixture
def trained(tmp_path) -> str:
    """A tokenizer.json of pairs of bytes, made by the library itself."""
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator(["the theme of the thesis is the thing"] * 3, vocab_size=270, special_tokens=["<end>"])
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    return str(path)


def test_bytes_are_the_bytes():
    tokenizer = open_tokenizer("bytes")
    assert tokenizer.encode(ODD).tolist() == list(ODD.encode())
    assert tokenizer.encode(bytes(range(256))).tolist() == list(range(256)) and tokenizer.vocabulary == 256
    assert tokenizer.decode(tokenizer.encode(ODD)) == ODD
    assert tokenizer.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


@pytest.mark.parametrize("text", [ODD, "", "...", "a", " a  B ", "x" * 50 + "  y", "ends with é"])
def test_text27_is_the_regular_expression_of_its_definition(text):
    tokenizer = open_tokenizer("text27")
    # re.ASCII: of the Kelvin sign Python's lower() makes a k.
    lowered = "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in text)
    expected = re.sub("[^a-z]+", " ", lowered).strip()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == expected and len(ids) == len(expected) == tokenizer.bytes_of(text.encode(), ids)
    assert all(0 <= i < 27 for i in ids.tolist())


def test_texts_that_are_no_utf8_are_named():
    with pytest.raises(UserError, match=r"a\.txt is no UTF-8 \(byte 0xff at 2\).*--tokenizer bytes"):
        open_tokenizer("text27").encode(b"ab\xff", "a.txt")


def test_a_tokenizer_json_is_the_librarys(trained):
    ours, library = open_tokenizer(f"hf:{trained}"), tokenizers.Tokenizer.from_file(trained)
    text = "the thesis of a thing <end>"
    assert ours.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text)) == text
    assert ours.vocabulary == library.get_vocab_size()
    with open(trained, "rb") as file:
        assert ours.hash == hashlib.sha256(file.read()).hexdigest()


def test_what_a_command_line_could_not_read_is_the_bytes_it_was():
    assert open_tokenizer("bytes").encode(b"a\xff".decode(errors="surrogateescape")).tolist() == [0x61, 0xFF]


def test_a_text_has_all_its_tokens_whatever_batches_the_file_was_saved_for(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "fox": 1, "[PAD]": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.enable_truncation(3)
    library.enable_padding(length=10, pad_id=2)
    library.save(str(tmp_path / "batches.json"))
    tokenizer = open_tokenizer(f"hf:{tmp_path}/batches.json")
    assert tokenizer.encode("the fox the fox the").tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(UserError, match=r"a\.txt cannot be encoded \(.*UNK.*\): take a tokenizer that has tokens"):
        tokenizer.encode("the dog", "a.txt")


def test_names_and_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"model": 1}')
    for name, message in (
        ("bpe", "'bpe' is none of bytes, text27, hf:FILE"),
        ("hf:", "none of bytes"),
        (f"hf:{tmp_path}/nowhere.json", r"no tokenizer at .*nowhere\.json"),
        (f"hf:{tmp_path}/other.json", r"other\.json is no tokenizer\.json"),
    ):
        with pytest.raises(UserError, match=message):
            open_tokenizer(name)


def test_the_tokenizer_of_a_data_set_must_be_the_one_it_was_packed_with(tmp_path, trained):
    for name in ("bytes", "text27"):
        assert tokenizer_of(_codec(name), "nowhere").hash == open_tokenizer(name).hash
    of_file = _codec(f"hf:{trained}")
    assert isinstance(tokenizer_of(of_file, str(tmp_path)), FromFile)
    with pytest.raises(UserError, match=r"tokenizer\.json has hash .*packed with abab"):
        tokenizer_of(replace(of_file, tokenizer_hash="ab" * 32), str(tmp_path))
    with pytest.raises(UserError, match="tokenizer bytes has hash"):
        tokenizer_of(TokenCodec(256, "bytes", ""), "nowhere")
    with pytest.raises(UserError, match="stand for images"):
        tokenizer_of(TokenCodec(2, "binary", "", (8, 8)), "nowhere")


def test_tokens_may_be_a_tensor_or_an_array_of_any_type():
    tokenizer = open_tokenizer("text27")
    for dtype in (np.uint8, np.int32, np.int64):
        assert tokenizer.decode(np.array([1, 0, 26], dtype)) == "a z"


def test_what_data_sets_recorded_stays_true():
    """Hashes that manifests hold already: with others, their data could not be read as text or images any more."""
    hashes = open_tokenizer("bytes").hash, open_tokenizer("text27").hash, BINARY_HASH
    assert [value[:12] for value in hashes] == ["83b268ee0fdf", "390ad9288b6d", "a22bca4773ba"]
