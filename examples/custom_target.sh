#!/bin/sh
# A target of your own: what is built for a device, and how it is measured there.
#
# A target is a YAML file that extends one of `compress list targets`. This one is this machine, with another thread, a
# batch of four and few measurements; a board's would extend raspberry-pi-5 and say `transport: {host: pi.local}`, and the
# three commands would be the same. `doctor` says whether the device is there and idle, `export` builds for it and checks
# the outputs, `bench` measures two builds on it in turn and says why the smaller one is not faster, where it is not.
#
#     sh examples/custom_target.sh [FOLDER]
set -eu
here=$(dirname "$0")
folder=${1:-runs/examples/target}
mkdir -p "$folder"
cat >"$folder/mine.yaml" <<'YAML'
extends: this-machine
description: this machine, four samples a call
threads: 2
shapes: {batch: 4}
budget: 50            # milliseconds a call may take
measure: {processes: 2, min_seconds: 0.2, min_runs: 5}
YAML
PYTHONPATH=$here/.. python "$here/../tools/ci/models.py" "$folder"

compress doctor --target "$folder/mine.yaml"
for net in dense pruned; do
  compress export "$folder/$net.onnx" --target "$folder/mine.yaml" --out "$folder/$net"
done
compress bench "$folder/dense" "$folder/pruned" --target "$folder/mine.yaml" --out "$folder/measured"
