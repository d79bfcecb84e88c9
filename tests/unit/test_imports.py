"""The layers' import directions, held by reading every file's syntax tree, and what `import tinyllm` must not load."""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Each layer may import itself and the layers named after it.
ALLOWED = {
    "tinyllm.cli": {
        *("server", "replay", "recording", "llm", "hub", "plan", "loadgen"),
        *("engine", "models", "backends", "weights", "base"),
    },
    "tinyllm.server": {"llm", "recording", "engine", "base"},
    "tinyllm.replay": {"recording", "llm", "engine", "base"},
    "tinyllm.llm": {
        *("recording", "session", "snapshot_file", "hub", "plan"),
        *("engine", "models", "backends", "weights", "base"),
    },
    "tinyllm.session": {"snapshot_file", "engine", "base"},
    "tinyllm.snapshot_file": {"engine", "backends", "weights", "base"},
    "tinyllm.plan": {"engine", "models", "backends", "weights", "base"},
    "tinyllm.recording": {"engine", "models", "backends", "weights", "base"},
    "tinyllm.engine": {"models", "backends", "base"},
    "tinyllm.models": {"backends", "weights", "base"},
    "tinyllm.backends": {"weights", "cuda_kernels", "base"},
    "tinyllm.hub": {"base"},
    "tinyllm.loadgen": {"base"},
    "tinyllm.base": {"base"},
    "weights": set(),
    "cuda_kernels": set(),
}
LAYERS = (
    *("cli", "server", "replay", "llm", "recording", "session", "snapshot_file", "hub", "plan"),
    *("loadgen", "engine", "models", "backends"),
)
BOOKKEEPING = ("sequence", "block_manager", "scheduler", "batch")  # testable with no model


def layer_of(module: str) -> str:
    """The layer of a dotted module name; tinyllm's small shared modules (config, errors, ...) are "base"."""
    parts = module.split(".")
    if parts[0] != "tinyllm":
        return parts[0]
    return f"tinyllm.{parts[1]}" if len(parts) > 1 and parts[1] in LAYERS else "tinyllm.base"


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too, but not those for type checking alone."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def modules() -> list[tuple[str, Path]]:
    paths = [p for package in ("tinyllm", "weights", "cuda_kernels") for p in (ROOT / package).rglob("*.py")]
    assert len(paths) > 30
    return [(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), p) for p in paths]


def test_imports_follow_the_layers() -> None:
    wrong = []
    for module, path in modules():
        if module in ("tinyllm", "tinyllm.__main__"):
            continue
        layer = layer_of(module)
        for imported in imports_of(path):
            if imported.split(".")[0] not in ("tinyllm", "weights", "cuda_kernels") or imported == "tinyllm":
                continue
            target = layer_of(imported)
            if target != layer and target.removeprefix("tinyllm.") not in ALLOWED[layer]:
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_the_engines_bookkeeping_needs_no_model_and_no_backend() -> None:
    for name in BOOKKEEPING:
        for imported in imports_of(ROOT / "tinyllm" / "engine" / f"{name}.py"):
            assert not imported.startswith("tinyllm.models"), f"{name} imports {imported}"
            if imported.startswith("tinyllm.backends"):
                assert imported.startswith("tinyllm.backends.base"), f"{name} imports {imported}"
            assert imported.split(".")[0] not in ("numba", "tokenizers", "weights")


def test_import_tinyllm_is_light() -> None:
    code = (
        "import sys, tinyllm; tinyllm.SamplingParams\n"
        "heavy = {'numba', 'cupy', 'tokenizers', 'jinja2', 'huggingface_hub', 'rich', 'fastapi', 'llguidance'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_one_file_alone_imports_llguidance_and_not_before_it_is_needed() -> None:
    names = {path.name for _, path in modules() if any(name.split(".")[0] == "llguidance" for name in imports_of(path))}
    assert names == {"grammar.py"}
    code = "import sys, tinyllm.llm, tinyllm.guidance.compiler; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_kept_kernels_are_loaded_without_numba() -> None:
    """It takes 0.2 s to import, and LLVM 70 MB; elsewhere than on x86-64 Linux, LLVM loads the kernels."""
    code = (
        "import sys, numpy as np\n"
        "from tinyllm.backends.cpu import CpuBackend\n"
        "x = np.ones((2, 64), np.float32)\n"
        "CpuBackend(1).rms_norm(x, x[0], 1e-5)\n"
        "heavy = {'numba', 'llvmlite.binding'} if sys.argv[1:] else {'numba'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    alone = ["alone"] if sys.platform == "linux" and platform.machine() == "x86_64" else []
    statuses = [subprocess.run([sys.executable, "-c", code, *alone], cwd=ROOT).returncode for _ in range(2)]
    assert statuses[1] == 0  # the first run may have compiled
