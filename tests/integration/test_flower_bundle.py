"""What ``flwr run .`` takes along: Flower leaves out links and files named like tests, and says nothing."""

from __future__ import annotations

import io
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import get_project_config
from flwr.supercore.object_ref import validate

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = tuple(sorted(link.name for link in (ROOT / "src" / "conclave").iterdir() if link.is_symlink()))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as bundle:
        bundle.extractall(folder)
    return folder


def test_every_module_and_scenario_travels(unpacked):
    travels = {file.relative_to(unpacked).as_posix() for file in unpacked.rglob("*")}
    ours = {path.relative_to(ROOT).as_posix() for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "simulations" / "scenarios").glob("*.toml")}
    assert len(FOLDERS) > 10
    assert ours - travels == set()


def test_flower_finds_both_apps_at_the_root_of_the_bundle(unpacked):
    """As Flower itself looks: it reads the file and loads nothing."""
    for app in get_project_config(unpacked)["tool"]["flwr"]["app"]["components"].values():
        assert (unpacked / f"{app.partition(':')[0]}.py").is_file()
        assert validate(app, check_module=True, project_dir=unpacked) == (True, None)


def imported_from(unpacked: Path, code: str, *libraries: str) -> None:
    """Run code where nothing is installed but ``libraries``, and the bundle's root comes first."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys\nsys.path[:0] = {[str(unpacked), *libraries]}\n{code}"],
        cwd=unpacked, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_bundle_by_itself_is_the_package(unpacked):
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for f in FOLDERS for path in (ROOT / f).glob("*.py")
    ]
    code = f"""
sys.path.insert(0, {str(unpacked / "src")!r})
import conclave.base.errors, importlib.util
assert conclave.base.errors.__file__ == {str(unpacked / "base" / "errors.py")!r}
for name in {names}:
    assert importlib.util.find_spec("conclave." + name).origin.startswith({str(unpacked)!r}), name
"""
    imported_from(unpacked, code)


@pytest.mark.slow
def test_both_apps_load_from_the_bundle_by_itself(unpacked):

    code = f"""
import flower_app, conclave.privacy
assert conclave.privacy.__file__.startswith({str(unpacked)!r})
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
assert isinstance(flower_app.client, ClientApp) and isinstance(flower_app.server, ServerApp)
"""
    imported_from(unpacked, code, sysconfig.get_path("purelib"))
