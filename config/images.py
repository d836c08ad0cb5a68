"""Settings of the images: metadata, C2PA, presets, cutout model."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from config.presets.catalog import load_presets
from config.section import Section


class ImageSettings(Section):
    """Metadata and signing of images, presets, and the cutout model."""

    embed_metadata: Literal["none", "provenance", "full"] = Field(
        "provenance",
        validation_alias="EMBED_METADATA",
        description="`provenance` says in the file that a model drew it, `full` the prompts too, `none` nothing",
    )
    c2pa_certificate: Path | None = Field(
        None,
        validation_alias="C2PA_CERTIFICATE",
        description="PEM chain; set, every picture has a signed C2PA manifest",
    )
    c2pa_private_key: Path | None = Field(
        None, validation_alias="C2PA_PRIVATE_KEY", description="PEM key of the certificate, PKCS #8"
    )
    presets_file: Path | None = Field(
        None, validation_alias="PRESETS_FILE", description="YAML of styles and industries in place of the built-in one"
    )
    cutout_model: Path | None = Field(
        None,
        validation_alias="CUTOUT_MODEL",
        description="ONNX file (U2-Net's or IS-Net's interface) that cuts products out; unset, they need alpha "
        "of their own",
    )

    @field_validator("presets_file")
    @classmethod
    def _holds_presets(cls, path: Path | None) -> Path | None:
        if path is not None:
            load_presets(path)
        return path

    @field_validator("c2pa_certificate")
    @classmethod
    def _has_what_to_sign(cls, certificate: Path | None, found: ValidationInfo) -> Path | None:
        if certificate is not None and found.data.get("embed_metadata") == "none":
            raise ValueError("cannot be used with EMBED_METADATA=none, which writes nothing: change one of the two")
        return certificate

    @field_validator("cutout_model")
    @classmethod
    def _is_there(cls, model: Path | None) -> Path | None:
        if model is not None and not model.is_file():
            raise ValueError(f"{model} is no file")
        return model

    @field_validator("c2pa_private_key")
    @classmethod
    def _has_its_certificate(cls, key: Path | None, found: ValidationInfo) -> Path | None:
        if (found.data.get("c2pa_certificate") is None) != (key is None):
            raise ValueError("C2PA_CERTIFICATE and C2PA_PRIVATE_KEY belong together: set both or neither")
        return key
