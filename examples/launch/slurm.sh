#!/bin/bash
# A Slurm job that goes on by itself. 120 s before its time is up it is told to stop: the run takes a snapshot, ends with
# exit code 4, and the job is put back into the queue, until the run is complete. From the root of a clone:
#
#     sbatch examples/launch/slurm.sh examples/llama.toml
#
# Slurm starts one process for each GPU and hands on their exit code, which accelerate's launcher does not. They are
# sharded by FSDP2, as in fsdp2.yaml; without the lines of FSDP they are DDP's.
#
#SBATCH --job-name=rope-probe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

config=${1:?give the configuration of a run: sbatch examples/launch/slurm.sh CONFIG.toml}
stopped=4 # the exit code of a run that took a snapshot because it was asked to stop

export ACCELERATE_USE_FSDP=true
export FSDP_VERSION=2
export FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
export FSDP_RESHARD_AFTER_FORWARD=true
export FSDP_CPU_RAM_EFFICIENT_LOADING=false
export FSDP_STATE_DICT_TYPE=FULL_STATE_DICT

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

process='
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec python -m rope_probe distill "$0" --resume
'
srun --kill-on-bad-exit=0 bash -c "$process" "$config" & # all of them end by themselves, each with its snapshot's part
step=$!

# The signal reaches this shell alone (B:); scancel hands it to the processes, and not to this shell.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM

while wait "$step"; code=$?; [ "$code" -eq 143 ]; do :; done # 143: the signal cut the wait short

if [ "$code" -eq "$stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
