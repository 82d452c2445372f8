"""The same training on clusters of others: scripts for Slurm and for Ray Train, to be copied and changed."""

SLURM = """#!/bin/bash
#SBATCH --job-name=multi_machine
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cores}
#SBATCH --time={hours}:00:00
#SBATCH --requeue                      # started again when a node dies; it goes on from the last checkpoint

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / {gpus}))
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun --kill-on-bad-exit=0 torchrun \\
    --nnodes={least}:{nodes} --nproc-per-node={gpus} --max-restarts=10 \\
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:29500" \\
    -m companion.multi_machine {arguments}
"""

RAY = """from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train_loop(config):
    import torch.distributed as dist

    from companion import data, multi_machine

    # Ray has made the process group: plain torch.distributed from here on.
    recipe = multi_machine.Recipe(**config)
    trained = multi_machine.train(data.load(recipe.dataset, recipe.data_dir, recipe.seed), recipe)
    if dist.get_rank() == 0:
        print(trained.fingerprint, trained.losses[-1])


TorchTrainer(
    train_loop,
    train_loop_config={config!r},
    scaling_config=ScalingConfig(num_workers={workers}, use_gpu={use_gpu}),
    run_config=RunConfig(failure_config=FailureConfig(max_failures=10)),
).fit()
"""


def slurm(
    arguments: str, nodes: int = 2, gpus: int = 8, least: int = 1, cores: int = 64, hours: int = 4
) -> str:
    """A script for `sbatch`; `arguments` are those of `python -m companion.multi_machine`, with a folder that
    all nodes see. Raises ValueError for numbers that do not fit.
    """
    if not 1 <= least <= nodes or gpus < 1 or cores < gpus or hours < 1:
        raise ValueError(
            f"nodes={nodes}, least={least}, gpus={gpus}, cores={cores}, hours={hours} do not fit"
        )
    return SLURM.format(**locals())


def ray(config: dict[str, object], workers: int = 2, use_gpu: bool = True) -> str:
    """A program for a Ray cluster; `config` are the settings of a `multi_machine.Recipe`."""
    if workers < 1:
        raise ValueError(f"workers={workers} must be 1 or more")
    return RAY.format(config=config, workers=workers, use_gpu=use_gpu)
