"""The stages in order, each run once: what it measured is kept beside its results, and says that it is done."""

import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from tqdm import tqdm

from examples.demo_model.recipe.adapters import train_adapter
from examples.demo_model.recipe.denoiser import train_denoiser
from examples.demo_model.recipe.export import bytes_in, export
from examples.demo_model.recipe.fetch import fetch
from examples.demo_model.recipe.grid import draw_grids
from examples.demo_model.recipe.latents import encode
from examples.demo_model.recipe.render import render
from examples.demo_model.recipe.score import score_stage
from examples.demo_model.recipe.settings import Kitchen
from examples.demo_model.recipe.styles import STYLES
from examples.demo_model.recipe.tokenizer import learn_tokenizer
from examples.demo_model.recipe.vae import train_vae

HOME = Path(__file__).parents[1]

Stage = Callable[[Kitchen], dict[str, object]]


class OtherBudget(Exception):
    """The output folder holds results of another budget."""


def _adapter_stage(style: str) -> Stage:
    return lambda kitchen: train_adapter(style, kitchen)


STAGES: dict[str, Stage] = {
    "fetch": fetch,
    "render": render,
    "tokenizer": learn_tokenizer,
    "vae": train_vae,
    "latents": encode,
    "denoiser": train_denoiser,
    "export": export,
    **{style: _adapter_stage(style) for style in STYLES},
    "grid": draw_grids,
    "score": score_stage,
}


def run_stages(kitchen: Kitchen) -> None:
    """Run those that are not done yet, then gather what all of them measured in `figures.json`."""
    kitchen.out.mkdir(parents=True, exist_ok=True)
    names = list(STAGES)
    for number, name in enumerate(names):
        record = _record(kitchen, name)
        if record.exists():
            _check_budget(kitchen, record)
            tqdm.write(f"{name}: done before")
            continue
        _forget(kitchen, names[number + 1 :])
        seconds = _run(kitchen, name)
        tqdm.write(f"{name}: {seconds:.1f} s")
    _write(kitchen.figures, _figures(kitchen))
    tqdm.write(f"the model is in {kitchen.checkpoint}, its figures are in {kitchen.figures}")


def install(kitchen: Kitchen, home: Path = HOME) -> None:
    """Copy what was made over what the repository bundles."""
    for made in (kitchen.checkpoint, kitchen.adapters):
        shutil.rmtree(home / made.name, ignore_errors=True)
        shutil.copytree(made, home / made.name)
    for made in (kitchen.figures, *sorted(kitchen.out.glob("grid-*.png"))):
        shutil.copy(made, home)
    shutil.copy(kitchen.references, home / "recipe")
    tqdm.write(f"installed in {home}")


def _run(kitchen: Kitchen, name: str) -> float:
    """Run one stage and keep its figures; the seconds it took."""
    begun_at = time.monotonic()
    figures = STAGES[name](kitchen)
    # A training that was interrupted says how long all of it took; the rest of a stage is done anew.
    seconds = max(time.monotonic() - begun_at, float(str(figures.get("seconds", 0.0))))
    common = {
        "budget": kitchen.budget.name,
        "stage_seconds": round(seconds, 1),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    record = _record(kitchen, name)
    record.parent.mkdir(parents=True, exist_ok=True)
    _write(record, common | figures)
    kitchen.progress(name).unlink(missing_ok=True)
    return seconds


def _forget(kitchen: Kitchen, names: Sequence[str]) -> None:
    """Remove the records of the stages that depend on an older result."""
    for name in names:
        _record(kitchen, name).unlink(missing_ok=True)
        kitchen.progress(name).unlink(missing_ok=True)


def _record(kitchen: Kitchen, name: str) -> Path:
    return kitchen.out / "stages" / f"{name}.json"


def _check_budget(kitchen: Kitchen, record: Path) -> None:
    budget = json.loads(record.read_text())["budget"]
    if budget != kitchen.budget.name:
        raise OtherBudget(f"{kitchen.out} holds a {budget} run: remove it, or choose another folder with --out")


def _figures(kitchen: Kitchen) -> dict[str, object]:
    stages = {name: json.loads(_record(kitchen, name).read_text()) for name in STAGES}
    return {
        "machine": {
            "cores": os.cpu_count(),
            "cpu": _cpu_name(),
            "device": str(kitchen.device),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "bytes": {
            "checkpoint": bytes_in(kitchen.checkpoint),
            **{path.name: path.stat().st_size for path in sorted(kitchen.adapters.iterdir())},
        },
        "total_seconds": round(sum(stage["stage_seconds"] for stage in stages.values()), 1),
        "stages": stages,
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _write(path: Path, figures: dict[str, object]) -> None:
    path.write_text(json.dumps(figures, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
