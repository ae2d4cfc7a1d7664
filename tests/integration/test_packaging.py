"""Whatever way Conclave is taken along, it is one import root, whole, and out of the way of its user's own names."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from environments import QUIET, environment
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = tuple(sorted(link.name for link in (ROOT / "src" / "conclave").iterdir() if link.is_symlink()))
DATA = {".toml", ".j2"}
"""What the packages hold besides modules: shipped scenarios and the report's template."""


def of_the_checkout() -> dict[str, bytes]:
    """Everything that must travel, by the name that it is imported under."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in {".py"} | DATA]
    files += [file for file in (ROOT / "src" / "conclave").iterdir() if file.is_file()]
    return {
        f"conclave/{file.relative_to(ROOT).as_posix().removeprefix('src/conclave/')}": file.read_bytes()
        for file in files
    }


def built(root: Path, to: Path, version: str = "standard") -> Path:
    """Build a wheel and return it unpacked."""
    (wheel,) = WheelBuilder(str(root)).build(directory=str(to), versions=[version])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to / version)
    return to / version


def held(unpacked: Path) -> dict[str, bytes]:
    names = {file.relative_to(unpacked).as_posix(): file for file in unpacked.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in names.items() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("wheel"))


def python(code: str, *on_path: Path, cwd: Path) -> list[str]:
    """Run code in a Python that knows its standard library, ``cwd`` and ``on_path`` only; return what it prints."""
    head = f"import sys, site\nsys.path.insert(0, '')\nfor path in {[str(p) for p in on_path]}: site.addsitedir(path)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", head + code],
        cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_wheel_holds_the_whole_checkout_under_one_name(wheel):
    must = of_the_checkout()
    assert {"conclave/py.typed", "conclave/simulations/scenarios/digits.toml", "conclave/cli/main.py"} <= must.keys()
    assert held(wheel) == must
    assert [path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")] == ["conclave"]
    assert {path.name for path in (wheel / "conclave").iterdir() if path.is_dir()} == set(FOLDERS)


def test_a_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    (source,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (project,) = (tmp_path / "source").iterdir()
    assert held(built(project, tmp_path)) == held(wheel)


def test_an_editable_install_is_the_checkout_and_brings_no_other_name(tmp_path):
    editable = built(ROOT, tmp_path, "editable")
    code = f"""
import conclave.base.errors, importlib.util
print(conclave.base.errors.__file__)
print([name for name in {FOLDERS} if importlib.util.find_spec(name)])
"""
    where, others = python(code, editable, cwd=tmp_path)
    assert Path(where).resolve() == ROOT / "base" / "errors.py"
    assert others == "[]"


USERS_OWN = {
    "model.py": "class Net: pass\n",
    "data/schema.py": "COLUMNS = 3\n",  # a folder without __init__.py, as people make them
    "server/__init__.py": "",
    "server/app.py": "PORT = 1\n",
    "my.py": "from model import Net\nimport data.schema\nfrom server import app\n",
}


def write_users_own(folder: Path) -> None:
    for name, text in USERS_OWN.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("version", ["standard", "editable"])
def test_a_users_own_names_are_the_users(wheel, tmp_path, version):
    installed = wheel if version == "standard" else built(ROOT, tmp_path / "built", version)
    write_users_own(tmp_path)
    code = "import conclave.data, conclave.server, conclave.base.errors, my\n"
    code += "print(my.Net, my.data.schema.COLUMNS, my.app)"
    (said,) = python(code, installed, cwd=tmp_path)
    assert said.startswith("<class 'model.Net'> 3 <module 'server.app'")
    assert str(tmp_path) in said


USERS_MODEL = """from torch import nn
class Net(nn.Linear):
    def loss(self, batch):
        return ((self(batch["x"]) - batch["y"]) ** 2).mean(1)
"""
USERS_FUNCTION = """import torch
def build():
    x = torch.eye(8)
    return Net(8, 3), {"x": x, "y": x[:, :3]}
"""


@pytest.mark.slow
def test_a_model_beside_a_users_own_names_is_audited(wheel, tmp_path):
    write_users_own(tmp_path)
    (tmp_path / "model.py").write_text(USERS_MODEL)
    (tmp_path / "my.py").write_text(USERS_OWN["my.py"] + USERS_FUNCTION)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "conclave", "audit", "model", "my:build", "--json"],  # -P: as a script does
        cwd=tmp_path, env=QUIET | {"PYTHONPATH": str(wheel)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["verdict"] == "NOT_REFUTED"


USERS_PROGRAM = """import conclave
scenario = conclave.Scenario.read("digits")
rounds: int = scenario.federation.rounds
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["standard", "editable"])
def test_a_users_program_is_checked_against_our_types(wheel, tmp_path, version):
    installed = wheel if version == "standard" else built(ROOT, tmp_path / "built", version)
    led_to = [Path(link.read_text().strip()) for link in installed.glob("*.pth")]
    programs = environment(tmp_path / "environment", installed, *led_to)
    (tmp_path / "right.py").write_text(USERS_PROGRAM)
    (tmp_path / "wrong.py").write_text(USERS_PROGRAM.replace("rounds: int", "rounds: str"))
    options = ["--strict", "--no-color-output", "--cache-dir", tmp_path / "cache"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--python-executable", programs / "python", "right.py", "wrong.py"],
        cwd=tmp_path, env=QUIET, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert (done.returncode, len(errors)) == (1, 1), done.stdout + done.stderr
    assert errors[0].startswith('wrong.py:3: error: Incompatible types in assignment (expression has type "int"')


@pytest.mark.slow
def test_a_wheelhouse_is_all_that_a_machine_without_a_network_needs(tmp_path):
    """As the Makefile fills it, and as the Containerfile installs from it. Needs the package index."""
    house, target = tmp_path / "wheelhouse", tmp_path / "environment"
    make = ["make", "wheelhouse", "STAMP=", f"BIN={Path(sys.executable).parent}", f"HOUSE={house}"]
    subprocess.run(make, cwd=ROOT, env=QUIET, check=True, timeout=900)
    venv.create(target, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check"]
    install = [
        "install",
        "--quiet",
        "--no-index",
        "--find-links",
        house,
        "-c",
        ROOT / "constraints.txt",
        "conclave-moe",
    ]
    subprocess.run([*pip, "--python", target / "bin" / "python", *install], env=QUIET, check=True, timeout=900)
    done = subprocess.run(
        [target / "bin" / "conclave", "simulate", "digits", "--set", "federation.rounds=1", "--out", "run", "--json"],
        cwd=tmp_path, env=QUIET, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rounds"] == 1
