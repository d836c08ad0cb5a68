"""Adapters: the normal form does what diffusers and PEFT do, and no file gets further than it should."""

import copy
import json
import math
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline

from inference.lora.adapter import Adapter, LowRank, check_fits, read_adapter
from inference.lora.errors import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterUnsafe, AdapterUnsupported
from inference.lora.names.key_names import STABLE_DIFFUSION
from tests.support.long import long
from tests.support.models.adapter_changes import Changes, assert_same_changes, changes_by_peft, changes_of
from tests.support.models.tiny_models import EVERY_LAYER, build_tiny_sd, load_pipe, write_adapter
from tests.support.paths import DEMO_MODEL

# A hostile file is refused in milliseconds; what it aims at takes minutes. Between them, whatever the neighbours do.
REFUSAL_SECONDS = 100.0
TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
MID = 64  # channels of the tiny UNet's middle block


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return load_pipe(build_tiny_sd(tmp_path_factory.mktemp("tiny")))


def models(pipe: StableDiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def read(path: Path, config: Path | None = None) -> Adapter:
    if path.is_dir():
        return read(path / "adapter_model.safetensors", path / "adapter_config.json")
    return read_adapter(path, config, STABLE_DIFFUSION)


def theirs(pipe: StableDiffusionPipeline, path: Path, *, text_encoder: bool) -> Changes:
    """Load the file with the library that defines the layout, and return what it changes."""
    adapted = copy.deepcopy(pipe)
    if path.is_file():
        adapted.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
    elif text_encoder:
        peft.PeftModel.from_pretrained(torch.nn.ModuleDict(models(adapted)), path)
    else:
        peft.PeftModel.from_pretrained(adapted.unet, path)
    return changes_by_peft(models(adapted))


def refusal(weights: Path, config: Path | None = None) -> AdapterError:
    """Return the error that reading ends in, which must come quickly."""
    started = time.perf_counter()
    with pytest.raises(AdapterError) as caught:
        read(weights, config)
    assert time.perf_counter() - started < REFUSAL_SECONDS
    return caught.value


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def to_q(*, rank: int = 4, size: int = MID) -> dict[str, torch.Tensor]:
    return {f"{TO_Q}.lora_A.weight": torch.randn(rank, size), f"{TO_Q}.lora_B.weight": torch.randn(size, rank)}


# --- the normal form equals the libraries' own loading -------------------------------------------------------------

CONV_AND_FEED_FORWARD = {"conv1": 2, "ff.net.2": 9}
LAYOUTS: dict[str, dict[str, Any]] = {
    "old diffusers names": {"layout": "diffusers_old", "text_encoder": True},
    "old diffusers names over every layer": {"layout": "diffusers_old", "targets": EVERY_LAYER},
    "new diffusers names with alpha": {"layout": "diffusers_new", "alpha": 2, "text_encoder": True},
    "new diffusers names with patterns": {
        "layout": "diffusers_new",
        "targets": EVERY_LAYER,
        "alpha": 2,
        "rank_pattern": CONV_AND_FEED_FORWARD,
        "alpha_pattern": {"attn2.to_k": 1, "to_k": 8, "conv1": 6},
    },
    "new diffusers names, rank-stabilised": {"layout": "diffusers_new", "alpha": 3, "use_rslora": True},
    "PEFT folder of a UNet": {"layout": "peft_folder", "alpha": 6},
    "PEFT folder of both models": {"layout": "peft_folder", "alpha": 2, "text_encoder": True},
    "PEFT folder with patterns, rank-stabilised": {
        "layout": "peft_folder",
        "targets": EVERY_LAYER,
        "alpha": 2,
        "use_rslora": True,
        "rank_pattern": CONV_AND_FEED_FORWARD,
        "alpha_pattern": {"to_k": 8, "attn2.to_k": 1, "^mid_block.resnets.0.conv1": 6, "conv1": 3},
    },
    "kohya": {"layout": "kohya", "alpha": 2, "targets": EVERY_LAYER},
    "kohya with a text encoder": {"layout": "kohya", "alpha": 1, "text_encoder": True},
    "kohya with patterns": {
        "layout": "kohya",
        "targets": EVERY_LAYER,
        "alpha": 2,
        "rank_pattern": CONV_AND_FEED_FORWARD,
        "alpha_pattern": {"conv1": 1, "ff.net.2": 3},
    },
}


# Each of them has a twin of more: patterns, or a text encoder.
PLAIN_LAYOUTS = ("old diffusers names over every layer", "PEFT folder of a UNet", "kohya")


@pytest.mark.parametrize(
    "made", [pytest.param(made, id=name, marks=long if name in PLAIN_LAYOUTS else ()) for name, made in LAYOUTS.items()]
)
def test_normal_form_changes_what_the_library_changes(
    made: dict[str, Any], pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    path = tmp_path / ("folder" if made["layout"] == "peft_folder" else "adapter.safetensors")
    write_adapter(path, pipe, **made)
    with_text = made.get("text_encoder", False)

    adapter = read(path)
    check_fits(adapter, models(pipe))

    changes = changes_of(adapter)
    assert_same_changes(changes, theirs(pipe, path, text_encoder=with_text))
    assert {name.partition(".")[0] for name in changes} == ({"unet", "text_encoder"} if with_text else {"unet"})


def test_text_encoder_names_with_and_without_the_dropped_level_are_the_same_layer(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    old = read(write_adapter(tmp_path / "a.safetensors", pipe, layout="diffusers_old", text_encoder=True))
    new = read(write_adapter(tmp_path / "b.safetensors", pipe, layout="diffusers_new", text_encoder=True))
    assert old.layers.keys() == new.layers.keys()
    assert "text_encoder.encoder.layers.0.self_attn.q_proj" in old.layers


def test_kohya_text_encoder_without_attention_output_is_read_though_diffusers_cannot_guess_its_type(
    tmp_path: Path,
) -> None:
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    stored = {f"{layer}.lora_down.weight": torch.randn(2, 8), f"{layer}.lora_up.weight": torch.randn(8, 2)}
    adapter = read(save(tmp_path / "a.safetensors", stored))
    assert list(adapter.layers) == ["text_encoder.encoder.layers.0.self_attn.q_proj"]


def test_peft_folder_of_a_text_encoder_alone_belongs_to_the_text_encoder(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trained = peft.get_peft_model(copy.deepcopy(pipe.text_encoder), config)
    trained.save_pretrained(tmp_path)
    check_fits(adapter := read(tmp_path), models(pipe))
    assert all(name.startswith("text_encoder.encoder.") for name in adapter.layers)


@pytest.mark.parametrize("ending", [".alpha", ".lora.alpha"])
def test_alpha_tensor_in_a_diffusers_file_is_folded_into_b(ending: str, tmp_path: Path) -> None:
    down, up = torch.randn(4, 8), torch.randn(8, 4)
    stored = {f"{TO_Q}.lora.down.weight": down, f"{TO_Q}.lora.up.weight": up, TO_Q + ending: torch.tensor(2)}
    layer = read(save(tmp_path / "a.safetensors", stored)).layers[TO_Q]
    torch.testing.assert_close(layer.b @ layer.a, 0.5 * up @ down)


def test_attention_processor_names_of_the_oldest_files_are_the_unets(tmp_path: Path) -> None:
    processor = "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    stored = {f"{processor}.down.weight": torch.randn(4, MID), f"{processor}.up.weight": torch.randn(MID, 4)}
    assert list(read(save(tmp_path / "a.safetensors", stored)).layers) == [TO_Q]


def test_weights_at_scale_one_keep_the_files_dtype_and_others_are_folded_in_32_bits(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in to_q().items()}
    as_stored = read(save(tmp_path / "a.safetensors", half)).layers[TO_Q]
    folded = read(save(tmp_path / "b.safetensors", half | {f"{TO_Q}.alpha": torch.tensor(1.0)})).layers[TO_Q]
    assert (as_stored.a.dtype, as_stored.b.dtype) == (torch.float16, torch.float16)
    assert (folded.a.dtype, folded.b.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("name", ["blueprint", "neon", "sepia", "pixel"])
def test_demo_adapters_fit_the_demo_checkpoint(name: str) -> None:
    adapter = read(DEMO_MODEL / "adapters" / f"{name}.safetensors")
    check_fits(adapter, models(load_pipe(DEMO_MODEL / "checkpoint")))
    assert {layer.rank for layer in adapter.layers.values()} == {8}


# --- H27: pickles are never opened ---------------------------------------------------------------------------------


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "adapter.ckpt"])
@pytest.mark.parametrize("protocol", ["zip", 0, 2, 4])
def test_pickle_is_refused_unread_whatever_its_name(protocol: int | str, name: str, tmp_path: Path) -> None:
    canary, weights = tmp_path / "canary", tmp_path / name
    if protocol == "zip":
        torch.save({"unet.x": Canary(canary)}, weights)
    else:
        weights.write_bytes(pickle.dumps(Canary(canary), protocol=int(protocol)))
    assert type(refusal(weights)) is AdapterUnsafe
    assert not canary.exists()


def test_any_zip_is_refused_as_unsafe(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert type(refusal(tmp_path / "a.safetensors")) is AdapterUnsafe


# --- H28: damaged and absurd files ---------------------------------------------------------------------------------


def with_header(header: str | dict[str, Any], body: bytes = b"", *, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(*offsets: int, dtype: str = "F32", shape: tuple[int, ...] = (1, 1)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = with_header({"x.lora_A.weight": entry(0, 4), "x.lora_B.weight": entry(4, 8)}, bytes(8))
DAMAGED = {
    "empty": b"",
    "seven bytes": b"\x10\0\0\0\0\0\0",
    "header length 2^63": with_header("{}", length=2**63),
    "header length beyond the file": with_header("{}", length=999_999),
    "header of 5 MB": with_header('{"x":"' + "a" * 5_000_000 + '"}'),
    "nested lists": with_header('{"x":' + "[" * 400_000),
    "nested objects": with_header('{"x":' * 150_000),
    "huge number": with_header('{"x":' + "9" * 900_000 + "}"),
    "not a number": with_header('{"x":NaN}'),
    "not UTF-8": with_header("{}").replace(b"{}", b"{\xff"),
    "no object": with_header("{]"),
    "repeated name": with_header('{"a.lora_A.weight":{},"a.lora_A.weight":{}}'),
    "entry that is no object": with_header({"x.lora_A.weight": 3}),
    "entry without offsets": with_header({"x.lora_A.weight": {"dtype": "F32", "shape": [1]}}),
    "metadata that are no text": with_header({"__metadata__": {"a": {"b": 1}}}),
    "overlap": with_header({"x.lora_A.weight": entry(0, 4), "x.lora_B.weight": entry(0, 4)}, bytes(4)),
    "hole": with_header({"x.lora_A.weight": entry(0, 4), "x.lora_B.weight": entry(8, 12)}, bytes(12)),
    "trailing bytes": GOOD + b"\0",
    "truncated": GOOD[:-1],
    "shape overflow": with_header({"x.lora_A.weight": entry(0, 4, shape=(2**62, 8))}, bytes(4)),
    "negative shape": with_header({"x.lora_A.weight": entry(0, 4, shape=(-1, -1))}, bytes(4)),
    "8-bit integers": with_header(
        {"x.lora_A.weight": entry(0, 1, dtype="I8"), "x.lora_B.weight": entry(1, 2, dtype="I8")}, bytes(2)
    ),
    "unknown dtype": with_header({"x.lora_A.weight": entry(0, 4, dtype="Q9")}, bytes(4)),
    "dtype that is no text": with_header({"x.lora_A.weight": entry(0, 4) | {"dtype": ["F32"]}}, bytes(4)),
    "odd name": with_header({"../x.lora_A.weight": entry(0, 4)}, bytes(4)),
    "long name": with_header({"x" * 300 + ".lora_A.weight": entry(0, 4)}, bytes(4)),
    "no tensors": with_header({}),
    "5000 tensors": with_header({f"x{i}.lora_A.weight": entry(0, 0, shape=(0,)) for i in range(5000)}),
    "100000 tensors": with_header({f"x{i}.lora_A.weight": entry(0, 0, shape=(0,)) for i in range(100_000)}),
    "an HTML page": b"<!DOCTYPE html><html>404</html>",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_refused_in_time(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert type(refusal(tmp_path / "a.safetensors")) is AdapterInvalid


def test_well_formed_small_file_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(GOOD)
    assert list(read(tmp_path / "a.safetensors").layers) == ["unet.x"]


# --- H29: size ------------------------------------------------------------------------------------------------------


def test_huge_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as sparse:
        sparse.truncate(20 * 10**9)
    assert type(refusal(tmp_path / "a.safetensors")) is AdapterInvalid


# --- H30: wrong models, ranks and numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_weights_that_are_not_finite_are_refused(half: str, value: float, tmp_path: Path) -> None:
    stored = to_q()
    stored[f"{TO_Q}.{half}.weight"][1, 1] = value
    assert type(refusal(save(tmp_path / "a.safetensors", stored))) is AdapterInvalid


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 1e30])
def test_absurd_alpha_is_refused(alpha: float, tmp_path: Path) -> None:
    stored = to_q() | {f"{TO_Q}.alpha": torch.tensor(alpha)}
    assert type(refusal(save(tmp_path / "a.safetensors", stored))) is AdapterInvalid


BROKEN: dict[str, dict[str, torch.Tensor]] = {
    "rank 10000": to_q(rank=10_000),
    "A without its B": {f"{TO_Q}.lora_A.weight": torch.ones(2, 2)},
    "B without its A": {f"{TO_Q}.lora_B.weight": torch.ones(2, 2)},
    "ranks that differ": to_q(rank=4) | {f"{TO_Q}.lora_B.weight": torch.ones(MID, 5)},
    "vectors": {f"{TO_Q}.lora_A.weight": torch.ones(4), f"{TO_Q}.lora_B.weight": torch.ones(4)},
    "no outputs": to_q() | {f"{TO_Q}.lora_B.weight": torch.ones(0, 4)},
    "alpha of a layer by another name": to_q() | {f"lora_{TO_Q.replace('.', '_')}.alpha": torch.tensor(1.0)},
    "alpha that is a vector": to_q() | {f"{TO_Q}.alpha": torch.ones(4)},
    "two alphas": to_q() | {f"{TO_Q}.alpha": torch.tensor(1.0), f"{TO_Q}.lora_A.alpha": torch.tensor(1.0)},
    "a layer under two names": to_q() | {f"{TO_Q}.lora.down.weight": torch.ones(4, MID)},
    "kohya down without up": {"lora_unet_mid_block_conv1.lora_down.weight": torch.ones(2, 2)},
    "kohya up without down": {"lora_unet_mid_block_conv1.lora_up.weight": torch.ones(2, 2)},
    "PEFT names without their settings": {f"base_model.model.{name}": tensor for name, tensor in to_q().items()},
}


@pytest.mark.parametrize("stored", BROKEN.values(), ids=BROKEN)
def test_adapter_with_mismatched_shapes_is_refused(stored: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert type(refusal(save(tmp_path / "a.safetensors", stored))) is AdapterInvalid


KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
OTHER = {
    "DoRA of diffusers": to_q() | {f"{TO_Q}.lora_magnitude_vector": torch.ones(MID)},
    "DoRA of kohya": {f"{KOHYA}.dora_scale": torch.ones(4)},
    "LoHa": {f"{KOHYA}.hada_w1_a": torch.ones(4, 4), f"{KOHYA}.alpha": torch.tensor(1.0)},
    "LoKr": {f"{KOHYA}.lokr_w1": torch.ones(4, 4)},
    "full difference": {f"{KOHYA}.diff": torch.ones(4, 4)},
    "Tucker form": {f"{KOHYA}.lora_mid.weight": torch.ones(4, 4, 3, 3)},
    "trained bias": to_q() | {f"{TO_Q}.lora_B.bias": torch.ones(MID)},
    "unknown weight beside a LoRA": to_q() | {"unet.conv_in.weight": torch.ones(4)},
    "unknown weight beside a kohya LoRA": {
        f"{KOHYA}.lora_down.weight": torch.ones(4, 4),
        f"{KOHYA}.lora_up.weight": torch.ones(4, 4),
        "emb_params": torch.ones(4),
    },
    "an attention processor's layer of no known kind": {
        "mid_block.x_lora.down.weight": torch.ones(2, 2),
        "mid_block.x_lora.up.weight": torch.ones(2, 2),
    },
    "a whole UNet": {"down_blocks.0.resnets.0.conv1.weight": torch.ones(4)},
}


@pytest.mark.parametrize("stored", OTHER.values(), ids=OTHER)
def test_other_methods_are_refused_rather_than_half_applied(stored: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert type(refusal(save(tmp_path / "a.safetensors", stored))) is AdapterUnsupported


def layer_of(a: tuple[int, ...], b: tuple[int, ...]) -> LowRank:
    return LowRank(torch.ones(a), torch.ones(b))


MISFITS = {
    "another width": {TO_Q: layer_of((4, 1280), (1280, 4))},
    "another output": {TO_Q: layer_of((4, MID), (MID + 1, 4))},
    "a kernel where a Linear is": {TO_Q: layer_of((4, MID, 3, 3), (MID, 4, 1, 1))},
    "a Linear where a convolution is": {"unet.mid_block.resnets.0.conv1": layer_of((4, MID), (MID, 4))},
    "another kernel": {"unet.mid_block.resnets.0.conv1": layer_of((4, MID, 1, 1), (MID, 4, 1, 1))},
    "no such layer": {"unet.down_blocks.9.to_q": layer_of((4, MID), (MID, 4))},
    "a layer without a matrix": {"unet.mid_block.resnets.0.norm1": layer_of((4, MID), (MID, 4))},
    "no such model": {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": layer_of((4, MID), (MID, 4))},
}


@pytest.mark.parametrize("layers", MISFITS.values(), ids=MISFITS)
def test_adapter_for_another_model_is_refused_as_such(
    layers: dict[str, LowRank], pipe: StableDiffusionPipeline
) -> None:
    with pytest.raises(AdapterIncompatible, match=rf"{next(iter(layers))} \(1 in all\)"):
        check_fits(Adapter(layers), models(pipe))


def test_message_about_misfits_names_a_few_and_counts_all(pipe: StableDiffusionPipeline) -> None:
    layers = {f"unet.nothing.{i}": layer_of((1, 1), (1, 1)) for i in range(500)}
    with pytest.raises(AdapterIncompatible, match=r"nothing\.0, .*\(500 in all\)") as caught:
        check_fits(Adapter(layers), models(pipe))
    assert len(str(caught.value)) < 300


# --- H31: hostile settings -----------------------------------------------------------------------------------------


def peft_folder(folder: Path, **settings: Any) -> tuple[Path, Path]:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4} | settings
    stored = {name.replace("unet.", "base_model.model.", 1): tensor for name, tensor in to_q().items()}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return save(folder / "adapter_model.safetensors", stored), folder / "adapter_config.json"


INVALID_SETTINGS: dict[str, dict[str, Any]] = {
    "r of a million": {"r": 10**6},
    "r that is another": {"r": 8},
    "r of zero": {"r": 0},
    "r that is text": {"r": "4"},
    "r that is true": {"r": True},
    "alpha that is text": {"lora_alpha": "4"},
    "alpha beyond numbers": {"lora_alpha": 10**400},
    "use_rslora that is text": {"use_rslora": "yes"},
    "rank_pattern that is a list": {"rank_pattern": ["to_q"]},
    "rank_pattern with an evil expression": {"rank_pattern": {"(a+)+$": 4}},
    "alpha_pattern with an expression": {"alpha_pattern": {r".*\.to_q": 4}},
    "alpha_pattern with an absurd value": {"alpha_pattern": {"to_q": 1e99}},
    "rank_pattern that contradicts the tensors": {"rank_pattern": {"to_q": 2}},
    "larger than 64 kB": {"target_modules": ["to_q"] * 20_000},
}


@pytest.mark.parametrize("settings", INVALID_SETTINGS.values(), ids=INVALID_SETTINGS)
def test_wrong_settings_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    assert type(refusal(*peft_folder(tmp_path, **settings))) is AdapterInvalid


UNSUPPORTED_SETTINGS: dict[str, dict[str, Any]] = {
    "another method": {"peft_type": "LOHA"},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
    "LoRA biases": {"lora_bias": True},
    "further modules": {"modules_to_save": ["conv_in"]},
    "a base that is changed": {"init_lora_weights": "pissa_niter_4"},
    "a setting of the future": {"use_something_new": {"a": 1}},
}


@pytest.mark.parametrize("settings", UNSUPPORTED_SETTINGS.values(), ids=UNSUPPORTED_SETTINGS)
def test_settings_beyond_plain_lora_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    assert type(refusal(*peft_folder(tmp_path, **settings))) is AdapterUnsupported


def test_settings_that_only_concern_training_are_never_evaluated(tmp_path: Path) -> None:
    harmless = {
        "target_modules": "(a+)+$",
        "auto_mapping": {"parent_library": "antigravity", "base_model_class": "x"},
        "base_model_name_or_path": "http://127.0.0.1:1/model",
        "lora_dropout": 0.5,
        "use_something_new": None,
    }
    assert list(read(*peft_folder(tmp_path, **harmless)).layers) == [TO_Q]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r":' + "[" * 60_000, '{"a":' * 12_000, '{"r":4,"r":4}', "{}"])
def test_config_that_is_no_proper_object_is_refused(text: str, tmp_path: Path) -> None:
    weights, config = peft_folder(tmp_path)
    config.write_text(text)
    assert type(refusal(weights, config)) is AdapterInvalid


def test_many_patterns_over_many_layers_are_matched_in_time(tmp_path: Path) -> None:
    layers = [".".join(["a"] * 90) + f".b{i}" for i in range(1500)]
    stored = {f"{layer}.{half}.weight": torch.ones(1, 1) for layer in layers for half in ("lora_A", "lora_B")}
    settings = {"unet.r": 1, "unet.alpha_pattern": {f"x{i}": 1 for i in range(15_000)}}
    path = save(tmp_path / "a.safetensors", stored, {"lora_adapter_metadata": json.dumps(settings)})
    started = time.perf_counter()
    assert len(read(path).layers) == 1500
    assert time.perf_counter() - started < REFUSAL_SECONDS


@pytest.mark.parametrize("raw", ["", "[]", '{"unet.r": 3}', '{"unet.r": 4, "unet.alpha_pattern": {"(a|a)*": 1}}'])
def test_hostile_settings_in_the_header_are_refused(raw: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", to_q(), {"lora_adapter_metadata": raw})
    assert type(refusal(path)) is AdapterInvalid


def test_alphas_in_tensors_and_in_settings_contradict(tmp_path: Path) -> None:
    stored = to_q() | {f"{TO_Q}.alpha": torch.tensor(2.0)}
    settings = json.dumps({"unet.r": 4, "unet.lora_alpha": 4})
    path = save(tmp_path / "a.safetensors", stored, {"lora_adapter_metadata": settings})
    assert type(refusal(path)) is AdapterInvalid


def test_every_error_has_its_own_code() -> None:
    kinds = AdapterError.__subclasses__()
    assert {kind.code for kind in kinds} == {
        "LORA_INVALID", "LORA_UNSAFE_FORMAT", "LORA_UNSUPPORTED", "LORA_INCOMPATIBLE",
    }  # fmt: skip
