"""Hugging Face folders against transformers' own losses; nothing in them is unpickled or run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from imm_scale import cli
from imm_scale.evaluation.foreign import models
from imm_scale.evaluation.foreign.models import Chosen

transformers = pytest.importorskip("transformers")

LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz "]
SIZES = {"vocab_size": len(LETTERS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def _with_tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    words = Tokenizer(WordLevel({word: i for i, word in enumerate(LETTERS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(**SIZES, intermediate_size=16, max_position_embeddings=16)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    _with_tokenizer(folder, mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]")
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    _with_tokenizer(folder, bos_token="[CLS]")
    return folder


def _chosen(folder: Path) -> Chosen:
    return Chosen(str(folder), None, None, False, "fp32", batch=3)


def test_a_masked_models_scores_are_its_loss(bert):
    model = transformers.BertForMaskedLM.from_pretrained(bert).eval()
    x = torch.randint(5, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    visible = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    scorer = models.open_model(_chosen(bert), torch.device("cpu"))
    scores = scorer.token_scores(x, visible)
    framed = torch.nn.functional.pad(torch.where(visible, x, 4), (1, 1))
    framed[:, 0], framed[:, -1] = 2, 3
    with torch.no_grad():
        output = model(framed, labels=torch.nn.functional.pad(torch.where(visible, -100, x), (1, 1), value=-100))
    never_mask = torch.log1p(-output.logits.softmax(-1)[:, 1:-1, 4])  # ours gives the mask no probability
    expected = output.loss + never_mask[~visible].mean()
    assert float(scores[~visible].mean()) == pytest.approx(float(expected), abs=1e-5), "fp32 sums of 20 terms"


def test_a_causal_models_scores_are_its_loss(gpt2):
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2).eval()
    x = torch.randint(5, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    scorer = models.open_model(_chosen(gpt2), torch.device("cpu"))
    begun = torch.nn.functional.pad(x, (1, 0), value=2)
    with torch.no_grad():
        output = model(begun, labels=begun)
    assert scorer.first == 0, "the tokenizer has a begin of sequence"
    assert float(scorer.token_scores(x).mean()) == pytest.approx(float(output.loss), abs=1e-5)
    assert torch.allclose(scorer.next_log_probs(x), output.logits[:, -1].log_softmax(-1), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_command_reads_text_by_the_models_own_tokenizer(name, request, tmp_path, capsys):
    folder = request.getfixturevalue(name)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 10)
    flags = [] if name == "bert" else ["--rollouts", "2", "--block", "2"]
    argv = ["profile", str(folder), str(text), "--length", "6", "--out", str(tmp_path / "out"), *flags]
    assert cli.main(argv) == 0
    document = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert (document["samples"], document["length"]) == (73, 6)
    assert document["kind"] == ("masked" if name == "bert" else "causal")
    untrained = [row["nll"] for row in document["profile"]]
    assert np.mean(untrained) == pytest.approx(np.log(32), abs=0.3), "small random weights: all letters about alike"


def _copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def _fails(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    (tmp_path / "text.txt").write_text("ab" * 100)
    argv = ["profile", str(folder), str(tmp_path / "text.txt"), "--length", "4", "--tokenizer", "bytes"]
    assert cli.main(argv) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_pickled_weights_are_refused(bert, tmp_path, capsys):
    folder = _copy(bert, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    _fails(folder, tmp_path, capsys, "no .safetensors", "not unpickled")


def test_code_of_a_folder_is_not_run(bert, tmp_path, capsys):
    folder = _copy(bert, tmp_path)
    described = json.loads((folder / "config.json").read_text())
    own = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForMaskedLM": "own.ModelForMaskedLM"},
    }
    (folder / "config.json").write_text(json.dumps({**described, **own}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    _fails(folder, tmp_path, capsys, "which is not run", "MODULE:CALLABLE")
    assert not (tmp_path / "ran").exists()


def test_a_model_without_its_head_is_refused(bert, tmp_path, capsys):
    folder = _copy(bert, tmp_path)
    transformers.BertModel.from_pretrained(bert).save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "architectures": ["BertForMaskedLM"]}))
    _fails(folder, tmp_path, capsys, "lacks", "save it with its head")


def test_other_models_are_refused(bert, tmp_path, capsys):
    folder = _copy(bert, tmp_path)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "architectures": ["BertForQuestionAnswering"]}))
    _fails(folder, tmp_path, capsys, "BertForQuestionAnswering", "ForMaskedLM")
