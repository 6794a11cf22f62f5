#!/usr/bin/env bash
# Continue: old weights, new optimizer, next data; or, with --resume, the same run from its newest complete checkpoint.
#
#   ./pretrain_cont.sh [demo|2b|5b|FILE.yaml] [--resume] [train.py flags]
#
#   ./pretrain_cont.sh                               the demo's final model, trained on data/demo_next
#   ./pretrain_cont.sh 2b --dataset data/new         outputs/moai-2b/final_model on other data, into outputs/moai-2b_cont
#   ./pretrain_cont.sh 2b --resume                   the 2b run itself, stopped or killed before its end
#
# What is continued is the final_model of the named configuration; --pretrained_model DIR names another. NAME_cont.yaml beside the
# configuration is used where it exists, otherwise the configuration itself with --dataset. The variables are those of ./pretrain.sh;
# OUTPUT_DIR is the place of the run that starts now. Paths are relative to the folder of this script.
set -eu

. "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"
launch continue "$@"
