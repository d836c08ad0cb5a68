"""Folders that tests refer to."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SIGNATURE = ROOT / "tests" / "files" / "signature.png"
DEMO_MODEL = ROOT / "examples" / "demo_model"
