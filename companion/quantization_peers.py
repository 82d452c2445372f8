"""The same model in other runtimes, to compare with: ONNX Runtime and OpenVINO, in float32 and in int8.

Each function gives a module that takes and gives torch tensors, and leaves the given model as it is. They
need the extra "peers". Source: the runtimes' own documentation of static quantization.
"""

import contextlib
import copy
import importlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from companion.quantization import QuantizationError

_CALIBRATED = 64  # samples that the runtimes look at


class Runtime(nn.Module):
    """A model in another runtime; `disk_bytes` are those of its file."""

    def __init__(self, call, disk_bytes: int):
        super().__init__()
        self.call, self.disk_bytes = call, disk_bytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.call(x.numpy()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what exporters and runtimes say of their own versions and ways."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _needed(module: str) -> ModuleType:
    try:
        with _quiet():
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} cannot be imported ({error}): pip install 'accelerating-pytorch[peers]'"
        ) from error


def onnx_runtime(model: nn.Module, calibration: Sequence[torch.Tensor], *, int8: bool = True) -> Runtime:
    """The model in ONNX Runtime on as many threads as torch uses; `int8`: static, between QDQ nodes, weights
    with a scale for each channel.

    `calibration` are batches of inputs, of two samples at least. Raises QuantizationError for a model that
    cannot be exported, ImportError without onnx and onnxruntime.
    """
    _needed("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        return onnx_session(onnx_file(model, calibration, Path(folder), int8=int8), torch.get_num_threads())


def onnx_file(model: nn.Module, calibration: Sequence[torch.Tensor], folder: Path, *, int8: bool) -> Path:
    """Writes the model as a file for ONNX Runtime into the folder. Raises as `onnx_runtime` does."""
    path = _exported(model, calibration[0], folder)
    return _with_integers(path, calibration) if int8 else path


def onnx_session(path: Path, threads: int) -> Runtime:
    """A file of `onnx_file` in ONNX Runtime, on so many threads."""
    runtime = _needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only
    # Or its threads wait busily for the next call, on cores that others need. The price: many short calls in
    # a row on several threads take longer, LeNet5's at batch 1 twice as long.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Runtime(lambda x: session.run(None, {"x": x})[0], path.stat().st_size)


def _exported(model: nn.Module, batch: torch.Tensor, folder: Path) -> Path:
    """The file of the model's ONNX graph, which takes batches of any size."""
    _needed("onnx")
    _needed("onnxscript")
    path, model = folder / "model.onnx", copy.deepcopy(model).eval()
    sizes = ({0: torch.export.Dim("batch", min=2, max=2**16)},)
    try:
        with _quiet():
            torch.onnx.export(
                model,
                (batch,),
                path,
                input_names=["x"],
                output_names=["y"],
                dynamic_shapes=sizes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # whatever the exporter has to say of the model
        said = str(error).strip().splitlines()
        raise QuantizationError(
            f"{type(model).__name__} cannot be exported to ONNX: {said[0] if said else type(error).__name__}"
        ) from error
    return path


def _with_integers(path: Path, calibration: Sequence[torch.Tensor]) -> Path:
    quantize = _needed("onnxruntime.quantization")
    samples = iter([{"x": x[None].numpy()} for batch in calibration for x in batch][:_CALIBRATED])

    class Reader(quantize.CalibrationDataReader):
        def get_next(self):
            return next(samples, None)

    prepared, made = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    with _quiet():
        quantize.quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize.quantize_static(
            prepared,
            made,
            Reader(),
            quant_format=quantize.QuantFormat.QDQ,
            activation_type=quantize.QuantType.QUInt8,
            weight_type=quantize.QuantType.QInt8,
            per_channel=True,
        )
    return made


def openvino(model: nn.Module, calibration: Sequence[torch.Tensor], *, int8: bool = True) -> Runtime:
    """The model in OpenVINO on as many threads as torch uses; `int8`: static, by nncf.

    `calibration` are batches of inputs. Raises QuantizationError for a model that cannot be converted,
    ImportError without openvino (and for int8 without nncf). Neither sends statistics of its use.
    """
    _openvino()
    with tempfile.TemporaryDirectory() as folder:
        path = openvino_file(model, calibration, Path(folder), int8=int8)
        return openvino_request(path, torch.get_num_threads())


def _openvino() -> ModuleType:
    sys.modules.setdefault("openvino_telemetry", None)  # as if it were not there: nothing is sent to anybody
    return _needed("openvino")


def openvino_file(model: nn.Module, calibration: Sequence[torch.Tensor], folder: Path, *, int8: bool) -> Path:
    """Writes the model as two files for OpenVINO into the folder; gives the first. Raises as `openvino`
    does.
    """
    ov = _openvino()
    model, example = copy.deepcopy(model).eval(), calibration[0][:2]
    try:
        with _quiet():
            graph = ov.convert_model(model, example_input=example, input=[-1, *example.shape[1:]])
    except Exception as error:  # whatever the converter has to say of the model
        said = str(error).strip().splitlines()
        raise QuantizationError(
            f"OpenVINO cannot convert {type(model).__name__}: {said[0] if said else type(error).__name__}"
        ) from error
    if int8:
        nncf = _needed("nncf")
        samples = [x[None].numpy() for batch in calibration for x in batch][:_CALIBRATED]
        with _quiet():
            graph = nncf.quantize(graph, nncf.Dataset(samples), subset_size=len(samples))
    path = folder / "model.xml"
    ov.save_model(graph, path, compress_to_fp16=False)
    return path


def openvino_request(path: Path, threads: int, precision: str = "f32") -> Runtime:
    """A file of `openvino_file` in OpenVINO, on so many threads; `precision`: "f32", or "bf16" for what is
    not int8.
    """
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = _openvino().Core().compile_model(path, "CPU", settings).create_infer_request()
    size = sum(each.stat().st_size for each in (path, path.with_suffix(".bin")))
    return Runtime(lambda x: request.infer([x])[0].copy(), size)
