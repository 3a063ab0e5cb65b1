"""The configuration file: what it says acts, the command line beats it, and mistakes are named."""

from __future__ import annotations

import argparse

import pytest

from quire.cli.engine_args import engine_config
from quire.cli.main import main
from quire.errors import ConfigError
from quire_server import cli
from quire_server.model_args import each_model

TOML = """
model = "some/model"
port = 9000
api-key = ["one", "two"]
served_model_name = ["a", "b"]
drain-timeout = 5
max-model-len = "32k"
kv-cache-memory-bytes = "4G"
enable-prefix-caching = false
enforce_eager = true
log-format = "json"
max-n = 3
"""
YAML = """
model: some/model
port: 9000
api-key: [one, two]
served_model_name: [a, b]
drain-timeout: 5
max-model-len: 32k
kv-cache-memory-bytes: 4G
enable-prefix-caching: false
enforce_eager: true
log-format: json
max-n: 3
"""


@pytest.fixture
def parsed(tmp_path):
    """parsed(content, *flags, suffix=...): the namespace that `quire serve --config FILE FLAGS` runs with."""

    def parse(content: str, *flags: str, suffix: str = ".toml") -> argparse.Namespace:
        path = tmp_path / f"quire{suffix}"
        path.write_text(content)
        args = cli.parse(argparse.ArgumentParser(prog="quire serve"), ["--config", str(path), *flags])
        args.plugins = None
        return args

    return parse


@pytest.mark.parametrize(("content", "suffix"), [(TOML, ".toml"), (YAML, ".yaml"), (YAML, ".yml")])
def test_what_the_file_says_acts(parsed, content, suffix):
    args = parsed(content, suffix=suffix)
    assert (args.model, args.port, args.log_format, args.drain_timeout) == (["some/model"], 9000, "json", 5.0)
    (model,) = each_model(args)
    settings, config = cli._settings(args), engine_config(model)
    assert config.model == "some/model"
    assert settings.models[0].names == ("a", "b")
    assert settings.api_keys == ("one", "two")
    assert settings.limits.max_n == 3
    assert config.scheduler.max_model_len == 32 * 1024
    assert config.cache.kv_cache_memory_bytes == 4 << 30
    assert config.cache.enable_prefix_caching is False
    assert config.enforce_eager is True
    assert config.scheduler.max_num_seqs == 256  # what it does not say has its default


def test_the_command_line_beats_the_file(parsed):
    args = parsed(TOML, "other", "--port", "8000", "--api-key", "three", "--enable-prefix-caching", "--max-n", "9")
    assert (args.model, args.port, args.api_key) == (
        ["other"],
        8000,
        ["three"],
    )  # 8000 is the default too, but was said
    assert args.enable_prefix_caching is True
    assert args.max_n == 9
    assert args.log_format == "json"


def test_without_a_file_nothing_changes():
    plain = argparse.ArgumentParser()
    cli.add_arguments(plain)
    flags = ["x", "--port", "1"]
    parsed = cli.parse(argparse.ArgumentParser(), flags)
    assert parsed.said == {"model", "port"}
    parsed.said = frozenset()
    assert parsed == plain.parse_args(flags)


@pytest.mark.parametrize(
    ("content", "suffix", "words"),
    [
        ("prot = 1", ".toml", "'prot' is no flag of quire serve; did you mean port?"),
        ("max_num_seq = 1", ".toml", "did you mean max-num-seqs?"),
        ("xyzzy = 1", ".toml", "'xyzzy' is no flag"),
        ("config = 'x'", ".toml", "'config' is no flag"),
        ("port = '9000'", ".toml", "port: must be a whole number, not '9000'"),
        ("port = 90.5", ".toml", "port: must be a whole number, not 90.5"),
        ("port = true", ".toml", "port: must be a whole number, not True"),
        ("drain-timeout = 'long'", ".toml", "drain-timeout: must be a number"),
        ("host = 1", ".toml", "host: must be a string, not 1"),
        ("enforce-eager = 1", ".toml", "enforce-eager: must be true or false, not 1"),
        ("enforce-eager: 'yes'", ".yaml", "enforce-eager: must be true or false"),
        ("log-format = 'xml'", ".toml", "log-format: must be one of text, json, not 'xml'"),
        ("max-model-len = 'far'", ".toml", "max-model-len: 'far' is not a number of tokens"),
        ("served-model-name = []", ".toml", "served-model-name: must not be an empty list"),
        ("served-model-name = ['a', 1]", ".toml", "served-model-name: must be a string, not 1"),
        ("port = 1\nport = 2", ".toml", "--config"),
        ("port: 1\nport: 2", ".yaml", "port: given twice"),
        ("max-n = 1\nmax_n = 2", ".toml", "max_n: given twice"),
        ("[server]\nport = 1", ".toml", "'server' is no flag"),
        ("- port", ".yaml", "found a list"),
        ("port: [", ".yaml", "--config"),
        ("port = ", ".toml", "--config"),
        ("!!python/object/apply:os.getcwd []", ".yaml", "could not determine a constructor"),
        ("port: 1", ".json", "must end in .toml, .yaml or .yml"),
    ],
)
def test_mistakes_are_named(parsed, content, suffix, words):
    with pytest.raises(ConfigError) as caught:
        parsed(content, suffix=suffix)
    assert words in str(caught.value)
    assert str(caught.value).startswith("--config ")


def test_a_missing_file_ends_the_command_in_one_line(capsys):
    assert main(["serve", "--config", "/no/such/file.toml"]) == 2
    assert capsys.readouterr().err.startswith("quire serve: --config /no/such/file.toml: ")


def test_dump_is_a_file_that_says_the_same(tmp_path, capsys, parsed, monkeypatch):
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    first = tmp_path / "first.toml"
    first.write_text(TOML)
    assert main(["serve", "--config", str(first), "--max-n", "7", "--dump-config"]) == 0
    printed = capsys.readouterr().out
    assert "one" not in printed.replace("None", "").split()
    assert "# api-key: given, not shown" in printed
    assert 'dtype = "auto"  # default' in printed
    assert "max-n = 7\n" in printed
    again, before = vars(parsed(printed)), vars(parsed(TOML, "--max-n", "7"))
    assert {k: v for k, v in again.items() if k not in ("config", "api_key", "said")} == {
        k: v for k, v in before.items() if k not in ("config", "api_key", "said")
    }


def test_dump_refuses_what_serving_would_refuse(capsys):
    assert main(["serve", "--max-num-seqs", "0", "--dump-config"]) == 2
    assert "max_num_seqs" in capsys.readouterr().err
