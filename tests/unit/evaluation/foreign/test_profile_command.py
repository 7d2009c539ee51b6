"""`imm-scale profile` of plain Python models of a Markov chain: numbers, files, a second start, and mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest

from imm_scale import cli
from imm_scale.evaluation.tokens import joints
from imm_scale.methods.tokens import schedules

CHAIN = joints.binary_chain(6, 0.1)
# The models, as a user would write them: one knows the table of the chain, one that the next bit differs in one of ten.
MODELS = """
import torch
from imm_scale.evaluation.tokens import joints

CHAIN, calls = joints.binary_chain(6, 0.1), []


def net(tokens):
    calls.append(len(tokens))
    visible = tokens < 2
    bits = [torch.full_like(tokens, bit).where(~visible, tokens) for bit in (0, 1)]
    scores = torch.stack([CHAIN.token_scores(b, visible) for b in bits], dim=2)
    logits = -scores + 7.0
    return torch.cat([logits, torch.full_like(logits[..., :1], 9.0)], dim=2)  # 9.0 for the mask, which cannot come


net.mask_id = 2


def unnamed_mask(tokens):
    return net(tokens)


def chain(tokens):
    same = torch.nn.functional.one_hot(tokens.clamp_max(1), 2)
    return torch.where(tokens[..., None] == 2, 0.5, 0.1 + 0.8 * same).log()


def deaf(tokens):
    return torch.zeros(*tokens.shape, 2)


def flat(tokens):
    return torch.zeros(len(tokens), 2)


def broken(tokens):
    raise KeyError("weight")


def slow_to_forget(tokens):
    return torch.zeros(*tokens.shape, 2, requires_grad=True)


deaf.mask_id = flat.mask_id = broken.mask_id = slow_to_forget.mask_id = 2
"""


@pytest.fixture
def held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """400 sequences of the chain, and the models as module `chain_models`."""
    (tmp_path / "chain_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "chain_models", raising=False)
    np.save(tmp_path / "held_out.npy", CHAIN.sample(400, seed=0).numpy().astype(np.uint8))
    return str(tmp_path / "held_out.npy")


def _profile(*argv: str) -> int:
    return cli.main(["profile", *argv])


def test_a_masked_model(held_out, tmp_path, capsys):
    out = tmp_path / "out"
    assert _profile("chain_models:net", held_out, "--passes", "2", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "chain_models:net on" in printed
    assert "warning" not in printed
    document = json.loads((out / "profile.json").read_text())
    exact = CHAIN.profile()
    for row, value in zip(document["profile"], exact, strict=True):
        assert abs(row["nll"] - value) < 4 * row["nll_error"] + 1e-6, "four standard errors, and fp32 logits"
    assert document["nll_one_at_a_time"] == pytest.approx(sum(row["nll"] for row in document["profile"]), abs=1e-9)
    assert [row["steps"] for row in document["floor"]] == [1, 2, 4, 6]
    for row in document["schedules"]:
        assert abs(row["excess"] - schedules.excess(exact, row["sizes"])) <= 4 * row["excess_error"] + 1e-6
    assert (out / "profile.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "profile.html").read_text()
    assert "Best sizes are the floor" in page
    assert 'src="data:image/svg+xml;base64,' in page


def test_the_same_command_reads_what_was_scored(held_out, tmp_path):
    import chain_models

    argv = ("chain_models:net", held_out, "--passes", "2", "--out", str(tmp_path / "out"))
    assert _profile(*argv) == 0
    first, scored = json.loads((tmp_path / "out" / "profile.json").read_text()), sum(chain_models.calls)
    assert scored == 800
    assert _profile(*argv) == 0
    assert sum(chain_models.calls) == scored + 16, "one batch again, to see that it is the same model"
    again = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert _profile(*argv, "--seed", "1") == 0
    assert sum(chain_models.calls) == 2 * scored + 16, "other draws have values of their own"


def test_a_net_that_sees_nothing_is_told(held_out, capsys):
    assert _profile("chain_models:deaf", held_out) == 0
    assert "warning: the net predicts marginals only" in capsys.readouterr().out


@pytest.mark.parametrize("begin", [(), ("--begin", "2")], ids=["no begin", "begin"])
def test_a_causal_model(begin, held_out, tmp_path, capsys):
    argv = ("--causal", *begin, "--block", "3", "--contexts", "300", "--out", str(tmp_path))
    assert _profile("chain_models:chain", held_out, *argv) == 0
    assert "Random orders and nll@L are left out" in capsys.readouterr().out
    document = json.loads((tmp_path / "profile.json").read_text())
    entropy = -0.1 * np.log(0.1) - 0.9 * np.log(0.9)
    exact = [entropy] * 5 if not begin else [np.log(2), *[entropy] * 5]
    for row, value in zip(document["profile"], exact, strict=True):
        assert abs(row["nll"] - value) < 4 * row["nll_error"] + 1e-6, "and fp32 logits"
    after_two = -0.18 * np.log(0.18) - 0.82 * np.log(0.82)
    pair = document["blocks"][1]
    if not begin:  # else some prefixes are empty, and their second token is a fair coin too
        assert pair["lower"] - 4 * pair["lower_error"] < after_two - entropy < pair["upper"] + 4 * pair["upper_error"]
    assert [row["block"] for row in document["blocks"]] == [1, 2, 3]


def test_text_as_bytes(held_out, tmp_path, capsys):
    (tmp_path / "held_out.txt").write_text("ab" * 100)
    (tmp_path / "byte_models.py").write_text(
        "import torch\ndef net(tokens):\n    return torch.nn.functional.one_hot(97 + torch.arange(4) % 2, 256).float()"
        ".expand(len(tokens), 4, 256) * 100\nnet.mask_id = 256\n"
    )
    argv = (str(tmp_path / "held_out.txt"), "--tokenizer", "bytes", "--length", "4", "--samples", "20")
    assert _profile("byte_models:net", *argv) == 0
    assert "20 sequences of 4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        ("nowhere", [], ["nowhere is no folder", "MODULE:CALLABLE"]),
        ("no_such_module:net", [], ["no_such_module does not import", "PYTHONPATH"]),
        ("chain_models:nett", [], ["chain_models has no nett"]),
        ("chain_models:CHAIN", [], ["CHAIN is Joint"]),
        ("chain_models:unnamed_mask", [], ["--mask ID"]),
        ("chain_models:flat", [], ["gives (16, 2) for tokens of shape (16, 6)", "(N, T, V)"]),
        ("chain_models:broken", [], ["broken raises KeyError", "(16, 6)", "'weight'", "chain_models.py:38", "batch"]),
        ("chain_models:net", ["--mask", "1"], ["token 1 of the data is the mask", "--mask"]),
        ("chain_models:net", ["--mask", "-1"], ["--mask -1", "0 or more"]),
        ("chain_models:chain", ["--causal", "--begin", "-1"], ["--begin -1", "0 or more"]),
        ("chain_models:net", ["--passes", "7"], ["--passes 7", "1 to 6"]),
        ("chain_models:net", ["--samples", "3"], ["3 samples"]),
        ("chain_models:net", ["--samples", "0"], ["--samples 0"]),
        ("chain_models:net", ["--steps", "1,7"], ["--steps 1,7", "1 to 6"]),
        ("chain_models:net", ["--steps", "two"], ["--steps two", "1,2,4"]),
        ("chain_models:net", ["--length", "4"], ["--length 4", "sequences of 6"]),
        ("chain_models:net", ["--tokenizer", "bytes"], ["--tokenizer bytes", "tokens already"]),
        ("chain_models:net", ["--block", "2"], ["--block", "--steps"]),
        ("chain_models:net", ["--begin", "2"], ["--begin 2", "--causal"]),
        ("chain_models:chain", ["--causal", "--steps", "2"], ["--steps", "one order alone"]),
        ("chain_models:chain", ["--causal", "--mask", "2"], ["--mask 2", "no mask"]),
        ("chain_models:chain", ["--causal", "--block", "6"], ["--block 6", "2 to 5"]),
    ],
)
def test_mistakes(model, flags, words, held_out, capsys):
    assert _profile(model, held_out, *flags) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_a_run_of_ours_is_evaluated(held_out, tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    assert _profile(str(tmp_path), held_out) == 2
    assert f"imm-scale evaluate {tmp_path} writes" in capsys.readouterr().err


def test_logits_may_still_know_where_they_come_from(held_out):
    assert _profile("chain_models:slow_to_forget", held_out) == 0


@pytest.mark.parametrize("content", [b"PK\x03\x04\0", b"\xff\xfe"])
def test_a_text_that_is_none(content, held_out, tmp_path, capsys):
    (tmp_path / "held_out.txt").write_bytes(content)
    argv = (str(tmp_path / "held_out.txt"), "--tokenizer", "bytes", "--length", "2")
    assert _profile("chain_models:net", *argv) == 2
    assert "text" in (said := capsys.readouterr().err) and ".npy" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.npy", ["does not exist"]),
        ("floats.npy", ["float64 of shape (2, 3)"]),
        ("pickled.npy", ["no .npy file of integers"]),
        ("negative.npy", ["holds -1"]),
        ("large.npy", ["token 5 of the data is none of chain_models:net's 3"]),
        ("text.txt", ["--length"]),
        ("manifest.json", ["manifest.json"]),
    ],
)
def test_data_that_are_none(name, words, held_out, tmp_path, capsys):
    np.save(tmp_path / "floats.npy", np.zeros((2, 3)))
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "negative.npy", np.full((4, 6), -1))
    np.save(tmp_path / "large.npy", np.full((400, 6), 5))
    for other in ("text.txt", "manifest.json"):
        (tmp_path / other).write_text("{}")
    assert _profile("chain_models:net", str(tmp_path / name)) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
