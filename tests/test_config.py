"""Settings: one parser for file and flags, misspelt keys are errors, runs are comparable."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tomllib

import pytest

from jaxhisto import settings
from jaxhisto.config import ModelConfig, PretrainConfig, TileConfig
from jaxhisto.errors import ConfigError
from jaxhisto.flags import parse, shipped_configs

FILE = """
epochs = 5
batch_size = 32
[augment]
jitter = "heavy"
rot90 = false
crop_area = [0.5, 1.0]
[data]
stores = ["a", "b"]
[optim]
weight_decay = 1e-6
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(FILE)
    return str(path)


def test_file_and_flags_meet_in_one_config(recipe):
    config = parse(PretrainConfig, [recipe, "--out", "run", "--batch-size", "64"], "pretrain")
    assert config.batch_size == 64
    assert config.epochs == 5
    assert config.augment.jitter == "heavy"
    assert config.augment.rot90 is False
    assert config.augment.crop_area == (0.5, 1.0)
    assert config.data.stores == ("a", "b")
    assert config.optim.weight_decay == 1e-6
    assert config.model == ModelConfig()


@pytest.mark.parametrize("flags", [["--steps", "7"], ["--steps=7"]])
def test_steps_on_the_command_line_replace_the_files_epochs(recipe, flags):
    config = parse(PretrainConfig, [recipe, "--out", "run", *flags], "pretrain")
    assert (config.steps, config.epochs) == (7, None)


def test_lists_on_the_command_line_replace_the_files(recipe):
    config = parse(PretrainConfig, [recipe, "--out", "run", "--data.stores", "c"], "pretrain")
    assert config.data.stores == ("c",)


def test_a_misspelt_key_in_a_file_is_refused_with_a_suggestion(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text("[augment]\njiter = 'none'\n")
    with pytest.raises(ConfigError, match=r"wrong\.toml: unknown key augment\.jiter; did you mean"):
        parse(PretrainConfig, [str(path), "--out", "run"], "pretrain")


def test_a_misspelt_flag_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(PretrainConfig, ["--out", "run", "--augment.jiter", "none"], "pretrain")
    assert stopped.value.code == 2
    assert "--augment.jitter" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--optim.temperature", "0"],
        ["--augment.crop-area", "0.5", "1.5"],
        ["--augment.blur-sigma", "2", "1"],
        ["--batch-size", "1"],
        ["--tile-px", "-3"],
    ],
)
def test_numbers_outside_their_range_are_refused_by_name(flags):
    with pytest.raises(ConfigError, match=flags[0]):
        parse(PretrainConfig, ["--out", "run", *flags], "pretrain")


def test_positional_arguments_may_stand_before_and_after_flags():
    config = parse(TileConfig, ["--out", "store", "a.svs", "b"], "tile")
    assert config.slides == ("a.svs", "b")
    assert parse(TileConfig, ["a.svs", "b", "--out", "store"], "tile") == config


def test_a_missing_or_broken_file_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        parse(PretrainConfig, ["absent.toml", "--out", "run"], "pretrain")
    (tmp_path / "broken.toml").write_text("epochs = = 3")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        parse(PretrainConfig, [str(tmp_path / "broken.toml"), "--out", "run"], "pretrain")


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_recipe_parses_by_its_bare_name(name):
    if name == "tile":
        assert parse(TileConfig, [name, "a.svs", "--out", "x"], "tile") == TileConfig(
            ("a.svs",), "x"
        )
        return
    config = parse(PretrainConfig, [name, "--out", "run"], "pretrain")
    for key, value in tomllib.loads(shipped_configs()[name].read_text()).items():
        for inner, set_to in value.items() if isinstance(value, dict) else [(None, value)]:
            found = getattr(getattr(config, key), inner) if inner else getattr(config, key)
            assert found == (tuple(set_to) if isinstance(set_to, list) else set_to)


def test_a_shipped_name_that_exists_as_a_folder_is_the_folder(tmp_path, monkeypatch):
    (tmp_path / "tile").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(TileConfig, ["tile", "--out", "x"], "tile").slides == ("tile",)


def test_config_json_round_trip(recipe):
    config = parse(PretrainConfig, [recipe, "--out", "run"], "pretrain")
    assert settings.from_json(PretrainConfig, settings.to_json(config)) == config


def test_operational_fields_are_not_identity():
    a = PretrainConfig(out="run")
    b = dataclasses.replace(a, devices=4, log_every=1, seed=3)
    stored = json.loads(json.dumps(settings.identity(a)))  # tuples come back as lists
    assert settings.differences(stored, settings.identity(b)) == ["seed: 0 -> 3"]


def test_a_group_given_as_a_value_is_refused(tmp_path):
    (tmp_path / "flat.toml").write_text("data = 3\n")
    with pytest.raises(ConfigError, match=r"flat\.toml: data is a group; write \[data\]"):
        parse(PretrainConfig, [str(tmp_path / "flat.toml"), "--out", "run"], "pretrain")


def test_steps_and_epochs_together_are_refused():
    with pytest.raises(ConfigError, match="keep one"):
        parse(PretrainConfig, ["--out", "run", "--steps", "3", "--epochs", "2"], "pretrain")


def test_the_command_line_imports_no_jax():
    code = "import sys, jaxhisto.config, jaxhisto.cli; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
