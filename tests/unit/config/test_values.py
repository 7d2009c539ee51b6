"""Values by the types of their keys: text as typed, numbers as people write them, homes, variables."""

import pytest

from imm_scale import config as configs
from imm_scale.errors import UserError

# What YAML 1.1 would turn into numbers, dates, truth, nothing, lists or mappings.
_WORDS = """\
5e12345|1e3|1e+3|0123456|007|0x1f|0o17|0b11|1_000|12:30:00|12:30|2026-11-26|1.0|1.|.5|.inf|.nan|-0|+7|no|No|NO|yes|on
off|true|null|Null|~|=|<<|[1]|{a}|{a: b}|a: b|a #b|'c|'tis|'a' b|don't
@x|`x`|%x|!x|&x|*x|-|?|>|a,b|#a|a#b|$HOME|{x|tab\there
 lead and trail |ünï → 漢字 🙂"""
TEXTS = [*_WORDS.replace("\n", "|").split("|"), "a\nb", "\udce9t\udce9", "a|b"]
FILE_TEXTS = ["5e12345", "1e3", "0123456", "007", "1_000", "12:30:00", "2026-11-26", "no", "yes", "null", "~", ".inf"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_on_the_command_line_stays_as_typed(text):
    config = configs.load_words([f"run.name={text}", f"wandb.project={text}"]).config
    assert (config.run.name, config.wandb.project) == (text, text)
    assert config.run_dir == f"runs/{text}"
    assert configs.from_yaml(configs.to_yaml(config)) == config


@pytest.mark.parametrize("text", FILE_TEXTS)
def test_plain_text_in_a_file_stays_as_typed(text, tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"run: {{name: {text}}}\nwandb:\n  tags: [{text}, b]\nsampling:\n  labels: '{text}'\n"
    )
    config = configs.load([str(tmp_path / "a.yaml")]).config
    assert (config.run.name, config.wandb.tags, config.sampling.labels) == (text, [text, "b"], text)


def test_null_empties_only_keys_that_may_be_empty(tmp_path):
    (tmp_path / "a.yaml").write_text("run:\n  dir: ~\nwandb:\n  name: 'null'\n  group: null\n")
    config = configs.load([str(tmp_path / "a.yaml")], ["data.codec=null", "data.cache_dir="]).config
    assert (config.run.dir, config.wandb.name, config.wandb.group) == (None, "null", None)
    assert (config.data.codec, config.data.cache_dir) == (None, None)


@pytest.mark.parametrize(("word", "text"), [("'007'", "007"), ('"a # b"', "a # b"), ("'don''t'", "don't"), ('"', '"')])
def test_quotes_around_the_whole_come_off(word, text):
    assert configs.load_words([f"run.name={word}"]).config.run.name == text


@pytest.mark.parametrize(
    "path",
    ["/d/a #1/m.json", "/d/it's/m", '/d/"x"/m', "/d/a: b/m", "/d/{x}/m", "/d/[1]/m", "s3://b/a b#c", "./~x", "a~"],
)
def test_paths_are_taken_as_typed(path):
    assert configs.load_words([f"data.manifest={path}"]).config.data.manifest == path


def _path_keys() -> list[str]:
    entries = configs.entries(configs.Config())
    return [key for key, entry in entries.items() if entry.is_path]


def test_every_key_of_a_place_expands_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ada")
    keys = _path_keys()
    assert {"run.dir", "data.manifest", "train.init_from", "sampling.vae", "evaluation.reference"} <= set(keys)
    for key in keys:
        section, leaf = key.rsplit(".", 1)
        inner = f"{section.rpartition('.')[2]}: {{{leaf}: ~/x #1}}" if "." not in section else None
        assert configs.flatten(configs.load_words([f"{key}=~/x #1"]).config)[key] == "/home/ada/x #1"
        assert configs.flatten(configs.load_words([f"{key}=~"]).config)[key] == "/home/ada"
        if inner is not None:
            (tmp_path / "a.yaml").write_text(f"{section}: {{{leaf}: ~/x}}\n")
            assert configs.flatten(configs.load([str(tmp_path / "a.yaml")]).config)[key] == "/home/ada/x"
    assert configs.load_words(["run.name=~/x"]).config.run.name == "~/x"
    with pytest.raises(UserError, match=r"~nobody-here is no user's home here.*\./~nobody-here"):
        configs.load_words(["run.dir=~nobody-here/x"])


def test_every_text_whose_sentence_names_a_folder_or_a_file_is_a_path():
    """A key added later is not forgotten."""
    starts = ("Folder ", "File ", "Local folder", "manifest.json", "Weights to start from", "Reference statistics")
    for key, entry in configs.entries(configs.Config()).items():
        if entry.type.startswith("str") and entry.help.startswith(starts):
            assert entry.is_path, key


def test_variables_are_written_as_omegaconf_has_them(monkeypatch):
    monkeypatch.setenv("USER", "ada")
    config = configs.load_words(["run.dir=/s/${oc.env:USER}/${run.name}", "run.name=x${seed}"]).config
    assert config.run_dir == "/s/ada/x0"
    assert (
        configs.load_words(["train.micro_batch_size=${train.global_batch_size}"]).config.train.micro_batch_size == 4096
    )
    monkeypatch.delenv("NOPE", raising=False)
    for word, said in (
        ("run.dir=/s/${USER}/x", r"run\.dir=/s/\$\{USER\}/x.*\$\{oc\.env:USER\}"),
        ("run.dir=/s/${oc.env:NOPE}/x", "NOPE"),
        ("run.dir=${no_resolver:3}", "no_resolver"),
        ("run.dir=${x", r"run\.dir"),
        ("optimizer.lr=${LR}", r"optimizer\.lr.*\$\{oc\.env:LR\}"),
        ("wandb.tags=[a,'${TAG}']", r"wandb\.tags.*\$\{oc\.env:TAG\}"),
        ("run.name=\\${x}", r"\$\{"),
        ("run.name=???", r"\?\?\?"),
        ("wandb.tags=['???']", r"\?\?\?"),
        ('run.name="a\\0b"', "character 0"),
    ):
        with pytest.raises(UserError, match=said):
            configs.load_words([word])


@pytest.mark.parametrize(
    ("word", "value"),
    [("1000000", 10**6), ("1e6", 10**6), ("1_000_000", 10**6), ("1.5e6", 1_500_000), ("2.0", 2), ("007", 7),
     ("0x10", 16), ("+5", 5), ("9223372036854775807", 2**63 - 1), ("'12'", 12)],
)  # fmt: skip
def test_whole_numbers_as_people_write_them(word, value, tmp_path):
    (tmp_path / "a.yaml").write_text(f"train: {{max_steps: {word}}}\n")
    for config in (configs.load_words([f"train.max_steps={word}"]), configs.load([str(tmp_path / "a.yaml")])):
        assert config.config.train.max_steps == value and isinstance(config.config.train.max_steps, int)
    if value < 2**53:  # a float holds it
        from_python = configs.changed(configs.Config(), {"train.max_steps": float(value)}, "a test")
        assert from_python.train.max_steps == value and isinstance(from_python.train.max_steps, int)


@pytest.mark.parametrize(
    "word", ["1.5", "12:30", "1e-1", "1e999999999", "1e30", "ten", "", "true", "nan", "[1]", "{a: 1}"]
)
def test_what_is_no_whole_number_is_refused(word):
    with pytest.raises(UserError, match=r"train\.max_steps="):
        configs.load_words([f"train.max_steps={word}"])


@pytest.mark.parametrize(
    ("word", "value"), [("1e-3", 1e-3), ("1_0.5", 10.5), ("1", 1.0), (".5", 0.5), ("-1e-2", -0.01)]
)
def test_numbers_as_people_write_them(word, value):
    assert (
        configs.load_words([f"evaluation.extractor.range=[{word},300]"]).config.evaluation.extractor.range[0] == value
    )


@pytest.mark.parametrize("word", ["12:30.5", "fast", "", "true", "1,5", "[1]"])
def test_what_is_no_number_is_refused(word):
    with pytest.raises(UserError, match=r"optimizer\.lr="):
        configs.load_words([f"optimizer.lr={word}"])


@pytest.mark.parametrize(("word", "value"), [("true", True), ("yes", True), ("On", True), ("1", True), ("no", False)])
def test_truth_as_people_write_it(word, value):
    assert configs.load_words([f"data.flip={word}"]).config.data.flip is value


@pytest.mark.parametrize(
    "word", ["data.flip=2", "data.flip=maybe", "data.flip=", "ema.decays=0.9", "data.latent_shape=4,8,8"]
)
def test_other_kinds_of_values_are_refused_with_the_remedy(word):
    with pytest.raises(UserError, match=r"neither true nor false|write \["):
        configs.load_words([word])


def test_values_from_python_are_read_alike():
    base = configs.Config()
    assert configs.changed(base, {"optimizer.lr": "1e-3", "train.max_steps": "1e3"}, "x").train.max_steps == 1000
    for settings in ({"run.name": 7}, {"run.name": False}, {"wandb.tags": [1]}, {"optimizer.lr": True}):
        with pytest.raises(UserError, match=r"quotes|number"):
            configs.changed(base, settings, "x")


def test_settings_of_words_keep_what_was_typed():
    settings = configs.settings_of(["run.name=007", "train.max_steps=1e3", "ema.decays=[0.9]"])
    config = configs.changed(configs.Config(), settings, "a test")
    assert (config.run.name, config.train.max_steps, config.ema.decays) == ("007", 1000, [0.9])


def test_yaml_with_tags_or_of_another_encoding_is_refused(tmp_path):
    for data, said in ((b"zero: {extra: !!python/name:os.system x}", "YAML"), (b"run: {name: caf\xe9}", "UTF-8")):
        (tmp_path / "a.yaml").write_bytes(data)
        with pytest.raises(UserError, match=said):
            configs.load([str(tmp_path / "a.yaml")])
