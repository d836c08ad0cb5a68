"""Weights in prompts and prompts of many chunks, against diffusers' `encode_prompt` and compel's own front door."""

import copy
import logging
import time
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from inference.errors import RequestFailed
from inference.lora.adapter import Adapter, LowRank
from inference.lora.bank import AdapterBank
from inference.lora.products.rows import AppliedAdapter
from inference.models.families.clip_prompts import (
    MAX_PASSES,
    MAX_WEIGHT,
    Fragment,
    LongPromptEncoder,
    num_tokens,
    parse_weights,
)
from inference.models.families.sdxl import StableDiffusionXL
from inference.models.families.stable_diffusion import StableDiffusion
from inference.models.inputs import Prompt
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_sdxl, byte_tokenizer, load_pipe

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNK = 77
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
# 300 tokens: a letter each, in words of five.
CPU = torch.device("cpu")
LONG = "abcde " * 60


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    # As on the engine's thread.
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_pipe(build_tiny_sd(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_pipe(build_tiny_sdxl(tmp_path_factory.mktemp("sdxl")))


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def encoder_of(pipe: Any) -> LongPromptEncoder:
    return LongPromptEncoder(tokenizers_of(pipe), text_encoders_of(pipe), CPU)


def tokenizers_of(pipe: Any) -> list[Any]:
    return [getattr(pipe, name) for name in ("tokenizer", "tokenizer_2") if hasattr(pipe, name)]


def text_encoders_of(pipe: Any) -> list[Any]:
    return [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]


def by_diffusers(pipe: Any, text: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokens, _, *pooled = pipe.encode_prompt(
        text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return tokens[0], pooled[0][0] if pooled else None


# The parser.


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("(a red fox:1.3)", [("a red fox", 1.3)]),
        ("a (red:1.3) fox", [("a ", 1.0), ("red", 1.3), (" fox", 1.0)]),
        ("a (very (red:1.5) fox:1.2)", [("a ", 1.0), ("very ", 1.2), ("red", 1.5 * 1.2), (" fox", 1.2)]),
        ("((fox:2):2)", [("fox", MAX_WEIGHT)]),
        ("(fox: .5 )(hen:0)(owl:1.)", [("fox", 0.5), ("hen", 0.0), ("owl", 1.0)]),
        ("a (fox:1.0) runs", [("a fox runs", 1.0)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("((tabby) cat:1.2)", [("(tabby) cat", 1.2)]),
        ("(a (b:1.2)", [("(a ", 1.0), ("b", 1.2)]),
        ("a) (b:1.2)", [("a) ", 1.0), ("b", 1.2)]),
        (r"(bow \(weapon\):1.2)", [("bow (weapon)", 1.2)]),
        (r"\(a:1.2\) (b:1.2)", [("(a:1.2) ", 1.0), ("b", 1.2)]),
        (r"(a\:1.2) (b:1.2)", [("(a:1.2) ", 1.0), ("b", 1.2)]),
        (r"C:\\(b:1.2) \d", [("C:\\", 1.0), ("b", 1.2), (" \\d", 1.0)]),
    ],
)
def test_weights_are_read(prompt: str, fragments: list[tuple[str, float]]) -> None:
    assert parse_weights(prompt) == tuple(Fragment(*one) for one in fragments)


@pytest.mark.parametrize(
    "prompt",
    [
        *("", "a fox", "(tabby) cat", "C++", "a :) and :(", "a [b]", "((a))", "((a", "a))", ")(", "{a:1.2}", "[a:1.2]"),
        *("(16:9)", "(4:3)", "(1 : 1)", "at (12:01)", "(a:3.01)", "(a:9)", "(a:-1)", "(a:+1)", "(a:1,5)", "(a:1e0)"),
        *("(a:nan)", "(a:inf)", "(a:)", "(:1.2)", "(a 1.2)", "(a:1.2.3)", "(a:.)", "(a:1.2", "a:1.2)", "(a:①)"),
        *(r"\(a\)", r"\(a:1.2\)", r"(a:1.2\)", r"\(a:1.2)", r"(a\:1.2)", "\\", f"(a:{'0' * 20}1)"),
    ],
)
def test_text_without_weights_comes_back_as_it_is_escapes_too(prompt: str) -> None:
    assert parse_weights(prompt) == (Fragment(prompt, 1.0),)


Node = str | tuple[list[Any], float]

WORDS = st.text("ab (),:;.[]\\é狐", min_size=1, max_size=6)
WEIGHTS = st.sampled_from([0.0, 0.5, 0.75, 1.0, 1.25, 2.0, 3.0])
TREES: st.SearchStrategy[list[Node]] = st.recursive(
    st.lists(WORDS, min_size=1, max_size=3),
    lambda inner: st.lists(WORDS | st.tuples(inner, WEIGHTS), min_size=1, max_size=3),
    max_leaves=12,
)


def written(nodes: list[Node]) -> str:
    return "".join(
        "".join("\\" + each if each in "():\\" else each for each in node)
        if isinstance(node, str)
        else f"({written(node[0])}:{node[1]})"
        for node in nodes
    )


def weighed(nodes: list[Node], outer: float = 1.0) -> Iterator[tuple[str, float]]:
    """Return each character and its weight."""
    for node in nodes:
        if isinstance(node, str):
            yield from ((each, outer) for each in node)
        else:
            yield from weighed(node[0], min(outer * node[1], MAX_WEIGHT))


@given(TREES, WORDS, WEIGHTS)
def test_text_written_with_escapes_and_weights_is_parsed_back(nodes: list[Node], word: str, weight: float) -> None:
    nodes = [*nodes, ([word], weight)]

    runs = groupby(weighed(nodes), key=lambda one: one[1])
    meant = [Fragment("".join(each for each, _ in run), weight) for weight, run in runs]
    assert parse_weights(written(nodes)) == tuple(meant)


@given(st.text("ab():\\.0123 []") | st.text())
@example("((a:0):nan)")
def test_any_text_is_parsed_and_only_syntax_is_removed(prompt: str) -> None:
    fragments = parse_weights(prompt)

    text = "".join(fragment.text for fragment in fragments)
    rest = iter(prompt)
    between = [each for wanted in text for each in iter(lambda: next(rest), wanted)]
    assert set(between + list(rest)) <= set("():\\.0123456789 \t")
    assert all(0 <= fragment.weight <= MAX_WEIGHT for fragment in fragments)
    assert all(one.weight != other.weight for one, other in pairwise(fragments))
    assert all(fragment.text for fragment in fragments) or prompt == ""


@given(st.text().filter(lambda text: not any(each.isdigit() for each in text)))
def test_text_without_a_number_has_no_weight(prompt: str) -> None:
    assert parse_weights(prompt) == (Fragment(prompt, 1.0),)


@pytest.mark.parametrize("hostile", ["(", ")", "()", "(:1", ":1)", "(:", "\\", "(a:1.5)", "((a:1.5)", "( : 1 "])
def test_hostile_prompts_take_linear_time(hostile: str) -> None:
    num_times = 50_000 // len(hostile)
    began = time.process_time()

    parse_weights(hostile * num_times + ":1.5)" * num_times)

    # Tens of milliseconds where the machine is free.
    assert time.process_time() - began < 5


# Embeddings.


@pytest.mark.parametrize("text", ["a red fox", "", "A Fox! Its tail, (bushy)... 狐 🦊", "wow!!", "x" * 75, LONG[:30]])
def test_an_ordinary_prompt_is_encoded_as_diffusers_does(pipe: Any, text: str) -> None:
    encoder = encoder_of(pipe)
    assert encoder.is_ordinary(text)

    tokens, pooled = encoder.encode(text)

    plain_tokens, plain_pooled = by_diffusers(pipe, text)
    torch.testing.assert_close(tokens, plain_tokens, **CLOSE)
    torch.testing.assert_close(pooled, plain_pooled, **CLOSE)


@pytest.mark.parametrize(
    ("text", "is_ordinary"),
    [
        *(("a red fox", True), ("", True), ("x" * 75, True), ("x" * 76, False), (LONG, False)),
        *(("(fox:1.2)", False), ("(fox:1.0)", False), (r"bow \(weapon\)", True), ("(16:9)", True)),
    ],
)
def test_prompt_that_diffusers_encodes_alike_is_ordinary(pipe: Any, text: str, is_ordinary: bool) -> None:
    assert encoder_of(pipe).is_ordinary(text) is is_ordinary


def test_a_text_is_ordinary_only_if_every_encoder_reads_it_whole(sdxl: Any) -> None:
    encoder = LongPromptEncoder([sdxl.tokenizer, coarse_tokenizer()], text_encoders_of(sdxl), CPU)

    assert encoder.is_ordinary("o" * 75)
    assert not encoder.is_ordinary("o" * 76)


def test_tokens_are_counted_with_start_and_end(sd: Any) -> None:
    assert [num_tokens(sd.tokenizer, text) for text in ("", "fox", LONG)] == [2, 5, 302]


@pytest.mark.parametrize(("text", "plain"), [("a (fox:1.0) runs", "a fox runs"), ("((fox:0.5):2)", "fox")])
def test_a_weight_of_one_changes_nothing(pipe: Any, text: str, plain: str) -> None:
    torch.testing.assert_close(encoder_of(pipe).encode(text), encoder_of(pipe).encode(plain), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("position", "chunk"), [(84, 1), (252, 3)])
def test_a_word_beyond_the_77th_token_changes_its_own_chunk(pipe: Any, position: int, chunk: int) -> None:
    changed = f"{LONG[: position // 5 * 6]}fghij {LONG[position // 5 * 6 + 6 :]}"

    one, other = (encoder_of(pipe).encode(text) for text in (LONG, changed))

    differs = (one.tokens != other.tokens).view(4, -1).any(dim=1)
    assert differs.tolist() == [number == chunk for number in range(4)]
    if one.pooled is not None and other.pooled is not None:
        assert torch.equal(one.pooled, other.pooled)


@pytest.mark.parametrize(("num_letters", "num_chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3), (300, 4)])
def test_chunks_have_75_tokens_by_default(pipe: Any, num_letters: int, num_chunks: int) -> None:
    tokens, _ = encoder_of(pipe).encode("x" * num_letters)

    assert tokens.shape == (num_chunks * CHUNK, pipe.unet.config.cross_attention_dim)


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        ("a b, c. d e, f.", "g h, " + "i" * 70),
        ("a b, c: d e;", "g h " + "i" * 70),
        ("a b c", "d" * 74),
    ],
)
def test_a_chunk_ends_with_a_sentence_a_phrase_or_a_word(pipe: Any, first: str, rest: str) -> None:
    encoder = encoder_of(pipe)

    tokens, pooled = encoder.encode(f"{first} {rest}")

    torch.testing.assert_close(tokens[:CHUNK], encoder.encode(first).tokens, **CLOSE)
    torch.testing.assert_close(tokens[CHUNK:], encoder.encode(rest).tokens, **CLOSE)
    torch.testing.assert_close(pooled, by_diffusers(pipe, f"{first} {rest}")[1], **CLOSE)


def test_weight_boundaries_split_words(pipe: Any) -> None:
    torch.testing.assert_close(encoder_of(pipe).encode("(fox:1.2)es"), encoder_of(pipe).encode("(fox:1.2) es"), **CLOSE)


@pytest.mark.parametrize("weight", [1.3, 2.0])
def test_a_weight_above_one_moves_that_part_away_from_the_empty_prompt(pipe: Any, weight: float) -> None:
    encoder = encoder_of(pipe)
    empty, plain = encoder.encode(""), encoder.encode("a red fox")

    weighted = encoder.encode(f"a (red:{weight}) fox")

    # After the start and the "a".
    red = slice(2, 5)
    expected = plain.tokens.clone()
    expected[red] = empty.tokens[red] + weight * (plain.tokens[red] - empty.tokens[red])
    torch.testing.assert_close(weighted.tokens, expected, **CLOSE)
    torch.testing.assert_close(weighted.pooled, plain.pooled, **CLOSE)


def test_weight_zero_removes_a_part_and_a_small_weight_reduces_it(pipe: Any) -> None:
    def derive_trajectory(weight: float) -> float:
        red, wet = (encoder_of(pipe).encode(f"a ({word}:{weight}) fox").tokens for word in ("red", "wet"))
        return float((red - wet).norm())

    assert derive_trajectory(1.0) > derive_trajectory(0.5) > derive_trajectory(0.1) > 100 * derive_trajectory(0.0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("a (red:1.3) fox", "a (red)1.3 fox"),
        ("a (red:0.4) fox", "a (red)0.4 fox"),
        ("(a (very (red:1.5) fox:1.2) and a hen:0.5)", "(a (very (red)1.5 fox)1.2 and a hen)0.5"),
        ("a (red:1.3) fox, (quick:0.7) and (brown:0.0)", "a (red)1.3 fox, (quick)0.7 and (brown)0.0"),
        (f"{LONG}. a (red:1.3) fox, {LONG}(quick:0.6)", f"{LONG}. a (red)1.3 fox, {LONG}(quick)0.6"),
        (LONG, LONG),
    ],
)
def test_weights_have_compel_s_meaning(pipe: Any, ours: str, theirs: str) -> None:
    states = ReturnedEmbeddingsType
    kind = states.LAST_HIDDEN_STATES_NORMALIZED
    if len(text_encoders_of(pipe)) > 1:
        kind = states.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    by_compel = [
        Compel(tokenizer, text_encoder, truncate_long_prompts=False, returned_embeddings_type=kind)(theirs)[0]
        for tokenizer, text_encoder in zip(tokenizers_of(pipe), text_encoders_of(pipe), strict=True)
    ]

    torch.testing.assert_close(encoder_of(pipe).encode(ours).tokens, torch.cat(by_compel, -1), **CLOSE)


def coarse_tokenizer() -> CLIPTokenizer:
    """Build a tokenizer that takes two letters "o" as one token."""
    fine = byte_tokenizer()
    vocabulary = fine.get_vocab() | {"oo": len(fine)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("t", "h"), ("o", "o")], model_max_length=CHUNK)


def test_encoder_with_fewer_chunks_is_padded_with_empty_ones(sdxl: Any) -> None:
    coarse = copy.deepcopy(sdxl.text_encoder_2)
    coarse.resize_token_embeddings(len(coarse_tokenizer()))
    fine = copy.deepcopy(sdxl.text_encoder)
    encoder = LongPromptEncoder([sdxl.tokenizer, coarse_tokenizer()], [fine, coarse], CPU)

    tokens, _ = encoder.encode("o" * 140)

    width = fine.config.hidden_size
    assert tokens.shape == (2 * CHUNK, width + coarse.config.hidden_size)
    torch.testing.assert_close(tokens[CHUNK:, width:], encoder.encode("").tokens[:, width:], **CLOSE)
    assert not torch.allclose(tokens[CHUNK:, :width], encoder.encode("").tokens[:, :width])


# What the engine needs of it.


@pytest.mark.parametrize("text", ["a (red:1.3) fox", "a (red:0.5) fox", LONG])
def test_embeddings_under_another_adapter_are_not_reused(pipe: Any, text: str) -> None:
    text_encoders = copy.deepcopy(text_encoders_of(pipe))
    encoder = LongPromptEncoder(tokenizers_of(pipe), text_encoders, CPU)
    before = encoder.encode(text)
    for parameter in (each for one in text_encoders for each in one.parameters()):
        parameter.add_(torch.ones_like(parameter).cumsum(-1), alpha=0.01)

    after = encoder.encode(text)

    torch.testing.assert_close(
        after, LongPromptEncoder(tokenizers_of(pipe), text_encoders, CPU).encode(text), rtol=0.0, atol=0.0
    )
    assert not torch.allclose(before.tokens, after.tokens)


def test_every_pass_of_a_text_encoder_has_one_row(pipe: Any) -> None:
    batches: list[int] = []
    text_encoders = text_encoders_of(pipe)
    layers = [
        module
        for one in text_encoders
        for module in one.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm)
    ]
    hooks = [layer.register_forward_hook(lambda _, args, __: batches.append(len(args[0]))) for layer in layers]

    try:
        encoder_of(pipe).encode(f"{LONG}. a (red:1.3) fox, {LONG}(quick:0.6) and (lazy:0)")
    finally:
        for hook in hooks:
            hook.remove()

    assert batches
    assert set(batches) == {1}


def test_every_chunk_has_the_adapters_of_the_routed_row(sd: Any) -> None:
    layer = "encoder.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator)
    banked, merged = copy.deepcopy(sd.text_encoder), copy.deepcopy(sd.text_encoder)
    merged.get_submodule(layer).weight.add_(b @ a, alpha=0.5)
    bank = AdapterBank({"text_encoder": banked}, device=torch.device("cpu"), dtype=torch.float32)
    bank.write((1,), bank.pack(Adapter({f"text_encoder.{layer}": LowRank(a, b)})))
    text = f"{LONG}. a (red:1.3) fox, (quick:0.6) and {LONG}"

    bank.route([(AppliedAdapter((1,), 0.5),)])
    adapted = LongPromptEncoder([sd.tokenizer], [banked], CPU).encode(text).tokens

    torch.testing.assert_close(adapted, LongPromptEncoder([sd.tokenizer], [merged], CPU).encode(text).tokens, **CLOSE)
    assert not torch.allclose(adapted, encoder_of(sd).encode(text).tokens, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_embeddings_have_the_encoders_dtype_and_are_finite(pipe: Any, dtype: torch.dtype) -> None:
    text_encoders = [copy.deepcopy(one).to(dtype) for one in text_encoders_of(pipe)]
    text = "(a:0) b (c:0.0) d (e:3) f (g:0)"

    tokens, pooled = LongPromptEncoder(tokenizers_of(pipe), text_encoders, CPU).encode(text)

    assert tokens.dtype == dtype
    assert pooled is None or pooled.dtype == dtype
    torch.testing.assert_close(tokens.float(), encoder_of(pipe).encode(text).tokens, rtol=0.0, atol=0.1)


def test_long_prompts_log_no_warning(
    sd: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)
    tokenizer = byte_tokenizer()
    encoder = LongPromptEncoder([tokenizer], [sd.text_encoder], CPU)

    encoder.is_ordinary(LONG)
    encoder.encode(LONG)
    assert not caplog.records

    byte_tokenizer()(LONG)
    assert "longer than" in caplog.text


@pytest.mark.parametrize("text", ["x" * 75 * (MAX_PASSES + 1), "(a:0)(b:0.1)" * (MAX_PASSES // 2)])
def test_prompt_with_too_many_chunks_is_refused(pipe: Any, text: str) -> None:
    with pytest.raises(RequestFailed) as refused:
        encoder_of(pipe).encode(text)

    assert refused.value.code == "INVALID_PROMPT"


TRICKY = ("<|endoftext|>", "<|startoftext|>", "!", "!!", " ", "a", "th.", ", ", "x" * 74, "狐", "\x00", "\u0301", "\\")
WEIGHING = ("(", ")", ":0)", ":0.5)", ":1.2)", ":3)", "( :0.5)")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(TRICKY + WEIGHING), max_size=40).map("".join))
@example("")
@example("( :0.5)")
@example("a( :0.5)( :0)b(a:1.2)")
@example("<|endoftext|>(<|endoftext|>:0.5)" + "x" * 74 + "(!!:0.5)")
def test_any_text_is_encoded(sdxl: Any, text: str) -> None:
    tokens, pooled = encoder_of(sdxl).encode(text)

    assert pooled is not None
    assert len(tokens) % CHUNK == 0
    assert tokens.isfinite().all()
    assert pooled.isfinite().all()


# What plain diffusers takes as it is meant.


FAMILY_OF = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusionXLPipeline": StableDiffusionXL}


def test_ordinary_prompts_are_encoded_together_as_by_diffusers(pipe: Any) -> None:
    texts = ["a red fox", "", "a crow in the " + "a" * 50]
    family = FAMILY_OF[type(pipe).__name__](pipe, device=CPU)
    encoder = pipe.text_encoder.config

    # SDXL's pipeline never masks.
    for is_masked in (False,) if hasattr(pipe, "text_encoder_2") else (False, True):
        encoder.use_attention_mask = is_masked
        found = family.encode([Prompt(text) for text in texts], [()] * len(texts))
        theirs = [by_diffusers(pipe, text) for text in texts]
        encoder.use_attention_mask = False

        for ours, (tokens, pooled) in zip(found, theirs, strict=True):
            torch.testing.assert_close(ours.tokens, tokens, **CLOSE)
            torch.testing.assert_close(ours.pooled, pooled, **CLOSE)
