"""The house keeps its shape: packages listed, imports light, layers held, nothing foreign."""

import ast
import os
import subprocess
import sys
import tomllib

import pytest

NOT_PACKAGES = {"tests", "benchmarks", "build"}


def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


def source_files(root):
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part.startswith(".") for part in parts) and parts[0] not in NOT_PACKAGES:
            yield path


def test_package_list_is_complete(root):
    found = {
        ".".join(("prunery", *path.parent.relative_to(root).parts)) for path in source_files(root)
    }
    assert set(project(root)["tool"]["setuptools"]["packages"]) == found


def test_every_package_has_an_init(root):
    for path in source_files(root):
        assert (path.parent / "__init__.py").exists(), path.parent


def test_data_files_are_packaged(root):
    """What the code reads beside itself is listed in package-data, so a wheel holds it too."""
    listed = project(root)["tool"]["setuptools"]["package-data"]
    for package in project(root)["tool"]["setuptools"]["packages"]:
        folder = root.joinpath(*package.split(".")[1:])
        if folder == root:
            continue
        for path in folder.iterdir():
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                patterns = listed.get(package, [])
                assert any(path.match(pattern) for pattern in patterns), path.relative_to(root)


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_import_is_light():
    done = run(
        "import sys, prunery; heavy = {'torch', 'prefect', 'faiss', 'pyarrow', 'transformers',"
        "'numpy', 'fastapi'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    assert done.returncode == 0, done.stderr


def test_command_line_import_is_light():
    done = run(
        "import sys, prunery.cli; heavy = {'torch', 'prefect', 'faiss', 'pyarrow', 'transformers',"
        "'numpy', 'fastapi', 'pydantic'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    assert done.returncode == 0, done.stderr


def test_help_answers_in_half_a_second():
    """The bound is in processor seconds, which a busy machine does not stretch."""
    command = [sys.executable, "-m", "prunery.cli", "--help"]
    taken = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        after = os.times()
        taken.append(
            after.children_user
            - before.children_user
            + after.children_system
            - before.children_system
        )
    assert "Usage" in done.stdout
    assert min(taken) < 0.5


def test_public_names_resolve():
    import prunery

    for name in prunery.__all__:
        assert getattr(prunery, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = prunery.no_such_name


def test_no_pickle_and_no_remote_code(root):
    """Weights and indexes are never unpickled, and a hub's code is never run."""
    for path in source_files(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "cloudpickle", "dill", "marshal"}, path
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


def test_command_line_alone_prints(root):
    for path in source_files(root):
        if path == root / "cli.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = getattr(node, "func", None)
            assert not (isinstance(called, ast.Name) and called.id == "print"), path


def test_every_module_and_public_name_has_a_docstring(root):
    missing = []
    for path in source_files(root):
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            missing.append(str(path.relative_to(root)))
        for node in tree.body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if public and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(root)}:{node.name}")
    assert not missing
