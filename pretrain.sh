#!/usr/bin/env bash
# Pretrain a model: make .venv if it is absent, prepare the data once, train on all GPUs (or on 2 CPU ranks).
#
#   ./pretrain.sh [demo|2b|5b|FILE.yaml] [train.py flags]
#
#   ./pretrain.sh                                    the demo: shipped corpus, a small model, a few minutes
#   NUM_GPUS=4 GPU_MEMORY=80 ./pretrain.sh 2b        rows a GPU and accumulation for GPUs of 32, 48 or 80 GB, 384 rows a step
#   ./pretrain.sh my.yaml --learning_rate 2e-4       any configuration; flags win over it (python train.py --help lists them)
#
#   NUM_GPUS           ranks on this node (default: all GPUs; without a GPU 2 ranks on the CPU)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT      several nodes: start this on each with its NODE_RANK
#   OUTPUT_DIR, CACHE_DIR, MAX_STEPS                 as --output_dir, --cache_dir, --max_steps
#   ACCELERATE_CONFIG  how the model is divided among the ranks: a file of configs/accelerate/, as fsdp2.yaml
#   DATASET_NUM_PROC, DATASET_BATCH_SIZE, DATASET_WRITER_BATCH_SIZE     how data is prepared; source optimize_env.sh shows the values
#   MOAI_TORCH_INDEX, PYTHON                         how .venv is made (scripts/bootstrap.sh --help)
#
# Paths in configurations and flags are relative to the folder of this script. A stopped run goes on with ./pretrain_cont.sh NAME --resume.
set -eu

. "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
launch pretrain "$@"
