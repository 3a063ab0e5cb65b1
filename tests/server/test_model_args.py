"""Which models are served, and with what: the command line, --model-flags and a file's [[models]]."""

from __future__ import annotations

import argparse
import re

import psutil
import pytest

from quire.cli.main import main
from quire.errors import ConfigError, DoesNotFit
from quire_server import cli
from quire_server.model_args import each_model, engine_configs, names_of


def parse(*argv: str) -> argparse.Namespace:
    args = cli.parse(argparse.ArgumentParser(prog="quire serve"), list(argv))
    args.plugins = None
    return args


FILE = """
max-model-len = "2k"
max-num-seqs = 32

[[models]]
model = "some/large"
served-model-name = ["large", "gpt-4o"]
quantization = "int8"
max-model-len = "32k"
tool-call-parser = "hermes"

[[models]]
model = "demo"
threads = 1
"""


def told(args: argparse.Namespace) -> list[tuple]:
    return [
        (m.model, names_of(m), m.max_model_len, m.quantization, m.threads, m.max_num_seqs) for m in each_model(args)
    ]


def test_models_on_the_command_line():
    assert told(parse()) == [("demo", ("demo",), None, None, None, 256)]
    assert told(parse("big=some/large", "demo", "--max-model-len", "1k")) == [
        ("some/large", ("big",), 1024, None, None, 256),
        ("demo", ("demo",), 1024, None, None, 256),
    ]
    flags = ("--model-flags", "big=--max-model-len 32k -q int8", "--model-flags", "demo=--threads 2 --enforce-eager")
    assert told(parse("big=some/large", "demo", "--max-model-len", "1k", *flags)) == [
        ("some/large", ("big",), 32768, "int8", None, 256),
        ("demo", ("demo",), 1024, None, 2, 256),
    ]


def test_models_in_a_file(tmp_path):
    path = tmp_path / "quire.toml"
    path.write_text(FILE)
    large = ("some/large", ("large", "gpt-4o"), 32768, "int8", None, 32)
    assert told(parse("--config", str(path))) == [large, ("demo", ("demo",), 2048, None, 1, 32)]
    # The command line beats the file, and what is said to one model beats what is said to all.
    both = told(parse("--config", str(path), "--max-model-len", "4k", "--model-flags", "demo=--max-model-len 512"))
    assert [one[2] for one in both] == [4096, 512]
    assert told(parse("--config", str(path), "other")) == [("other", ("other",), 2048, None, None, 32)]
    settings = cli._settings(parse("--config", str(path)))
    assert [model.parsers.tool for model in settings.models] == ["hermes", "auto"]
    assert settings.batches.concurrency == 16
    path = tmp_path / "quire.yaml"
    path.write_text("models:\n- model: demo\n- {model: demo, served-model-name: two, max-model-len: 512}\n")
    assert told(parse("--config", str(path))) == [
        ("demo", ("demo",), None, None, None, 256),
        ("demo", ("two",), 512, None, None, 256),
    ]


def test_the_dump_says_the_same(tmp_path, capsys):
    path = tmp_path / "quire.toml"
    path.write_text(FILE)
    flags = ["--config", str(path), "--model-flags", "demo=--max-num-batched-tokens 64"]
    assert main(["serve", *flags, "--dump-config"]) == 0
    again = tmp_path / "again.toml"
    again.write_text(capsys.readouterr().out)
    assert told(parse("--config", str(again))) == told(parse(*flags))
    assert [m.max_num_batched_tokens for m in each_model(parse("--config", str(again)))] == [2048, 64]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["demo", "demo"], "two models are named 'demo'"),
        (["a=demo", "demo", "--served-model-name", "x"], "--served-model-name names one model"),
        (["a=demo", "demo", "--model-flags", "b=--threads 1"], "'b' is none of the models a, demo"),
        (["a=demo", "demo", "--model-flags", "a=--port 1"], "unrecognized arguments: --port 1"),
        (["a=demo", "demo", "--model-flags", "a=--threads x"], "invalid int value"),
        (["a=demo", "demo", "--model-flags", "a='"], "No closing quotation"),
    ],
)
def test_mistakes_on_the_command_line_are_named(argv, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        each_model(parse(*argv))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('model = "a"\n[[models]]\nmodel = "b"', "model and models: give one of them"),
        ("models = []", "models: must be tables"),
        ('models = ["demo"]', "models: must be tables"),
        ("[[models]]\nthreads = 1", "models[0]: model is missing"),
        ('[[models]]\nmodel = "a"\nport = 1', "'port' is no flag of one of several models"),
        ('[[models]]\nmodel = "a"\nthreads = "x"', "threads: must be a whole number"),
        ("[[models]]\nmodel = 1", "model: must be a string"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, content, words):
    path = tmp_path / "quire.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse("--config", str(path))


def test_memory_is_divided_before_anything_is_loaded():
    flags = ("--device", "cpu", "--gpu-memory-utilization", "0.01", "--model-flags", "b=--kv-cache-memory-bytes 16M")
    configs, report = engine_configs(each_model(parse("a=demo", "b=demo", *flags)))
    assert configs[1].cache.kv_cache_memory_bytes == 16 << 20
    assert 0 < configs[0].cache.kv_cache_memory_bytes < psutil.virtual_memory().total * 0.01
    assert all(config.cores and config.threads for config in configs)
    assert "for 2 models" in report
    flags = ("--device", "cpu", "--model-flags", "b=--kv-cache-memory-bytes 4000G")
    with pytest.raises(
        DoesNotFit, match=r"2 models do not fit together on cpu.*\n  a: .* at least\n  b: .*3.91 TiB|4000"
    ) as no:
        engine_configs(each_model(parse("a=demo", "b=demo", *flags)))
    assert "--max-model-len" in str(no.value)
    with pytest.raises(Exception, match="^b: "):
        engine_configs(each_model(parse("a=demo", "b=/no/such/folder", "--device", "cpu")))
