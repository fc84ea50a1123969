#!/bin/sh
# A gate as a CI job runs it: the model of this change against the one before, measured here, in turn, in fresh processes.
#
# Two small ONNX networks stand for your two builds; the second has half of the channels of the first. The gate passes
# where the budgets hold, and its exit code is the job's: 0 pass, 1 fail, 3 inconclusive (the machine is too noisy to
# tell), 2 there is no verdict. `gate/` holds junit.xml, summary.md, the raw samples and a plot. The second gate asks for
# what cannot be, and fails: that is seen here, too.
#
#     sh examples/gate_in_ci.sh [FOLDER]
set -eu
here=$(dirname "$0")
folder=${1:-runs/examples/gate}
mkdir -p "$folder"
PYTHONPATH=$here/.. python "$here/../tools/ci/models.py" "$folder"

compress gate "$folder/dense.onnx" "$folder/pruned.onnx" --budget 'size<=0.7x' --budget 'latency<=1.2x' --out "$folder/gate"

code=0
compress gate "$folder/dense.onnx" "$folder/pruned.onnx" --budget 'size<=0.1x' || code=$?
test "$code" = 1
echo "the second gate failed, as it must"
