"""Sign images with a C2PA manifest of their origin. No network access."""

import io
import json
from typing import Any, final

import c2pa
from PIL import Image

from config.section import SettingsError
from watermark.errors import ManifestNotSigned
from watermark.image_format import ImageFormat
from watermark.provenance.credentials import Credentials
from watermark.provenance.provenance import Provenance, SourceType
from watermark.provenance.xmp import IPTC_EXTENSION

# Nothing is fetched: no OCSP, no remote manifests. A thumbnail would repeat the image.
CONTEXT = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"ocsp_fetch": False, "remote_manifest_fetch": False},
}


@final
class ManifestSigner:
    """Owner of the loaded key. Thread-safe; usable only in the process that made it."""

    def __init__(self, credentials: Credentials) -> None:
        """Sign a one-pixel image as a trial. Raises `SettingsError` for a certificate that C2PA rejects."""
        self.credentials = credentials
        try:
            self._context = c2pa.Context.from_dict(CONTEXT)
            self._signer = c2pa.Signer.from_info(
                c2pa.C2paSignerInfo(credentials.algorithm, credentials.chain, credentials.key, None)
            )
            trial = _manifest({"name": "trial"}, {"digitalSourceType": SourceType.GENERATED})
            pixel = io.BytesIO()
            Image.new("RGB", (1, 1)).save(pixel, "PNG")
            self._embed(pixel.getvalue(), trial, ImageFormat.PNG)
        except c2pa.C2paError as error:
            usages = "its key usage must be digitalSignature, its extended key usage one of C2PA's"
            refusal = f"C2PA signs by no such certificate ({error}): {usages}; docs/provenance.md says how to make one"
            raise SettingsError(f"C2PA_CERTIFICATE: {refusal}") from error

    def sign(self, content: bytes, provenance: Provenance, image_format: ImageFormat) -> bytes:
        """Return the file with a manifest over all of its bytes. Raises `ManifestNotSigned`."""
        try:
            return self._embed(content, build_manifest(provenance), image_format)
        except c2pa.C2paError as error:
            raise ManifestNotSigned(f"the C2PA manifest cannot be signed: {error}") from error

    def _embed(self, content: bytes, manifest: dict[str, Any], image_format: ImageFormat) -> bytes:
        signed = io.BytesIO()
        with c2pa.Builder(json.dumps(manifest), self._context) as builder:
            builder.sign(self._signer, image_format.value, io.BytesIO(content), signed)
        return signed.getvalue()


def build_manifest(provenance: Provenance) -> dict[str, Any]:
    """Build the manifest definition: one action, and the prompts where they may be published."""
    agent = {"name": provenance.software, "version": provenance.version}
    how = {"when": provenance.created, "digitalSourceType": provenance.source_type, "softwareAgent": agent}
    manifest = _manifest(agent, how)
    if provenance.prompts is not None:
        # JSON-LD: the form of XMP properties in CAWG's metadata assertion.
        context = {"Iptc4xmpExt": IPTC_EXTENSION}
        prompts = {"@context": context, "Iptc4xmpExt:AIPromptInformation": provenance.prompts.text}
        manifest["assertions"].append({"label": "cawg.metadata", "data": prompts})
    return manifest


def _manifest(generator: dict[str, str], how: dict[str, Any]) -> dict[str, Any]:
    # `created`: a claim of the signer's own, not a gathered assertion, as the prompts are.
    actions = {"actions": [{"action": "c2pa.created", **how}]}
    return {
        "claim_generator_info": [generator],
        "assertions": [{"label": "c2pa.actions.v2", "data": actions, "created": True}],
    }
