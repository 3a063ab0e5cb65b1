"""Structured output on the demo model, held against jsonschema and re, which we did not write."""

from __future__ import annotations

import json
import re
import time

import jsonschema
import numpy as np
import pytest

from quire import LLM, SamplingParams
from quire.sampling.grammar import KEPT, GrammarCompiler, GrammarError
from quire.sampling.grammar_state import GrammarStates
from quire.sampling.noise import child_seed
from quire.sampling.params import InvalidParameter, ParamLimits, StructuredOutputs

from .test_invariance import bits

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None, 7]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SHAPE = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"kind": {"const": "circle"}, "r": {"type": "integer", "minimum": 1, "maximum": 99}},
            "required": ["kind", "r"],
            "additionalProperties": False,
        },
        {
            "type": "array",
            "prefixItems": [{"type": "boolean"}, {"$ref": "#/$defs/date"}],
            "minItems": 2,
            "items": False,
        },
    ],
    "$defs": {"date": {"type": "string", "format": "date"}},
}
SCHEMAS = [PERSON, SHAPE, {"type": "string", "pattern": "^[a-c]{2,5}$"}, {"enum": [1, "two", None]}]
GREETING = "Hello, please give me"


@pytest.fixture(scope="module")
def demo():
    llm = LLM("demo", device="cpu", threads=1, kv_cache_memory_bytes=64 << 20)
    yield llm
    llm._engine.core.scheduler.check()
    llm.shutdown()


@pytest.fixture(scope="module")
def compiler(demo):
    return GrammarCompiler(demo.get_tokenizer, demo._engine.spec.vocab_size, demo._engine.spec.eos_token_ids)


def params(**options):
    given = {"temperature": 1.0, "max_tokens": 120, "seed": 1}
    structure = {k: options.pop(k) for k in list(options) if k in StructuredOutputs.__struct_fields__}
    return SamplingParams(**given | options, structured_outputs=StructuredOutputs(**structure) if structure else None)


def samples(llm, many):
    return [output.outputs[0] for output in llm.generate([GREETING] * len(many), many, use_tqdm=False)]


def test_outputs_match_their_schema(demo):
    wanted = [(schema, seed) for schema in SCHEMAS for seed in range(5)]
    made = samples(demo, [params(json=schema, seed=seed, temperature=1.3, max_tokens=400) for schema, seed in wanted])
    for (schema, _), sample in zip(wanted, made, strict=True):
        assert sample.finish_reason == "stop", sample.text
        jsonschema.validate(json.loads(sample.text), schema, format_checker=jsonschema.FormatChecker())
    assert len({sample.text for sample in made}) > 10, "the samples should differ"


def test_any_object_and_bounded_white_space(demo):
    # The likeliest tokens by far: white space and what opens more of it.
    bias = {token: 30.0 for token in range(2000) if demo.get_tokenizer().token_text(token).isspace()}
    greedy, spaced, cut = samples(
        demo,
        [
            params(json=PERSON, temperature=0, max_tokens=400),
            params(json=PERSON, temperature=0, logit_bias=bias, max_tokens=400),
            params(json_object=True, max_tokens=4),
        ],
    )
    for sample in (greedy, spaced):
        assert sample.finish_reason == "stop"
        jsonschema.validate(json.loads(sample.text), PERSON)
        assert not re.search(r"\s{42}", sample.text)
    assert cut.finish_reason == "length"
    assert cut.text.startswith("{")
    (compact,) = samples(demo, [params(json=PERSON, disable_any_whitespace=True, logit_bias=bias)])
    assert compact.text == json.dumps(json.loads(compact.text), separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize("regex", [r"[0-9]{4}-[0-9]{2}", r"^(yes|no)!{1,3}$", r"[a-fä-ü]{1,6}\$", r"[0-9]{3} €"])
def test_regex(demo, regex):
    for sample in samples(demo, [params(regex=regex, seed=seed) for seed in range(4)]):
        assert sample.finish_reason == "stop"
        assert re.fullmatch(regex, sample.text), sample.text


def test_choice(demo):
    options = ["red", "dark blue", 'say "hi"\n', "日本"]
    made = samples(demo, [params(choice=options, seed=seed, temperature=5.0) for seed in range(16)])
    assert {sample.finish_reason for sample in made} == {"stop"}
    assert {sample.text for sample in made} <= set(options)
    assert len({sample.text for sample in made}) > 1


@pytest.mark.parametrize(
    ("grammar", "regex"),
    [
        ('start: "a" ("b" | c) "."\nc: /[0-9]{2}/', r"a(b|\d\d)\."),
        ('root ::= "x" item item?\nitem ::= "y" | "z" [0-9]', r"x(y|z\d){1,2}"),
        ("start: nest\nnest: \"(\" nest \")\" | \"x\"\n", r"\(*x\)*"),
    ],
    ids=["lark", "ebnf", "recursive"],
)  # fmt: skip
def test_grammar(demo, grammar, regex):
    for sample in samples(demo, [params(grammar=grammar, seed=seed) for seed in range(4)]):
        assert re.fullmatch(regex, sample.text), sample.text
        assert sample.text.count("(") == sample.text.count(")") or sample.finish_reason == "length"


def test_structural_tag(demo, compiler):
    tag = {
        "triggers": ["<f="],
        "structures": [{"begin": "<f=add>", "schema": {"type": "integer"}, "end": "</f>"}],
    }
    spec = StructuredOutputs(structural_tag=tag)
    assert takes(compiler, spec, "Some text")
    assert takes(compiler, spec, "So: <f=add>12</f> and <f=add>3</f>.")
    for wrong in ("<f=sub>1</f>", '<f=add>"x"</f>', "<f=add>1"):
        assert not takes(compiler, spec, wrong)


def test_stop_string_and_ignored_end(demo):
    stopped, forever = samples(
        demo,
        [params(json=PERSON, stop=["age"], include_stop_str_in_output=True), params(choice=["red"], ignore_eos=True)],
    )
    assert stopped.text.endswith("age")
    assert stopped.stop_reason == "age"
    assert (forever.text, forever.finish_reason) == ("red", "length")


# -- invariance ------------------------------------------------------------------------------------------------------
def company():
    """Constrained and free requests, greedy and sampled."""
    kinds = [
        dict(json=PERSON),
        dict(),
        dict(regex="[a-z ]{90,120}", frequency_penalty=0.5),
        dict(json=SHAPE, temperature=0.0),
        dict(choice=["one", "two", "three"], top_k=5),
        dict(temperature=0.7, top_p=0.9),
    ]
    return [params(**kind, seed=50 + i, logprobs=2, max_tokens=40) for i, kind in enumerate(kinds * 2)]


@pytest.fixture(scope="module")
def alone(demo):
    return [bits(demo.generate([GREETING], one, use_tqdm=False))[0] for one in company()]


WAYS = {
    "together": dict(),
    "chunked, one step at a time": dict(max_num_batched_tokens=7, max_num_seqs=7, async_scheduling=False),
    "preempted": dict(num_pages=(9,), max_model_len=112, preemption_mode="recompute", enable_prefix_caching=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_bits_do_not_depend_on_company(way, alone, engine):
    options = dict(WAYS[way])
    llm = engine("demo", threads=1, **options)
    outputs = llm.generate([GREETING] * 12, company(), use_tqdm=False)
    assert bits(outputs) == alone
    if "num_pages" in options:
        assert llm._engine.core.stats().preemptions > 0, "the pool was meant to be too small"


def test_samples_of_one_request(demo):
    base = params(json=PERSON, n=3, seed=9, logprobs=1)
    together = bits(demo.generate([GREETING], base, use_tqdm=False))[0]
    for index in range(3):
        single = params(json=PERSON, seed=child_seed(9, index), logprobs=1)
        assert bits(demo.generate([GREETING], single, use_tqdm=False))[0][0] == together[index]
    assert len({tuple(tokens) for tokens, _ in together}) == 3


def test_resumed_after_a_crash(demo):
    """A request that comes with tokens already produced goes on in the middle of its grammar."""
    sampling = params(json=PERSON, seed=3)
    (whole,) = samples(demo, [sampling])
    core = demo._engine.core
    for cut in (1, 5, len(whole.token_ids) - 1):
        _, message = demo._inputs.request(GREETING, sampling, f"resumed-{cut}")
        message.output_token_ids = [list(whole.token_ids[:cut])]
        core.add(message)
        rest = []
        while core.has_work():
            rest += [token for output in core.step() for token in output.token_ids]
        assert rest == list(whole.token_ids[cut:])


# -- refusals --------------------------------------------------------------------------------------------------------
REFUSED = {
    "unsupported keyword": dict(json={"type": "array", "uniqueItems": True}),
    "nothing matches": dict(json=False),
    "unknown type": dict(json={"type": "strin"}),
    "unknown format": dict(json={"type": "string", "format": "colour"}),
    "not JSON": dict(json="{"),
    "not a schema": dict(json="[1]"),
    "options in the schema": dict(json={"x-guidance": {"lenient": True}, "uniqueItems": True}),
    "bad reference": dict(json={"$ref": "#/$defs/none"}),
    "look-ahead": dict(regex="(?=a)b"),
    "unclosed group": dict(regex="a("),
    "deep regex": dict(regex="(" * 30_000 + "a" + ")" * 30_000),
    "deep schema": dict(json='{"items":' * 20_000 + "{}" + "}" * 20_000),
    "unknown rule": dict(grammar="start: foo"),
    "no start": dict(grammar='a: "x"'),
    "bad EBNF": dict(grammar='root ::= "a'),
    "no structure": dict(structural_tag={"structures": [], "triggers": ["<"]}),
    "too long": dict(regex="a" * 200_000),
    "too large": dict(json={"allOf": [{"anyOf": [{"properties": {f"{k}{i}": {}}} for k in "ab"]} for i in range(24)]}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(demo, name):
    began = time.monotonic()
    with pytest.raises(InvalidParameter) as refused:
        samples(demo, [params(**REFUSED[name])])
    assert refused.value.field == "structured_outputs"
    assert len(str(refused.value)) < 1000
    assert time.monotonic() - began < 10


def test_specification_is_checked():
    for wrong in (
        dict(),
        dict(regex="a", choice=["b"]),
        dict(choice=[]),
        dict(choice=["a", ""]),
        dict(choice="ab"),
        dict(json=3),
        dict(json_object=False),
        dict(regex=""),
        dict(regex="a", disable_any_whitespace=True),
        dict(json_object=True, disable_additional_properties=True),
        dict(json={}, disable_additional_properties=1),
    ):
        with pytest.raises(InvalidParameter) as refused:
            StructuredOutputs(**wrong)
        assert refused.value.field == "structured_outputs"
    for field, value in (("min_tokens", 3), ("bad_words", ["x"]), ("allowed_token_ids", [5])):
        with pytest.raises(InvalidParameter) as refused:
            params(regex="a", **{field: value})
        assert refused.value.field == field
    with pytest.raises(InvalidParameter, match="at most 5 characters"):
        params(choice=["abc", "def"]).resolve(1000, 100, limits=ParamLimits(grammar_length=5))


def test_without_a_tokenizer(engine, tiny):
    llm = engine(tiny)
    with pytest.raises(InvalidParameter, match="needs a tokenizer"):
        llm.generate([[5]], params(regex="a", detokenize=False), use_tqdm=False)


def test_hostile_but_legal(compiler):
    """Each is bounded in time by the engine's budgets, in compiling and in a step."""
    for spec in (
        dict(regex="((a{0,1000}){0,1000}){0,1000}"),
        dict(regex="(a|b)*a(a|b){25}"),
        dict(regex="(a?){5000}b"),
        dict(json={"type": "array", "minItems": 10**9}),
        dict(json={"type": "array", "maxItems": 10**6, "items": {"type": "array", "maxItems": 10**6}}),
        dict(json={"enum": list(range(10_000))}),
        dict(grammar='start: s\ns: s s | "a" | ""'),
    ):
        began = time.monotonic()
        try:
            matcher = compiler.matcher(StructuredOutputs(**spec))
            for token in compiler._tokenizer.encode("aaaaaaaa", add_special_tokens=False):
                matcher.compute_bitmask()
                matcher.try_consume_tokens([token])
        except GrammarError:
            pass
        assert time.monotonic() - began < 5, spec


# -- masks -----------------------------------------------------------------------------------------------------------
def takes(compiler, spec, text):
    """Whether the whole of ``text`` is an output that ``spec`` allows."""
    matcher = compiler.matcher(spec)
    ids = compiler._tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_no_stream_of_grammars_fills_the_memory(compiler):
    for i in range(KEPT + 20):
        compiler.matcher(StructuredOutputs(choice=[f"choice {i}"]))
    assert len(compiler._compiled) == KEPT


def test_masks(compiler):
    states = GrammarStates(compiler)
    tokenizer = compiler._open()
    assert states.begin([0, 1]) is None
    states.admit(1, StructuredOutputs(json={"type": "string"}), tokenizer.encode('"x', add_special_tokens=False))
    states.admit(3, StructuredOutputs(regex="ab"), tokenizer.encode("ab", add_special_tokens=False))
    states.fork(1, 2)
    made = states.begin([0, 1, 2, 3]).result()
    assert made.rows.tolist() == [1, 2, 3]
    assert not made.errors
    allowed = [np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist() for row in made.bits]
    assert allowed[0] == allowed[1]
    assert len(allowed[0]) > 1000
    assert not set(allowed[0]) & tokenizer.special_ids, "a string must not hold a special token"
    for token in allowed[0]:  # by its bytes alone
        assert b"\n" not in tokenizer.token_bytes(token)
    assert set(allowed[2]) == set(tokenizer.eos_token_ids), "a complete output can only end"
    for row in (1, 2, 3):
        states.release(row)
    assert states.begin([1, 2, 3]) is None


@pytest.mark.parametrize(
    ("structure", "text"),
    [
        ({"regex": r"[A-Z][a-z]+( [a-z]+){0,20}\."}, "The quick brown fox jumps over the lazy dog."),
        ({"regex": r"[A-Z][^.!?\n]{10,60}[.!?]"}, "The quick brown fox: 4 jumps, over the lazy dog!"),
        ({"regex": r"[a-z_]{1,25}"}, "a_name_of_some_letters"),
        ({"regex": r"\p{L}+( \p{L}+)*"}, "Über den Wolken is a song"),
        ({"json": PERSON}, '{"name": "Ada Lovelace", "age": 36, "tags": ["a", null, 7]}'),
        ({"json_object": True}, '{"a": [1, 2.5, {"text": "Free text, of some length: it says much."}]}'),
        ({"choice": ["red", "dark blue", "dark green"]}, "dark green"),
    ],
)
def test_words_are_only_a_short_cut(compiler, structure, text):
    """Each mask on the way is the one that a look at every token by itself gives."""
    tokenizer = compiler._open()
    plain = GrammarCompiler(lambda: tokenizer, compiler._vocab_size, compiler._eos)
    plain._tokenizer, plain._vocabulary = tokenizer, plain._load_vocabulary().with_slices([])
    one, other = (each.matcher(StructuredOutputs(**structure)) for each in (compiler, plain))
    for token in [*tokenizer.encode(text, add_special_tokens=False), None]:
        masks = [np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32) for matcher in (one, other)]
        assert masks[0].any()
        np.testing.assert_array_equal(*masks)
        if token is not None:
            assert one.consume_token(token)
            assert other.consume_token(token)
