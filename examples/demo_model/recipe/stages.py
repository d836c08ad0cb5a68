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
from examples.demo_model.recipe.settings import Workspace
from examples.demo_model.recipe.styles import STYLES
from examples.demo_model.recipe.tokenizer import learn_tokenizer
from examples.demo_model.recipe.vae import train_vae

HOME = Path(__file__).parents[1]

Stage = Callable[[Workspace], dict[str, object]]


class OtherBudget(Exception):
    """The output folder holds results of another budget."""


def _adapter_stage(style: str) -> Stage:
    return lambda workspace: train_adapter(style, workspace)


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


def run_stages(workspace: Workspace) -> None:
    """Run those that are not done yet, then gather what all of them measured in `figures.json`."""
    workspace.out.mkdir(parents=True, exist_ok=True)
    names = list(STAGES)
    for number, name in enumerate(names):
        record = _record(workspace, name)
        if record.exists():
            _check_budget(workspace, record)
            tqdm.write(f"{name}: done before")
            continue
        _forget(workspace, names[number + 1 :])
        seconds = _run(workspace, name)
        tqdm.write(f"{name}: {seconds:.1f} s")
    _write(workspace.figures, _figures(workspace))
    tqdm.write(f"the model is in {workspace.checkpoint}, its figures are in {workspace.figures}")


def install(workspace: Workspace, home: Path = HOME) -> None:
    """Copy what was made over what the repository bundles."""
    for made in (workspace.checkpoint, workspace.adapters):
        shutil.rmtree(home / made.name, ignore_errors=True)
        shutil.copytree(made, home / made.name)
    for made in (workspace.figures, *sorted(workspace.out.glob("grid-*.png"))):
        shutil.copy(made, home)
    shutil.copy(workspace.references, home / "recipe")
    tqdm.write(f"installed in {home}")


def _run(workspace: Workspace, name: str) -> float:
    """Run one stage and keep its figures; the seconds it took."""
    begun_at = time.monotonic()
    figures = STAGES[name](workspace)
    # A training that was interrupted says how long all of it took; the rest of a stage is done anew.
    seconds = max(time.monotonic() - begun_at, float(str(figures.get("seconds", 0.0))))
    common = {
        "budget": workspace.budget.name,
        "stage_seconds": round(seconds, 1),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    record = _record(workspace, name)
    record.parent.mkdir(parents=True, exist_ok=True)
    _write(record, common | figures)
    workspace.progress(name).unlink(missing_ok=True)
    return seconds


def _forget(workspace: Workspace, names: Sequence[str]) -> None:
    """Remove the records of the stages that depend on an older result."""
    for name in names:
        _record(workspace, name).unlink(missing_ok=True)
        workspace.progress(name).unlink(missing_ok=True)


def _record(workspace: Workspace, name: str) -> Path:
    return workspace.out / "stages" / f"{name}.json"


def _check_budget(workspace: Workspace, record: Path) -> None:
    budget = json.loads(record.read_text())["budget"]
    if budget != workspace.budget.name:
        raise OtherBudget(f"{workspace.out} holds a {budget} run: remove it, or choose another folder with --out")


def _figures(workspace: Workspace) -> dict[str, object]:
    stages = {name: json.loads(_record(workspace, name).read_text()) for name in STAGES}
    return {
        "machine": {
            "cores": os.cpu_count(),
            "cpu": _cpu_name(),
            "device": str(workspace.device),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "bytes": {
            "checkpoint": bytes_in(workspace.checkpoint),
            **{path.name: path.stat().st_size for path in sorted(workspace.adapters.iterdir())},
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
