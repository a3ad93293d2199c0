#!/bin/sh
# One GPU. What follows the script's name goes to `pondera train`:
#
#   launch/one_gpu.sh ponderlm2 --data.text books/ --train.batch_size 64 --out runs/books
#
# Out of memory? Add --train.micro_batch_size 8: the same training in smaller pieces.
exec env CUDA_VISIBLE_DEVICES="${GPU:-0}" pondera train "$@" --train.dtype bfloat16
