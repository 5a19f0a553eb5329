#!/bin/bash
# Copies packed shards to the disk of every node of a job, once a node, and prints where they are.
#
#   SOURCE=$(examples/slurm/stage.sh /shared/packed /local/scratch)      # inside a job, before srun
#
# A parallel file system serves a few large files well and a million small ones badly: pack them first, with
# simclr-scale prepare --data.source FOLDER --output /shared/packed
set -euo pipefail

FROM=${1:?the folder that simclr-scale prepare has written}
TO=${2:?a folder on the disk of a node}/$(basename "$FROM")

# A file gets its name when it is whole, so that a job that was killed while copying goes on with the next one.
srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -c '
    cd "$1" && find . -type f | while read -r file; do
        [[ -e $2/$file ]] && continue
        mkdir -p "$(dirname "$2/$file")" && cp "$file" "$2/$file.part" && mv "$2/$file.part" "$2/$file" || exit 1
    done' stage "$FROM" "$TO" >&2
echo "$TO"
