"""What the command line refuses before anything starts, and the flags it hands to a server of its own."""

import argparse

import pytest

from quire.bench.environment import commit, describe
from quire.bench.launch import engine_flags
from quire.cli import bench
from quire.cli.engine_args import engine_config
from quire.cli.main import main
from quire.errors import ConfigError


def parse(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words",
    [
        ("serve", "--request-rate", "0"),
        ("serve", "--request-rate", "nan"),
        ("serve", "--burstiness", "-1"),
        ("serve", "--max-concurrency", "0"),
        ("serve", "--num-prompts", "1.5"),
        ("serve", "--random-range-ratio", "1"),
        ("serve", "--metric-percentiles", "50,101"),
        ("serve", "--input-len", "9:5"),
        ("serve", "--output-len", "0"),
        ("serve", "--header", "novalue"),
        ("serve", "--extra-body", "[1]"),
        ("serve", "--dataset-name", "nothing"),
        ("latency", "--batch-size", "0"),
        ("latency", "--num-iters", "-3"),
        ("throughput", "--request-rate", "1"),
    ],
)
def test_refused_by_name(words, capsys):
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("throughput", "--dataset-name", "sharegpt"), "it needs --dataset-path"),
        (("serve", "--dataset-path", "x", "--input-len", "5"), "input_len"),
        (("serve", "--dataset-path", "x", "--output-len", "5:6"), "output_len: a range"),
        (("serve", "--random-vocab-size", "1"), "random_vocab_size = 1"),
        (("serve", "--input-len", "5:6", "--random-range-ratio", "0.1"), "random_range_ratio = 0.1"),
    ],
)
def test_flags_that_contradict(words, message):
    with pytest.raises(ConfigError, match=message):
        bench.check(parse(*words))


def test_vllms_names_are_taken():
    args = parse(
        "serve", "--random-input-len", "10", "--random-output-len", "20", "--random-range-ratio", "0.5",
        "--num-prompts", "3", "--request-rate", "inf", "--burstiness", "2", "--max-concurrency", "4",
        "--dataset-name", "random", "--seed", "7",
    )  # fmt: skip
    bench.check(args)
    assert (args.inputs.low, args.inputs.high) == (5, 15)
    assert (args.outputs.low, args.outputs.high) == (10, 30)
    assert args.seed == 7


def test_a_started_server_gets_the_engine_flags():
    words = [
        "--dtype",
        "float32",
        "--no-enable-prefix-caching",
        "--kv-cache-memory-bytes",
        "1G",
        "--max-model-len",
        "2k",
    ]
    words += ["--enforce-eager", "--device", "cpu:0", "--threads", "1"]
    args = parse("serve", "--base-url", "http://x", *words)
    args.plugins = None
    args.model = "demo"
    again = parse("serve", *engine_flags(args))
    again.plugins, again.model = None, "demo"
    assert engine_config(again) == engine_config(args)
    assert engine_config(args).cache.enable_prefix_caching is False


def test_rounding_has_flags_and_short_spellings():
    args = parse("serve", "--base-url", "http://x", "--quantization", "int4", "--kv-cache-dtype", "fp16")
    args.plugins, args.model = None, "demo"
    config = engine_config(args)
    assert (config.quantization, config.cache.kv_cache_dtype) == ("int4", "float16")
    with pytest.raises(SystemExit):
        parse("serve", "--quantization", "int3")
    assert engine_flags(parse("serve")) == []


def test_a_server_that_cannot_start_shows_its_last_words(capsys, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert main(["bench", "serve", "--model", "demo"]) == 2
    assert "quire serve ended with status 1" in capsys.readouterr().err


def test_secrets_stay_out_of_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["quire", "bench", "--api-key", "s1", "--header=A=s2", "--seed", "1"])
    assert describe()["command"] == ["quire", "bench", "--api-key", "***", "--header=***", "--seed", "1"]


def test_the_commit_is_none_outside_a_checkout(tmp_path):
    assert commit(tmp_path) is None
