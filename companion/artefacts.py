"""A model for inference in a folder of its own, which needs neither its class nor pickle to be used.

    model = artefacts.load("resnet-fast")
    torch.set_num_threads(model.about.threads)
    answers = model(images)

Four kinds: a frozen script, an exported program that is compiled when it is loaded, a file for ONNX Runtime
and one for OpenVINO. The program's weights and examples are read with `weights_only`: a file in which
somebody has hidden code for pickle is refused.
"""

import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from companion import machine, modules
from companion import quantization_peers as peers
from companion import quantization_pt2e as pt2e

ABOUT = "artefact.json"
FILES = {"script": "model.ts", "program": "model.pt2", "onnx": "model.onnx", "openvino": "model.xml"}
FORMAT = 1
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own switch, which `torch.export.load` obeys too


class ArtefactError(ValueError):
    """The model cannot be written or read as such an artefact; the message says why."""


@dataclass(frozen=True)
class About:
    """What an artefact is: its kind, what it was made by, one sample's shape and type, the device, how many
    threads it was measured with; `mode` of torch.compile for a program, `precision` for OpenVINO, `tf32` on
    a GPU.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str = "cpu"
    threads: int = 1
    mode: str = "default"
    precision: str = "f32"
    tf32: bool = False


def save(model: nn.Module, calibration: Sequence[torch.Tensor], folder: str | Path, about: About) -> None:
    """Writes a model, in eval mode, into an empty folder.

    `calibration` are batches `[N, ...]` of its inputs, the first of two samples at least. Raises
    ArtefactError or QuantizationError for a model that cannot be written as this kind.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ArtefactError(f"{folder} is not empty")
    writers = {"script": _script, "program": _program, "onnx": _onnx, "openvino": _openvino}
    with torch.no_grad(), modules.evaluating(model):
        writers[about.kind](model, list(calibration), folder, about)
    written = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    versions = machine.environment()["versions"]
    text = {"format": FORMAT, **asdict(about), "sha256": written, "made with": versions}
    (folder / ABOUT).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _script(model: nn.Module, calibration: list[torch.Tensor], folder: Path, about: About) -> None:
    example = calibration[0][:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a trace holds what Python decided: it is compared afterwards
        try:
            traced = torch.jit.trace(model, example, check_trace=False)
        except Exception as error:  # whatever the tracer has to say of the model
            raise ArtefactError(f"{type(model).__name__} cannot be traced: {_first_line(error)}") from error
        frozen = torch.jit.freeze(traced.eval())
        try:
            frozen(example)
        except RuntimeError as error:  # the interpreter gives its reason last
            reason = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
            raise ArtefactError(f"{type(model).__name__} does not run as a script: {reason}") from error
        torch.jit.save(frozen, folder / FILES["script"])


def _program(model: nn.Module, calibration: list[torch.Tensor], folder: Path, about: About) -> None:
    # Newer releases cannot follow Python where torchao's weights are put together as they are read.
    strict = not any(parametrize.is_parametrized(module) for module in model.modules())
    graph = pt2e.program(model, calibration[0], strict)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(graph, folder / FILES["program"])
    except Exception as error:  # whatever torch.export cannot write
        raise ArtefactError(f"the exported program cannot be written: {_first_line(error)}") from error


def _onnx(model: nn.Module, calibration: list[torch.Tensor], folder: Path, about: About) -> None:
    path = peers.onnx_file(model, calibration, folder, int8=about.precision == "int8")
    path.replace(folder / FILES["onnx"])
    for other in folder.glob("*.onnx"):
        if other.name != FILES["onnx"]:
            other.unlink()


def _openvino(model: nn.Module, calibration: list[torch.Tensor], folder: Path, about: About) -> None:
    peers.openvino_file(model, calibration, folder, int8=about.precision == "int8")


def _first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


class Artefact(nn.Module):
    """A loaded artefact: takes `[N, ...]` of the type that it was made for, and gives what the model gave."""

    def __init__(self, about: About, call: Callable[[torch.Tensor], torch.Tensor], disk_bytes: int):
        super().__init__()
        self.about, self.call, self.disk_bytes = about, (call,), disk_bytes  # a tuple: it has no modes
        # So that `next(model.parameters()).device` is what it is of other models.
        self.place = nn.Parameter(torch.empty(0, device=about.device), requires_grad=False)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        about = self.about
        if tuple(x.shape[1:]) != about.shape or str(x.dtype) != f"torch.{about.dtype}":
            wanted = f"{about.dtype} [N, {', '.join(map(str, about.shape))}]"
            raise ValueError(f"{about.name} takes {wanted}, not {x.dtype} {list(x.shape)}")
        with tf32() if about.tf32 else contextlib.nullcontext():
            return self.call[0](x)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Lets float32 products on a GPU use TensorFloat-32 inside."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32"
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.fp32_precision = was


def read(folder: str | Path) -> About:
    """What is in the folder. Raises ArtefactError where there is no artefact, one of another format, or one
    whose files are not those that were written.
    """
    folder = Path(folder)
    try:
        text = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        own = {name: text[name] for name in About.__dataclass_fields__}
        number, written = text["format"], dict(text["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"there is no artefact in {folder}: {_first_line(error)}") from error
    if number != FORMAT or own["kind"] not in FILES:
        raise ArtefactError(f"{folder} has format {number}, kind {own['kind']!r}: made by another version")
    for name, checksum in written.items():
        path = folder / Path(name).name
        if not path.is_file() or _checksum(path) != checksum:
            raise ArtefactError(f"{path} is missing or damaged")
    return About(**own | {"shape": tuple(own["shape"])})


def load(folder: str | Path, threads: int | None = None) -> Artefact:
    """The model in the folder. `threads` are those of a runtime of its own, if not the artefact's.

    A program is compiled for each shape when it first comes. torch's own threads are set by the caller.
    Raises ArtefactError as `read` does, and for a file with more in it than a model; ImportError where the
    runtime is missing.
    """
    folder, about = Path(folder), read(folder)
    about = replace(about, threads=threads or about.threads)
    path = folder / FILES[about.kind]
    if about.kind == "onnx":
        call = peers.onnx_session(path, about.threads)
    elif about.kind == "openvino":
        call = peers.openvino_request(path, about.threads, "bf16" if about.precision == "bf16" else "f32")
    elif about.kind == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer releases call TorchScript deprecated
            call = torch.jit.load(path, map_location=about.device)
    else:
        call = pt2e.Compiled(_loaded_program(path), about.mode)
    size = sum(each.stat().st_size for each in folder.iterdir() if each.name != ABOUT)
    return Artefact(about, call, size)


def _loaded_program(path: Path) -> nn.Module:
    """With the operators of int8, which are there once a package is imported: torch's, else torchao's."""
    failure = None
    for package in ("torch.ao.quantization.fx._decomposed", "torchao.quantization"):
        with contextlib.suppress(ImportError):
            pt2e.quietly_imported(package)
        try:
            with _only_weights(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.export.load(path).module()
        except Exception as error:  # a damaged file, or one with code for pickle in it
            failure = error
    said_so = "it is damaged, or has in it what only pickle, another torch or torchao could read"
    raise ArtefactError(f"the program in {path.name} cannot be read: {said_so}") from failure


@contextlib.contextmanager
def _only_weights() -> Iterator[None]:
    """torch.export.load reads weights only, whoever else has asked for something else, and is quiet."""
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    said = logging.getLogger("torch.export")
    level = said.level
    said.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        said.setLevel(level)
        if before is None:
            os.environ.pop(WEIGHTS_ONLY)
        else:
            os.environ[WEIGHTS_ONLY] = before
