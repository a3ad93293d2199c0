#!/bin/sh
# Trains on all GPUs of one machine, with a copy of the model on each. train.batch_size is the total over all GPUs.
#
#   launch/several_gpus.sh ponderlm2 --data.text books/ --train.batch_size 256 --out runs/books
#   GPUS=2 launch/several_gpus.sh ponderlm2 --out runs/two
#
# A test on CPUs: torchrun --nproc-per-node 2 -m pondera train ponderlm2 --out runs/try
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m pondera train "$@" --train.dtype bfloat16
