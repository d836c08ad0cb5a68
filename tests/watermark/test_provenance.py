"""What a picture's file says of itself, read back by others: exiftool, Pillow, C2PA's own reader."""

import io
import json
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image

from config.images import ImageSettings
from config.model import ModelSettings
from config.section import SettingsError, load_section
from config.settings import SECTIONS, Settings
from config.store import StoreSettings
from inference.request import GenerationResult, RawImage
from tests.support.paths import ROOT
from tests.support.servers.certificates import Chain, Key, make_chain
from watermark.errors import ManifestNotSigned
from watermark.image_format import ImageFormat
from watermark.provenance.provenance import Prompts, Provenance, SourceType
from watermark.signature import SignatureStyle, SignedImage, Unsigned, sign
from worker.cli.check.checks import CheckFailed
from worker.cli.check.files import check_certificate
from worker.messages.decoder import decode, rules_from
from worker.messages.job import Job, Kind
from worker.results.image_metadata import ImageEncoder, provenance_of
from worker.supervisor import Supervisor

DARKROOM = Path(sys.executable).with_name("darkroom")

PROMPT = "a fox on the moon"
NEGATIVE = "blurry, two tails"
VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
TASK_ID = "660f9511-f3ac-52e5-b827-557766551111"
PROVENANCE = Provenance(
    software="Darkroom",
    version="0.1.0",
    model="demo",
    created_at=datetime(2026, 11, 22, 3, 4, 5, 678, tzinfo=UTC),
    kind="text2image",
    source_type=SourceType.GENERATED,
    task_id=TASK_ID,
    seed=42,
    num_inference_steps=20,
    guidance_scale=7.5,
    scheduler="dpm++",
    width=48,
    height=32,
    adapters=("neon", "ink, wet"),
    artist_name='서울 <아틀리에> & "Söhne"',
    prompts=Prompts(PROMPT, NEGATIVE),
)

Level = Literal["none", "provenance", "full"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(tmp_path_factory.mktemp("chain"))


def image() -> SignedImage:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return sign(Image.fromarray(pixels), Unsigned(), SignatureStyle())


def image_encoder(level: Level, chain: Chain | None = None) -> ImageEncoder:
    return ImageEncoder(ImageSettings(EMBED_METADATA=level, **(chain.env() if chain else {})))  # type: ignore[arg-type]


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def text_of(png: bytes) -> dict[str, Any]:
    return opened(png).info


def exiftool(png: bytes) -> dict[str, Any]:
    """Read the file with exiftool, by group and name."""
    ended = subprocess.run(
        ["exiftool", "-json", "-G1", "-struct", "-"], input=png, capture_output=True, check=True, timeout=120
    )
    found: dict[str, Any] = json.loads(ended.stdout)[0]
    return found


def xmp_of(png: bytes) -> dict[str, str]:
    """Name and text of every property in the packet, by the standard library's parser."""
    root = ElementTree.fromstring(text_of(png)["XML:com.adobe.xmp"])  # noqa: S314 - our own packet
    return {element.tag.rpartition("}")[2]: element.text or "" for element in root.iter() if element.text}


def read_manifest(png: bytes, anchor: str | None = None) -> c2pa.Reader:
    trust = {"trust": {"trust_anchors": anchor}} if anchor else {}
    return c2pa.Reader("image/png", io.BytesIO(png), context=c2pa.Context.from_dict(trust))


def failures(reader: c2pa.Reader) -> list[str]:
    return [failure["code"] for failure in reader.get_validation_results()["activeManifest"]["failure"]]


# --- The three levels


def test_level_none_writes_a_file_without_any_text() -> None:
    png = image_encoder("none").encode(image(), PROVENANCE)

    assert png == image().encode_png()
    assert text_of(png) == {}
    assert {kind for kind, _ in chunks_of(png)} == {b"IHDR", b"IDAT", b"IEND"}


def test_level_provenance_writes_all_but_the_prompts(chain: Chain) -> None:
    for signer in (None, chain):
        png = image_encoder("provenance", signer).encode(image(), PROVENANCE)

        for secret in (PROMPT, NEGATIVE, "fox", "blurry", "parameters", "AIPromptInformation"):
            assert secret.encode() not in png
        text = text_of(png)
        assert text["Software"] == "Darkroom 0.1.0"
        assert text["Creation Time"] == "2026-11-22T03:04:05Z"
        assert text["Source"] == "demo"
        assert json.loads(text["Darkroom"]) == {
            "kind": "text2image",
            "model": "demo",
            "seed": 42,
            "steps": 20,
            "guidance_scale": 7.5,
            "scheduler": "dpm++",
            "width": 48,
            "height": 32,
            "adapters": ["neon", "ink, wet"],
            "task_id": TASK_ID,
        }


def test_level_full_writes_the_prompts_as_the_web_ui_does() -> None:
    parameters = text_of(image_encoder("full").encode(image(), PROVENANCE))["parameters"]

    *prompts, line = parameters.split("\n")
    assert prompts == [PROMPT, f"Negative prompt: {NEGATIVE}"]
    # The expression by which the web UI and its likes take the last line apart
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line))
    assert pairs == {
        "Steps": "20",
        "Sampler": "dpm++",
        "CFG scale": "7.5",
        "Seed": "42",
        "Size": "48x32",
        "Model": "demo",
        "Adapters": '"neon, ink, wet"',
        "Version": "Darkroom 0.1.0",
    }


def test_rescaling_of_guidance_is_written_where_there_was_any() -> None:
    text = text_of(image_encoder("full").encode(image(), replace(PROVENANCE, guidance_rescale=0.7)))

    assert json.loads(text["Darkroom"])["guidance_rescale"] == 0.7
    assert "CFG scale: 7.5, CFG Rescale: 0.7, Seed: 42" in text["parameters"]


def test_absent_negative_prompt_has_no_line() -> None:
    png = image_encoder("full").encode(image(), replace(PROVENANCE, prompts=Prompts(PROMPT)))

    assert text_of(png)["parameters"].startswith(f"{PROMPT}\nSteps: 20")
    assert b"Negative" not in png


@pytest.mark.parametrize("level", ["none", "provenance", "full"])
def test_no_level_changes_a_pixel(level: Level, chain: Chain) -> None:
    png = image_encoder(level, None if level == "none" else chain).encode(image(), PROVENANCE)

    plain = opened(image().encode_png())
    assert (opened(png).mode, opened(png).tobytes()) == ("RGB", plain.tobytes())


# --- XMP


def test_exiftool_reads_the_packet() -> None:
    found = exiftool(image_encoder("full").encode(image(), PROVENANCE))

    assert found["XMP-iptcExt:DigitalSourceType"] == f"{VOCABULARY}trainedAlgorithmicMedia"
    assert found["XMP-iptcExt:AISystemUsed"] == "demo"
    assert found["XMP-iptcExt:AIPromptInformation"] == f"{PROMPT}\nNegative prompt: {NEGATIVE}"
    assert found["XMP-xmp:CreatorTool"] == found["PNG:Software"] == "Darkroom 0.1.0"
    assert found["XMP-xmp:CreateDate"] == "2026:11:22 03:04:05Z"
    assert found["XMP-dc:Creator"] == [PROVENANCE.artist_name]
    assert [name for name in found if "Warning" in name or "Error" in name] == []


def test_absent_artist_leaves_out_the_creator() -> None:
    found = exiftool(image_encoder("provenance").encode(image(), replace(PROVENANCE, artist_name=None)))

    assert "XMP-dc:Creator" not in found
    assert "XMP-iptcExt:AIPromptInformation" not in found


HOSTILE = {
    "markup": "]]></rdf:li><x:xmpmeta><!-- <?xpacket end='w'?> & &amp; &#0; \"'",
    "doctype": '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>&e;',
    "lines": "one\ntwo\tthree",
    "languages": "한글 日本語 العربية \u202eabc\u202c 👩‍🎨 \U0010fffd",
    "pairs": 'a, b: c, "quoted", Steps: 99\nNegative prompt: x\nSteps: 1, Sampler: y, Seed: 2',
    "long": "가" * 4000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_comes_back_as_it_was(name: str, chain: Chain) -> None:
    text = HOSTILE[name]
    png = image_encoder("full", chain).encode(image(), replace(PROVENANCE, artist_name=text, prompts=Prompts(text)))

    assert xmp_of(png)["AIPromptInformation"] == text
    assert xmp_of(png)["li"] == text
    assert text_of(png)["parameters"].startswith(f"{text}\nSteps: 20, ")
    assert exiftool(png)["XMP-iptcExt:DigitalSourceType"] == SourceType.GENERATED
    (_, metadata) = read_manifest(png).get_active_manifest()["assertions"]
    assert metadata["data"]["Iptc4xmpExt:AIPromptInformation"] == text


def test_characters_invalid_in_xml_are_replaced(chain: Chain) -> None:
    unwritable = "".join(map(chr, [0, 1, 8, 11, 12, 14, 27, 31, 127, 133, 0xD800, 0xDFFF, 0xFFFE, 0xFFFF]))
    text = f"a{unwritable}b\r\nc\rd"
    provenance = replace(PROVENANCE, artist_name=text, model=text, adapters=(text,), prompts=Prompts(text, text))

    png = image_encoder("full", chain).encode(image(), provenance)

    written = "a" + "\ufffd" * len(unwritable) + "b\nc\nd"
    assert xmp_of(png)["AIPromptInformation"] == f"{written}\nNegative prompt: {written}"
    assert xmp_of(png)["li"] == xmp_of(png)["AISystemUsed"] == written
    assert json.loads(text_of(png)["Darkroom"])["adapters"] == [written]
    assert read_manifest(png, chain.anchor).get_validation_state() == "Trusted"
    assert exiftool(png)["XMP-iptcExt:AISystemUsed"] == written


# --- The manifest

KEYS: dict[str, Callable[[], Key]] = {
    "Es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "Es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "Es512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "Ps256": lambda: rsa.generate_private_key(65537, 2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("algorithm", KEYS)
def test_c2pa_s_reader_finds_the_manifest_whole_and_trusts_it_where_it_trusts_the_ca(
    algorithm: str, tmp_path: Path
) -> None:
    chain = make_chain(tmp_path, KEYS[algorithm]())

    png = image_encoder("provenance", chain).encode(image(), PROVENANCE)

    stranger, friend = read_manifest(png), read_manifest(png, chain.anchor)
    assert (stranger.get_validation_state(), failures(stranger)) == ("Valid", ["signingCredential.untrusted"])
    assert (friend.get_validation_state(), failures(friend)) == ("Trusted", [])
    assert friend.get_active_manifest()["signature_info"]["alg"] == algorithm


def test_jpeg_has_the_packet_and_the_manifest_and_neither_at_level_none(chain: Chain) -> None:
    jpeg = image_encoder("provenance", chain).encode(image(), PROVENANCE, ImageFormat.JPEG)

    tags, reader = exiftool(jpeg), c2pa.Reader("image/jpeg", io.BytesIO(jpeg))
    assert tags["XMP-iptcExt:DigitalSourceType"].endswith("trainedAlgorithmicMedia")
    assert tags["XMP-iptcExt:AISystemUsed"] == PROVENANCE.model
    assert PROMPT not in str(tags)
    assert (reader.get_validation_state(), failures(reader)) == ("Valid", ["signingCredential.untrusted"])

    bare = image_encoder("none").encode(image(), PROVENANCE, ImageFormat.JPEG)
    assert opened(bare).info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_the_longest_prompts_fit_into_a_jpeg() -> None:
    longest = replace(PROVENANCE, prompts=Prompts("\U0001f98a" * 4000, "&" * 4000))

    jpeg = image_encoder("full").encode(image(), longest, ImageFormat.JPEG)

    assert opened(jpeg).info["xmp"].decode().count("\U0001f98a") == 4000


def test_manifest_names_the_model_as_the_image_s_creator(chain: Chain) -> None:
    manifest = read_manifest(image_encoder("provenance", chain).encode(image(), PROVENANCE)).get_active_manifest()

    assert manifest["claim_generator_info"][0].items() >= {"name": "Darkroom", "version": "0.1.0"}.items()
    (actions,) = manifest["assertions"]
    assert actions["label"] == "c2pa.actions.v2"
    assert actions["data"]["actions"] == [
        {
            "action": "c2pa.created",
            "when": "2026-11-22T03:04:05Z",
            "digitalSourceType": f"{VOCABULARY}trainedAlgorithmicMedia",
            "softwareAgent": {"name": "Darkroom", "version": "0.1.0"},
        }
    ]


def test_the_manifest_has_the_prompts_in_full_alone(chain: Chain) -> None:
    (_, metadata) = read_manifest(image_encoder("full", chain).encode(image(), PROVENANCE)).get_active_manifest()[
        "assertions"
    ]

    assert metadata["label"] == "cawg.metadata"
    assert metadata["data"]["Iptc4xmpExt:AIPromptInformation"] == f"{PROMPT}\nNegative prompt: {NEGATIVE}"


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    """Return kind and content of every chunk."""
    chunks, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        chunks.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _change_a_pixel(kind: bytes, content: bytes) -> bytes:
    if kind != b"IDAT":
        return content
    rows = bytearray(zlib.decompress(content))
    rows[1] ^= 1
    return zlib.compress(bytes(rows))


def _claim_a_camera(kind: bytes, content: bytes) -> bytes:
    return content.replace(b"trainedAlgorithmicMedia", b"digitalCapture") if kind == b"iTXt" else content


@pytest.mark.parametrize("tamper", [_change_a_pixel, _claim_a_camera])
def test_a_changed_byte_makes_the_manifest_invalid(tamper: Callable[[bytes, bytes], bytes], chain: Chain) -> None:
    png = image_encoder("provenance", chain).encode(image(), PROVENANCE)
    assert png_of(chunks_of(png)) == png

    forged = png_of([(kind, tamper(kind, content)) for kind, content in chunks_of(png)])

    opened(forged)
    reader = read_manifest(forged, chain.anchor)
    assert (reader.get_validation_state(), failures(reader)) == ("Invalid", ["assertion.dataHash.mismatch"])


def test_many_threads_sign_by_one_key(chain: Chain) -> None:
    shared = image_encoder("full", chain)

    def encode(seed: int) -> bytes:
        return shared.encode(image(), replace(PROVENANCE, seed=seed))

    with ThreadPoolExecutor(8) as pool:
        pngs = list(pool.map(encode, range(40)))

    for seed, png in enumerate(pngs):
        assert json.loads(text_of(png)["Darkroom"])["seed"] == seed
        assert read_manifest(png, chain.anchor).get_validation_state() == "Trusted"


# --- The certificate


def _write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


BAD_CHAINS: dict[str, tuple[Callable[[Path], Chain], str]] = {
    "no such certificate": (
        lambda folder: replace(make_chain(folder), certificate=folder / "none.pem"),
        r"C2PA_CERTIFICATE: .*none\.pem cannot be read: No such file",
    ),
    "no certificate": (
        lambda folder: replace(make_chain(folder), certificate=_write(folder / "c", "hello")),
        "C2PA_CERTIFICATE: .* holds no chain of certificates in PEM",
    ),
    "no such key": (
        lambda folder: replace(make_chain(folder), private_key=folder),
        "C2PA_PRIVATE_KEY: .* cannot be read: Is a directory",
    ),
    "no key": (
        lambda folder: replace(make_chain(folder), private_key=_write(folder / "k", "hello")),
        "C2PA_PRIVATE_KEY: .* holds no private key in PEM",
    ),
    "a passphrase": (lambda folder: make_chain(folder, passphrase=b"pass"), "C2PA_PRIVATE_KEY: .* needs a passphrase"),
    "another's key": (
        lambda folder: replace(make_chain(folder), certificate=make_chain(_new(folder)).certificate),
        "C2PA_PRIVATE_KEY: .* does not belong to the first certificate of C2PA_CERTIFICATE",
    ),
    "expired": (
        lambda folder: make_chain(folder, starts_in=timedelta(days=-9), ends_in=timedelta(days=-2)),
        r"C2PA_CERTIFICATE: .* expired on 20\d\d-\d\d-\d\d: renew it",
    ),
    "not yet": (
        lambda folder: make_chain(folder, starts_in=timedelta(days=1)),
        "C2PA_CERTIFICATE: .* is valid only from",
    ),
    "short": (
        lambda folder: make_chain(folder, rsa.generate_private_key(65537, 1024)),  # noqa: S505 - to be refused
        "C2PA_PRIVATE_KEY: .* is no key that C2PA signs with",
    ),
    "another curve": (
        lambda folder: make_chain(folder, ec.generate_private_key(ec.SECP256K1())),
        "C2PA_PRIVATE_KEY: .* is no key that C2PA signs with",
    ),
    "a web server's": (
        lambda folder: make_chain(folder, usages=[ExtendedKeyUsageOID.SERVER_AUTH]),
        "C2PA_CERTIFICATE: C2PA signs by no such certificate .*docs/provenance.md",
    ),
}


def _new(folder: Path) -> Path:
    (folder / "other").mkdir()
    return folder / "other"


@pytest.mark.parametrize("name", BAD_CHAINS)
def test_unusable_certificate_is_refused_in_one_sentence_that_names_the_setting(name: str, tmp_path: Path) -> None:
    make, sentence = BAD_CHAINS[name]
    chain = make(tmp_path)

    with pytest.raises(SettingsError, match=sentence) as caught:
        image_encoder("provenance", chain)

    assert "\n" not in str(caught.value)
    with pytest.raises(CheckFailed, match=sentence):
        check_certificate(ImageSettings(**chain.env()))  # type: ignore[arg-type]


def env_of(folder: Path, chain: Chain) -> dict[str, str]:
    """Return the variables of a worker that reaches no server."""
    return {
        "BACKEND_API_URL": "http://127.0.0.1:9",
        "INTERNAL_API_TOKEN": "t",
        "AWS_STORAGE_BUCKET_NAME": "media",
        "CACHE_DIR": str(folder / "cache"),
        "METRICS_PORT": "0",
        **chain.env(),
    }


def settings_of(folder: Path, chain: Chain) -> Settings:
    env = env_of(folder, chain)
    return Settings(**{name: section(**env) for name, section in SECTIONS.items()})  # type: ignore[arg-type]


def test_a_worker_that_cannot_sign_does_not_start(tmp_path: Path) -> None:
    chain = make_chain(tmp_path, starts_in=timedelta(days=-9), ends_in=timedelta(days=-2))
    ended = subprocess.run(
        [DARKROOM, "run"],
        cwd=tmp_path,
        env={**env_of(tmp_path, chain), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert ended.returncode == 2
    assert re.search(r"C2PA_CERTIFICATE: .*expired\s+on", ended.stderr, re.DOTALL)
    assert "Traceback" not in ended.stderr


def test_check_names_the_signer_and_its_remaining_days(chain: Chain) -> None:
    assert check_certificate(ImageSettings()) == "none is configured: pictures carry no C2PA manifest"

    seen = check_certificate(ImageSettings(**chain.env()))  # type: ignore[arg-type]

    assert seen == "CN=Test Signer,O=Test Studio signs by es256, for 29 days yet"


@pytest.mark.parametrize(("days", "level"), [(29, "WARNING"), (31, "INFO")])
def test_certificate_that_ends_soon_is_logged_at_the_start(
    days: int, level: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="worker.results.image_metadata"):
        image_encoder("provenance", make_chain(tmp_path, ends_in=timedelta(days=days, hours=1)))

    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [(level, "manifests are signed")]


def test_a_certificate_that_ends_while_the_worker_runs_signs_no_more(tmp_path: Path) -> None:
    # Dates in certificates are whole seconds, and the last of them counts
    seconds = 3
    chain = make_chain(tmp_path, ends_in=timedelta(seconds=seconds))
    supervisor = Supervisor(settings_of(tmp_path, chain))
    ending = image_encoder("provenance", chain)
    assert supervisor._parts.readiness.refusal == ending.refusal == ""

    time.sleep(seconds + 1)

    assert re.fullmatch(r"the certificate of C2PA_CERTIFICATE expired on \d{4}-\d\d-\d\d", ending.refusal)
    # As with any refusal, it takes no more jobs and is not ready
    assert supervisor._parts.readiness.refusal == ending.refusal
    with pytest.raises(ManifestNotSigned, match="not valid at time of signing"):
        ending.encode(image(), PROVENANCE)


def test_certificate_with_level_none_is_refused(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**chain.env(), "EMBED_METADATA": "none"}.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError, match="C2PA_CERTIFICATE: cannot be used with EMBED_METADATA=none"):
        load_section(ImageSettings)


# --- A job's provenance


def job_of(**fields: Any) -> Job:
    data = {"generation_id": 1, "prompt": PROMPT, "negative_prompt": NEGATIVE, **fields}
    rules = rules_from(load_section(ModelSettings), StoreSettings(AWS_STORAGE_BUCKET_NAME="media"))  # type: ignore[call-arg]
    return decode(json.dumps({"task_id": TASK_ID, "data": data}).encode(), rules)


def provenance_for(job: Job) -> Provenance:
    drawn = RawImage(64, 48, b"", seed=7)
    result = GenerationResult((drawn,), "dpm++", 20, 3.0, ())
    return provenance_of(job, result, drawn, model="demo")


def test_provenance_has_the_names_of_adapters_and_never_their_paths() -> None:
    job = job_of(
        loras=[
            {"path": "s3://media/customers/acme/neon.safetensors", "scale": 1},
            {"path": "customers/acme/style-123/", "scale": 1},
        ],
        prompt_tags=["secret-tag"],
        artist_name="Kim",
    )

    provenance = provenance_for(job)

    assert provenance.adapters == ("neon", "style-123")
    assert (provenance.seed, provenance.width, provenance.height, provenance.artist_name, provenance.task_id) == (
        7,
        64,
        48,
        "Kim",
        TASK_ID,
    )
    assert abs((datetime.now(UTC) - provenance.created_at).total_seconds()) < 5
    png = image_encoder("full").encode(image(), provenance)
    for secret in ("acme", "media", "secret-tag"):
        assert secret.encode() not in png


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_has_a_source_type_and_one_with_a_foreign_image_is_a_composite(kind: Kind) -> None:
    provenance = provenance_for(replace(job_of(), kind=kind))

    is_drawn_alone = kind is Kind.TEXT2IMAGE
    term = "trainedAlgorithmicMedia" if is_drawn_alone else "compositeWithTrainedAlgorithmicMedia"
    assert provenance.source_type == VOCABULARY + term
    assert json.loads(text_of(image_encoder("provenance").encode(image(), provenance))["Darkroom"])["kind"] == kind


# --- The page


def test_the_page_s_commands_make_a_chain_that_signs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "provenance.md").read_text()
    (commands,) = re.findall(r"```sh\n(openssl .*?)```", page, re.DOTALL)
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    chain = Chain(tmp_path / "chain.pem", tmp_path / "key.pem", (tmp_path / "ca.pem").read_text())

    png = image_encoder("provenance", chain).encode(image(), PROVENANCE)

    assert read_manifest(png, chain.anchor).get_validation_state() == "Trusted"
