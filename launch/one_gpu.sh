#!/bin/sh
# Trains on one GPU. All arguments are passed to `pondera train`:
#
#   launch/one_gpu.sh ponderlm2 --data.text books/ --train.batch_size 64 --out runs/books
#
# If the memory is not enough, add --train.micro_batch_size 8: the same training in smaller micro-batches.
exec env CUDA_VISIBLE_DEVICES="${GPU:-0}" pondera train "$@" --train.dtype bfloat16
