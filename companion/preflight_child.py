"""Compiles a step for a TPU that is not there; runs in an environment of its own, as a program.

    python -m companion.preflight_child FOLDER

Reads the request in the folder, writes `answer.json`, and leaves the compiled program's text in `dump/`.
Google's compiler (libtpu) takes XLA's programs; jax builds these, and torchax runs a model's PyTorch code
while jax records it.
"""

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

QUIET = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def step_of(model, loss, groups, dtype):
    """A training step `(parameters, buffers, state, inputs, target, key)` of a model, in jax's terms, which
    gives the new parameters, buffers and state, and the loss; without `groups`, its answers alone. `buffers`
    are all tensors that are not trained.

    `dtype` is bfloat16 for weights that stay float32 and are rounded where they are used, trained or not,
    and with them what BatchNorm normalises by in eval mode; the loss is computed in float32.
    """
    import jax
    import torch
    from torchax import default_env, interop

    env, rounded = default_env(), {name for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            if module.training:
                module.register_forward_hook(_running_statistics)
            else:
                rounded |= {f"{path}.{name}".lstrip(".") for name in ("running_mean", "running_var")}

    def lower(value):
        return value.to(torch.bfloat16) if value.is_floating_point() else value

    def forward(parameters, buffers, inputs, key):
        with env.override_property(prng=key):
            given, kept, values = interop.torch_view((parameters, buffers, inputs))
            held = {**given, **kept}
            if dtype == "bfloat16":
                held = {name: lower(value) if name in rounded else value for name, value in held.items()}
                values = tuple(map(lower, values))
            return torch.func.functional_call(model, held, values), kept

    def answers(parameters, buffers, inputs, key):
        with env:
            return interop.jax_view(forward(parameters, buffers, inputs, key)[0])

    def loss_of(parameters, buffers, inputs, target, key):
        with env:
            output, kept = forward(parameters, buffers, inputs, key)
            if isinstance(output, torch.Tensor) and output.dtype == torch.bfloat16:
                output = output.float()
            value = loss(output, interop.torch_view(target))
            return interop.jax_view(value), interop.jax_view(kept)

    def step(parameters, buffers, state, inputs, target, key):
        (value, kept), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            parameters, buffers, inputs, target, key
        )
        new, state = {}, dict(state)
        for group in groups:
            for name in group["names"]:
                rule = _sgd if group["kind"] == "SGD" else _adam
                new[name], state[name] = rule(parameters[name], gradients[name], state[name], group)
        return new, kept, state, value

    return step if groups is not None else answers


def _running_statistics(module, inputs, output):
    """What BatchNorm does to its running mean and variance, which torchax leaves out."""
    (x,) = inputs
    axes = [axis for axis in range(x.dim()) if axis != 1]
    share = module.momentum if module.momentum is not None else 1 / module.num_batches_tracked.float()
    # As BatchNorm itself computes them, so that the compiler does so once; then unbiased, as they are kept.
    count = x.numel() / x.shape[1]
    variance = x.var(axes, correction=0) * (count / (count - 1))
    for kept, now in ((module.running_mean, x.mean(axes)), (module.running_var, variance)):
        kept.mul_(1 - share).add_(share * now.detach().to(kept.dtype))


def _sgd(weight, gradient, state, group):
    """As torch.optim.SGD; `state` is its momentum buffer."""
    gradient = gradient + group["weight_decay"] * weight
    if group["momentum"]:
        state = group["momentum"] * state + gradient
        gradient = gradient + group["momentum"] * state if group["nesterov"] else state
    return weight - group["lr"] * gradient, state


def _adam(weight, gradient, state, group):
    """As torch.optim.Adam and AdamW; `state` is the two moments and the number of steps."""
    import jax.numpy as jnp

    mean, square, steps = state
    first, second = group["betas"]
    if group["kind"] == "AdamW":
        weight = weight * (1 - group["lr"] * group["weight_decay"])
    else:
        gradient = gradient + group["weight_decay"] * weight
    steps = steps + 1
    mean = first * mean + (1 - first) * gradient
    square = second * square + (1 - second) * gradient * gradient
    scale = jnp.sqrt(square / (1 - second**steps)) + group["eps"]
    return weight - group["lr"] * mean / (1 - first**steps) / scale, (mean, square, steps)


def parts(model, groups):
    """The parameters that are trained, and all else that the model holds, by name."""
    trained = {name for group in groups or () for name in group["names"]}
    every = dict(model.named_parameters())
    rest = {name: value for name, value in every.items() if name not in trained}
    return {name: every[name] for name in every if name in trained}, {**rest, **dict(model.named_buffers())}


def states(groups, parameters):
    """What the optimizer keeps at first, by parameter."""
    import jax.numpy as jnp

    kept = {}
    for group in groups:
        for name in group["names"]:
            zeros = jnp.zeros(parameters[name].shape, parameters[name].dtype)
            kept[name] = zeros if group["kind"] == "SGD" else (zeros, zeros, jnp.zeros((), jnp.float32))
            if group["kind"] == "SGD" and not group["momentum"]:
                kept[name] = ()
    return kept


def shapes(tree):
    """The same with shapes and types in the place of torch's tensors."""
    import jax
    import torch
    from torchax.ops.mappings import t2j_dtype

    def one(tensor):
        return jax.ShapeDtypeStruct(tuple(tensor.shape), t2j_dtype(tensor.dtype))

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, torch.Tensor))


def lowered(request, mesh):
    """The request's step, recorded for the devices of a mesh."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    model, groups = request["model"], request["groups"]
    step = step_of(model, request["loss"], groups, request["dtype"])
    parameters, buffers = (shapes(part) for part in parts(model, groups))
    key = jax.eval_shape(lambda: jax.random.key(0))
    count = mesh.devices.size

    def place(leaf):
        """Whole on each device, or split along the longest axis that all devices can share."""
        able = [size for size in leaf.shape if size % count == 0 and size >= count]
        if request["layout"] == "replicated" or not able:
            return NamedSharding(mesh, PartitionSpec())
        axis = leaf.shape.index(max(able))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))

    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    kept, weights = jax.tree.map(place, buffers), jax.tree.map(place, parameters)
    inputs = shapes(tuple(request["inputs"]))
    if groups is None:
        jitted = jax.jit(step, in_shardings=(weights, kept, split, whole), out_shardings=split)
        return jitted.lower(parameters, buffers, inputs, key)
    state = jax.eval_shape(lambda: states(groups, parameters))
    moments = jax.tree.map(place, state)
    jitted = jax.jit(
        step,
        in_shardings=(weights, kept, moments, split, split, whole),
        out_shardings=(weights, kept, moments, whole),
        donate_argnums=(0, 1, 2),
    )
    return jitted.lower(parameters, buffers, state, inputs, shapes(request["target"]), key)


def compiled(request, folder):
    """What the compiler says of the request, as numbers per device."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    jax.config.update("jax_enable_x64", request["x64"])
    options = {"chip_config_name": "megacore"} if request["chip"] == "v4" else {}
    name = f"{request['chip']}:{request['slice']}"
    if request["slice"] == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("data",))
    start = time.perf_counter()
    said(folder, "reads your model's code")
    program = lowered(request, mesh)
    said(folder, f"compiles for {len(topology.devices)} devices of {name}")
    middle = time.perf_counter()
    executable = program.compile(compiler_options={"xla_dump_to": str(folder / "dump")})
    cost, memory = executable.cost_analysis(), executable.memory_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "devices": len(topology.devices),
        "flops": cost.get("flops", 0.0),
        "bytes": cost.get("bytes accessed", 0.0),
        "optimal_seconds": cost.get("optimal_seconds", 0.0),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "reused_bytes": memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "read_seconds": middle - start,
        "compile_seconds": time.perf_counter() - middle,
    }


def said(folder, what):
    """Tells whoever waits what is being done."""
    (folder / "stage").write_text(what, encoding="utf-8")


def _end_with_parent() -> None:
    """Whoever asks holds the other end of the input, and that closes when it has gone, killed or not."""
    sys.stdin.buffer.read()
    os._exit(1)


def main(folder: Path) -> None:
    os.environ.update(QUIET)
    from companion.launch import pickling

    threading.Thread(target=_end_with_parent, daemon=True).start()
    said(folder, "reads the question")
    request = pickling.unpack((folder / "request").read_bytes())
    sys.path.extend(path for path in request["path"] if path not in sys.path)
    request |= pickling.unpack(request.pop("packed"))
    try:
        answer = compiled(request, folder)
    except Exception as error:  # whatever the model's code or the compiler says of it
        frames = [
            [frame.filename, frame.lineno, frame.name] for frame in traceback.extract_tb(error.__traceback__)
        ]
        answer = {"error": type(error).__name__, "message": str(error), "frames": frames}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
