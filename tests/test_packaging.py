from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moesaic.bench.spec import load_spec

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bench", "kernels", "metrics", "moe")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "metrics": {"metrics", "kernels"},
    "moe": {"moe", "kernels"},
    "bench": {"bench", "moe", "metrics", "kernels"},
}
HUGGINGFACE = ("kernels", "transformers")


@dataclass(frozen=True)
class Build:
    sdist: frozenset[str]  # names inside, below moesaic-<version>/
    wheel: frozenset[str]
    wheel_path: Path


@dataclass(frozen=True)
class Environment:
    python: Path
    site_packages: Path


def sources(package: str) -> Iterator[Path]:
    """Every file of one of the four folders that git would keep."""
    for path in sorted((ROOT / package).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed; PYTHON* variables of this process do not reach it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """An sdist of the checkout and the wheel made from it; built in a copy, so no earlier build can lend it files."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in (*PACKAGES, "src"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    dist = checkout / "dist"
    run(sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", dist, cwd=checkout)
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        files = frozenset(member.name.partition("/")[2] for member in archive if member.isfile())
    with zipfile.ZipFile(wheel) as archive:
        return Build(files, frozenset(archive.namelist()), wheel)


@pytest.fixture(scope="module")
def installed(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An empty environment with the wheel in it; its dependencies are those of the environment that runs the tests."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True, with_pip=False)
    python = home / "bin" / "python"
    site_packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(home)}))
    run(
        *(sys.executable, "-P", "-m", "pip", "--python", python, "--disable-pip-version-check"),
        *("install", "--no-index", "--no-deps", build.wheel_path),
        cwd=home,
    )
    # A folder named in a .pth is searched, but its own .pth files, an editable moesaic among them, are not read.
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(folders)))
    return Environment(python, site_packages)


@pytest.mark.parametrize("package", PACKAGES)
def test_sdist_and_wheel_hold_every_file(build: Build, package: str) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in sources(package)}
    assert f"{package}/__init__.py" in files
    assert {f"src/moesaic/{file}" for file in files} <= build.sdist
    assert {f"moesaic/{file}" for file in files} <= build.wheel


def test_wheel_is_one_typed_package_with_its_licence(build: Build) -> None:
    tops = {name.partition("/")[0] for name in build.wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moesaic"}
    assert "moesaic/py.typed" in build.wheel
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in build.wheel)


def test_wheel_imports_beside_another_kernels_even_in_the_checkout(installed: Environment, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'another distribution'\n")
    code = (
        "import json, kernels, moesaic, moesaic.bench, moesaic.kernels, moesaic.metrics, moesaic.moe as moe;"
        "print(json.dumps([kernels.OWNER, moesaic.__version__, moesaic.__file__, moe.__file__]))"
    )
    for cwd in (tmp_path, ROOT):
        out = run(installed.python, "-c", code, cwd=cwd, PYTHONSAFEPATH="1", PYTHONPATH=str(tmp_path))
        owner, version, *files = json.loads(out)
        assert owner == "another distribution"
        assert version == importlib.metadata.version("moesaic")
        assert all(Path(file).is_relative_to(installed.site_packages) for file in files)


def test_command_of_the_wheel_runs(installed: Environment, tmp_path: Path) -> None:
    out = run(installed.python.parent / "moesaic", "--help", cwd=tmp_path, PYTHONSAFEPATH="1")
    assert "sweep" in out


def is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not all(map(is_installed, HUGGINGFACE)), reason="`make test-huggingface` installs both")
@pytest.mark.parametrize("first", ["moesaic", "huggingface"])
def test_imports_beside_huggingface(installed: Environment, first: str) -> None:
    theirs = "import kernels, transformers; from transformers import MixtralConfig, MixtralForCausalLM\n"
    ours = "".join(f"import moesaic.{package}\n" for package in PACKAGES)
    check = "assert callable(kernels.get_kernel) and kernels is not moesaic.kernels\n"
    code = ours + theirs + check if first == "moesaic" else theirs + ours + check
    run(installed.python, "-c", code, cwd=ROOT, PYTHONSAFEPATH="1", HF_HUB_OFFLINE="1")


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of what a source file imports, wherever in the file it does so."""
    package = ("moesaic", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(), path.name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    for path in sources(package):
        if path.suffix == ".py":
            for module in imported_modules(path):
                top, _, rest = module.partition(".")
                sibling = rest.partition(".")[0]
                assert top not in PACKAGES, f"{path} imports {module}, which is not ours outside a checkout"
                if top == "moesaic" and sibling in PACKAGES:
                    assert sibling in MAY_IMPORT[package], f"{path} imports {module}"


def test_only_compiled_functions_of_kernels_are_untyped() -> None:
    for path in sources("kernels"):
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(), path.name)):
                if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
                    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                    assert node.returns is not None, f"{path}: {node.name} says not what it returns"
                    assert not bare, f"{path}: {node.name} has no types for {bare}"


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for on this machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [need for need in map(Requirement, lines) if need.marker is None or need.marker.evaluate()]


def closure(needed: list[Requirement]) -> dict[str, str]:
    """Canonical name -> installed version of the requirements and of all that they require on this machine."""
    found: dict[str, str] = {}
    queue = [(need.name, frozenset(need.extras)) for need in needed]
    seen = set(queue)
    while queue:
        name, extras = queue.pop()
        distribution = importlib.metadata.distribution(name)
        found[canonicalize_name(name)] = distribution.version
        for need in map(Requirement, distribution.requires or []):
            item = (need.name, frozenset(need.extras))
            wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras))
            if wanted and item not in seen:
                seen.add(item)
                queue.append(item)
    return found


def test_kernels_import_with_the_core_dependencies_alone(tmp_path: Path) -> None:
    core = closure(requirements())
    assert {"torch", "numpy"} <= core.keys()
    blocked = [
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & {*core, "moesaic"}
    ]
    assert {"numba", "pytest", "tqdm"} <= set(blocked)
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import moesaic.kernels"
    run(sys.executable, "-c", code, cwd=tmp_path, PYTHONSAFEPATH="1")


def test_constraints_pin_all_that_the_two_commands_install() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    # A local part (+cpu, +cu130) names a build of the pinned version.
    needed = {name: version.partition("+")[0] for name, version in closure(requirements("bench", "dev")).items()}
    assert {"torch", "numba", "matplotlib", "ruff", "setuptools"} <= needed.keys()
    assert needed == {name: pins.get(name, "not pinned") for name in needed}


FAKE_PYTHON = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
  *version_info*) exit {too_old} ;;
  -V) echo "Python 3.10.4" ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


def make(folder: Path, target: str) -> subprocess.CompletedProcess[str]:
    command = ("make", target, f"PYTHON={folder / 'python'}")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def made_checkout(folder: Path, *, too_old: bool) -> Path:
    """A folder with the Makefile, what its targets depend on, and a ``python`` that only logs; returns the log."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt", "src/moesaic/_version.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    log = folder / "log"
    (folder / "python").write_text(FAKE_PYTHON.format(log=log, too_old=int(too_old)))
    (folder / "python").chmod(0o755)
    return log


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_once_and_again_when_pins_change(tmp_path: Path) -> None:
    log = made_checkout(tmp_path, too_old=False)

    def installs(target: str) -> int:
        log.write_text("")
        done = make(tmp_path, target)
        assert done.returncode == 0, done.stderr
        return sum(" install " in line for line in log.read_text().splitlines())

    assert installs(".venv/.dev") == 2  # setuptools, then moesaic
    assert installs(".venv/.dev") == 0
    assert installs(".venv/.bench") == 0
    for path in tmp_path.rglob("*"):
        past = path.stat().st_mtime - 10
        os.utime(path, (past, past))
    (tmp_path / "constraints.txt").touch()
    assert installs(".venv/.bench") == 2
    assert installs(".venv/.bench") == 0
    assert installs(".venv/.dev") == 2


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_names_a_python_that_is_too_old(tmp_path: Path) -> None:
    made_checkout(tmp_path, too_old=True)
    done = make(tmp_path, "demo")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.10.4" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_nothing_at_the_root_shadows_the_tests() -> None:
    assert not (ROOT / "conftest.py").exists()
    assert not hasattr(sys.modules.get("moesaic.kernels"), "__version__")


def examples_of_the_readme(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.filterwarnings("default")
def test_the_huggingface_example_of_the_readme_runs() -> None:
    names: dict[str, Any] = {}
    exec(examples_of_the_readme("python")[5], names)
    assert names["model"].config._experts_implementation == "moesaic"
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_the_example_of_expert_parallelism_runs(tmp_path: Path) -> None:
    [example] = examples_of_the_readme("py")
    (tmp_path / "train.py").write_text(example)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_examples_of_the_readme_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    toy, large, counting, routing, layer, _, ops = examples_of_the_readme("python")
    assert len(toy.splitlines()) <= 10
    short = toy.replace("steps=2_000", "steps=100")
    assert short != toy
    exec(short, {})
    assert len(capsys.readouterr().out.splitlines()) == 2
    exec(large.replace("steps=500", "steps=3"), {})
    unexplained, step_s = map(float, capsys.readouterr().out.split())
    assert 0.5 < unexplained < 3
    assert step_s > 0
    names: dict[str, Any] = {}
    exec(counting, names)
    assert f"print(flops.forward.active.total)  # {names['flops'].forward.active.total}: what" in counting
    assert capsys.readouterr().out.split()[0] == str(6 * 8192 * 2 * 4096 * 14336 + 2 * 8192 * 4096 * 64)
    names = {}
    exec(routing, names)
    assert names["weights"].shape == names["ids"].shape == (4096, 8)
    assert int(names["grouping"].counts.sum()) == int(names["statistics"].counts.sum()) == 4096 * 8
    names = {}
    exec(layer, names)
    assert (names["before"](names["x"]) - names["after"](names["x"])).abs().max() < 1e-5
    names = {}
    exec(ops, names)
    assert names["y"].shape == (64, 256)
    assert names["h"].shape == (128, 128)
    [spec] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "spec.toml").write_text(spec)
    [stage] = load_spec(tmp_path / "spec.toml").stages(False, None)
    assert len(stage([])) == 3 * 2 * 3
