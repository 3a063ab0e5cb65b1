"""The scripts of bench/: a model's cost against PyTorch's own count, and peers that are tiny scripts."""

import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(SCRIPTS))

import cpu_table  # noqa: E402
import limits  # noqa: E402
import peers  # noqa: E402
from model_cost import Decode, ModelCost, Workload, read_cost  # noqa: E402
from peer import stored_bytes  # noqa: E402

FAKE = """
import sys
sys.path.insert(0, {folder!r})
from protocol import Engine, serve

class Fake(Engine):
    version = "1.0"
    facts = {{"weights": 12345}}

    def __init__(self, settings):
        print("a library that prints")
        if settings["model"] == "broken":
            raise RuntimeError("no such model")
        self.model = settings["model"]
        self.held = bytearray(settings["options"].get("bytes", 0))

    def generate(self, prompts, output_len):
        if self.model == "dies" and len(prompts) > 1:
            raise SystemExit(3)
        return len(prompts) * (output_len - (self.model == "short"))

    def stream(self, prompts, output_len):
        if self.model == "whole":
            yield from super().stream(prompts, output_len)
        yield 0
        for _ in range(output_len):
            yield len(prompts)

serve(Fake)
"""


@pytest.fixture
def fake_peer(tmp_path):
    """A function from a model's name to a peer whose engine answers at once."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE.format(folder=str(SCRIPTS / "peers")))
    return lambda name, model="fine": peers.Peer(name, sys.executable, model, driver=str(script))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    config = Qwen2Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=320, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return folder, model


def test_operations_are_those_pytorch_counts(checkpoint):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    folder, model = checkpoint
    cost = read_cost(folder)
    for requests, prompt in ((1, 5), (3, 40)):
        ids = torch.ones(requests, prompt, dtype=torch.long)
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, logits_to_keep=1)
        counted = counter.get_total_flops()
        ours = cost.seconds(Workload(requests, prompt, 1), math.inf, 1.0)
        # PyTorch computes the scores above the diagonal too; a causal kernel need not.
        above = requests * 4 * cost.attention * prompt * (prompt - 1) / 2
        rotary = counted - (ours + above)
        assert 0 <= rotary < 0.02 * counted


def test_bytes_are_those_of_the_weights_and_the_cache(checkpoint):
    folder, model = checkpoint
    cost = read_cost(folder)
    matrices = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)  # tied: counted once
    assert cost.body + cost.head == matrices
    assert cost.kv_values == 2 * 3 * 2 * 16
    one = cost.seconds(Workload(1, 10, 1), 1.0, math.inf)
    assert one == 2 * matrices
    two = cost.seconds(Workload(4, 10, 2), 1.0, math.inf)
    assert two - one == 2 * matrices + 4 * 2 * cost.kv_values * 11


def test_decode_steps_alone_cost_what_the_later_steps_of_a_workload_cost(checkpoint):
    cost = read_cost(checkpoint[0])
    whole, first = Workload(2, 9, 8), Workload(2, 9, 1)
    for limits_ in ((1.0, math.inf), (math.inf, 1.0)):
        later = cost.seconds(whole, *limits_) - cost.seconds(first, *limits_)
        assert cost.seconds(Decode(2, 9, 7), *limits_) == pytest.approx(later)


def test_the_bound_of_both_is_below_each(checkpoint):
    cost = read_cost(checkpoint[0])
    allowed = peers.bounds(cost, Workload(8, 32, 64), {"read_gb_s": 1.0, "bf16_gflop_s": 20.0}, "bfloat16")
    assert allowed["both"] <= min(allowed["memory"], allowed["arithmetic"])
    assert allowed["both"] > 0


def test_arithmetic_is_the_best_product_that_is_exact_enough():
    limits = {"bf16_gflop_s": 5.0, "float32_gflop_s": 100.0, "int8_gop_s": 300.0}
    assert peers.arithmetic_rate(limits, "bfloat16") == 100.0
    assert peers.arithmetic_rate(limits, "bfloat16", "int4") == 300.0
    assert peers.arithmetic_rate(limits | {"bf16_gflop_s": 200.0}, "bfloat16") == 200.0
    assert peers.arithmetic_rate(limits | {"bf16_gflop_s": 200.0}, "float32") == 100.0


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"no \.safetensors"):
        read_cost(tmp_path)


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_peers_wait_stopped_and_answer_in_turn(fake_peer, monkeypatch):
    monkeypatch.setattr(peers, "measure", lambda threads, seconds: {"read_gb_s": 1.0, "bf16_gflop_s": 1.0})
    two = [fake_peer("one"), fake_peer("two")]
    workloads = [Workload(1, 4, 2), Workload(3, 4, 2)]
    with peers.running(two, {"threads": 1}):
        assert [peer.ready["version"] for peer in two] == ["1.0", "1.0"]
        for peer in two:
            deadline = time.monotonic() + 5
            while state(peer.process.pid) != "T" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert state(peer.process.pid) == "T"
        rounds = peers.play(two, workloads, 3, vocab_size=100, threads=1)
    assert len(rounds) == 3
    for peer in two:
        assert peer.failed is None
        assert {work: len(times) for work, times in peer.seconds.items()} == dict.fromkeys(workloads, 3)
        assert peer.process.returncode == -signal.SIGKILL


def test_a_peer_that_fails_leaves_the_others_measured(fake_peer, monkeypatch):
    monkeypatch.setattr(peers, "measure", lambda threads, seconds: {"read_gb_s": 1.0})
    four = [fake_peer("fine"), fake_peer("broken", "broken"), fake_peer("dies", "dies"), fake_peer("short", "short")]
    with peers.running(four, {"threads": 1}):
        peers.play(four, [Workload(1, 4, 2), Workload(2, 4, 2)], 2, vocab_size=100, threads=1)
    fine, broken, dies, short = four
    assert fine.failed is None
    assert all(len(times) == 2 for times in fine.seconds.values())
    assert "no such model" in broken.failed
    assert "it ended" in dies.failed
    assert "produced 1 tokens on 1 x (4 -> 2)" in short.failed
    assert not broken.seconds
    assert not short.seconds


def test_steps_are_measured_behind_prompts_that_are_computed_once(fake_peer, monkeypatch):
    monkeypatch.setattr(peers, "measure", lambda threads, seconds: {"read_gb_s": 1.0, "bf16_gflop_s": 1.0})
    asked: list[tuple[str, dict]] = []
    exchange = peers.Peer._exchange
    monkeypatch.setattr(peers.Peer, "_exchange", lambda peer, m: (asked.append((peer.name, m)), exchange(peer, m))[1])
    two, work = [fake_peer("one"), fake_peer("whole", "whole")], Decode(3, 5, 4)
    with peers.running(two, {"threads": 1}):
        assert len(peers.play_decode(two, [work, Decode(1, 7, 4)], 2, vocab_size=100, threads=1)) == 4
    one, whole = two
    assert one.failed is None
    assert {str(each): len(times) for each, times in one.seconds.items()} == {
        "3 x decode at 5": 2,
        "1 x decode at 7": 2,
    }
    steps = [next(iter(message)) for name, message in asked if name == "one"][1:]
    assert steps == ["open", "more", "more", "more", "close"] * 2
    assert "does not go step by step" in whole.failed
    assert not whole.seconds


def test_a_peers_memory_is_its_peak(fake_peer):
    small, large = fake_peer("small"), fake_peer("large")
    large.options = {"bytes": 64 << 20}
    with peers.running([small, large], {"threads": 1}):
        for peer in (small, large):
            peer.weigh()
    assert small.memory["weights"] == 12345
    assert (60 << 20) < large.memory["peak"] - small.memory["peak"] < (72 << 20)
    cost = ModelCost(body=1, head=1, kv_values=100, attention=1, vocab_size=10)
    above = peers.above_bytes(large, [Workload(2, 3, 4), Decode(1, 20, 5)], cost, "bfloat16")
    assert above == large.memory["peak"] - 12345 - 2 * 100 * 25


def test_a_first_token_is_timed_from_the_start_of_the_process(fake_peer):
    peer, broken = fake_peer("fine"), fake_peer("broken", "broken")
    peers.play_first_token([peer, broken], {"threads": 1}, 2, vocab_size=100)
    assert len(peer.seconds["first token"]) == 2
    assert 0.01 < min(peer.seconds["first token"]) < 60
    assert "no such model" in broken.failed


def test_the_bytes_of_a_model_that_a_peer_brings(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(10))
    (tmp_path / "b.safetensors").write_bytes(bytes(5))
    assert stored_bytes(tmp_path) == 15
    (tmp_path / "openvino_model.bin").write_bytes(bytes(7))
    assert stored_bytes(tmp_path) == 7
    assert stored_bytes(tmp_path / "a.safetensors") == 10


def test_the_table_judges_each_row_in_its_own_run(tmp_path):
    one = str(cpu_table.ONE)
    rows = [
        {"name": "quire", "speeds": {one: 30.0}, "memory": {"peak": 9 << 20, "weights": 1 << 20, "above": 2 << 20}},
        {"name": "openvino", "speeds": {one: 20.0}, "memory": {}},
        {"name": "llamacpp", "speeds": {}, "memory": {}},
        {"name": "limit: memory", "speeds": {one: 40.0}},
        {"name": "limit: both", "speeds": {one: 40.0}},
    ]
    (tmp_path / "qwen05-bf16.json").write_text(json.dumps({"rows": rows}))
    start = [{"name": "quire", "speeds": {}, "first_token_s": 2.5}]
    (tmp_path / "qwen05-bf16-start.json").write_text(json.dumps({"rows": start}))
    table = cpu_table.merge(tmp_path)
    first = table["rows"][0]
    assert (first["best_peer"], first["ratio"], first["limit"], first["reach"]) == ("openvino", 1.5, 40.0, 1.1)
    assert "ratio" not in table["rows"][1], "a row that no peer has is not judged"
    assert table["rows"][-1] == {
        "piece": "qwen05-bf16-start", "shape": "qwen05", "weights": "bf16", "row": "first token, s",
        "values": {"quire": 2.5}, "reach": 3.0,
    }  # fmt: skip
    assert cpu_table.as_markdown(table, "qwen05").splitlines()[2:5] == [
        "| bf16, 1 x (32 -> 64) | 30 (75%) | 20 (50%) | failed | 1.50 | 1.1 |",
        "| bf16, 8 x (32 -> 64) | failed | failed | failed |  | 1.3 |",
        "| bf16, 32 x (128 -> 64) | failed | failed | failed |  | 1.25 |",
    ]
    assert "| bf16, peak memory above weights and KV, MiB | 2 |  |  |  | the least |" in cpu_table.as_markdown(
        table, "qwen05"
    )
    first["ratio"] = 1.05
    assert "| **1.05** | 1.1 |" in cpu_table.as_markdown(table, "qwen05"), "what is short of its goal stands out"


def test_every_row_of_the_issue_is_in_a_piece():
    known = cpu_table.pieces()
    for shape in cpu_table.SHAPES:
        for weights, reach in cpu_table.REACH.items():
            measured = {w for p in known.values() if (p.shape, p.weights) == (shape, weights) for w in p.work}
            assert set(reach) <= measured


def test_an_interpreter_that_is_not_there(fake_peer):
    peer = fake_peer("absent")
    peer.python = "/nowhere/python"
    with peers.running([peer], {"threads": 1}):
        assert "/nowhere/python" in peer.failed


def test_the_whole_run_writes_its_results(checkpoint, fake_peer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "measure", lambda threads, seconds: {"read_gb_s": 10.0, "bf16_gflop_s": 100.0})
    config, out = tmp_path / "peers.toml", tmp_path / "results" / "out.json"
    script = fake_peer("x").driver
    config.write_text(f'[[peer]]\nname = "fake"\npython = "{sys.executable}"\nmodel = "fine"\ndriver = "{script}"\n')
    arguments = ["--model", str(checkpoint[0]), "--config", str(config), "--rounds", "2", "--out", str(out)]
    assert peers.main([*arguments, "--workload", "1,8,4", "--workload", "2,8,1"]) == 0
    table = capsys.readouterr().out
    assert "| fake 1.0 |" in table
    assert "reading memory allows, bfloat16 (10.0 GB/s)" in table
    content = json.loads(out.read_text())
    assert set(content["seconds"]["fake"]) == {"1 x (8 -> 4)", "2 x (8 -> 1)"}
    assert [row["name"] for row in content["rows"]] == ["fake", "limit: memory", "limit: arithmetic", "limit: both"]


@pytest.mark.parametrize("text", ["name", "=python", "name=", "nosuchdriver=python"])
def test_peers_that_cannot_be(text):
    with pytest.raises(SystemExit, match=r"expected NAME=PYTHON|no driver"):
        peers.parse_peer(text, "model").script()


def test_a_peer_with_a_model_and_a_suffix():
    peer = peers.parse_peer("openvino-int8=/env/bin/python:/models/int8", "default")
    assert (peer.python, peer.model, peer.script().name) == ("/env/bin/python", "/models/int8", "drive_openvino.py")


def test_limits_are_measured():
    """No claim about how fast, only that each way says something possible."""
    rates = [limits.read_torch(1, 0.0, mebibytes=8), limits.matmul("bfloat16", 1, 0.0, size=64)]
    rates += [limits.matmul_int8(1, 0.0, size=64)]
    if shutil.which("cc"):
        rates.append(limits.read_c(1, 0.0, mebibytes=2))
    for values in rates:
        assert len(values) == 3
        assert all(0.01 < value < 1e6 for value in values)


def test_without_a_compiler_torch_alone_measures(monkeypatch):
    monkeypatch.setenv("CC", "/bin/false")
    assert limits.read_c(1, 0.0) == []


def test_the_better_way_of_reading_is_the_limit(monkeypatch):
    monkeypatch.setattr(limits, "read_c", lambda *_: [30.0, 10.0, 20.0])
    monkeypatch.setattr(limits, "read_torch", lambda *_: [15.0])
    monkeypatch.setattr(limits, "matmul", lambda name, *_: [100.0 if name == "bfloat16" else 50.0])
    found = limits.measure(threads=2)
    assert (found["read_gb_s"], found["read_c_gb_s_best"]) == (20.0, 30.0)
    assert (found["bf16_gflop_s"], found["float32_gflop_s"]) == (100.0, 50.0)
