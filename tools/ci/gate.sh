#!/usr/bin/env bash
# A latency gate in any CI: runs `compress gate` and turns its verdict into the exit code of the job.
#
#   GATE_BASELINE=old.onnx GATE_CANDIDATE=new.onnx GATE_BUDGETS='latency<=1.05x' tools/ci/gate.sh
#
# From the environment:
#   GATE_BASELINE, GATE_CANDIDATE  models as `compress gate --help` says; the gate file's where they are empty
#   GATE_BUDGETS                   one a line, or parted by commas
#   GATE_FILE                      a gate file (YAML)
#   GATE_OUT                       folder for gate.json, junit.xml, summary.md and gate.png; compress-gate by default
#   GATE_STRICT                    true: an inconclusive gate fails the job; otherwise it is said and the job goes on
#   GATE_COMPRESS                  the command; compress by default
# Exit code: 0 pass (or inconclusive), 1 fail, 2 there is no verdict: the settings are wrong, or a model or a build is.
set -uo pipefail
out=${GATE_OUT:-compress-gate}
words=(--out "$out")
[ -n "${GATE_FILE:-}" ] && words+=(--gate "$GATE_FILE")
[ "${GATE_STRICT:-false}" = true ] && words+=(--strict)
while IFS= read -r budget; do
  budget=$(sed 's/^[[:space:]]*//; s/[[:space:]]*$//' <<<"$budget")
  [ -n "$budget" ] && words+=(--budget "$budget")
done < <(tr ',' '\n' <<<"${GATE_BUDGETS:-}")
# Behind --, a name that begins with a dash is no option. An empty baseline is the gate file's.
words+=(--)
[ -n "${GATE_BASELINE:-}${GATE_CANDIDATE:-}" ] && words+=("${GATE_BASELINE:-}")
[ -n "${GATE_CANDIDATE:-}" ] && words+=("$GATE_CANDIDATE")
"${GATE_COMPRESS:-compress}" gate "${words[@]}"
code=$?
case $code in
  0) verdict=pass ;;
  1) verdict=fail ;;
  3) verdict=inconclusive ;;
  *) verdict=error ;;
esac
if [ -n "${GITHUB_OUTPUT:-}" ]; then
  printf 'verdict=%s\nfolder=%s\n' "$verdict" "${out//[$'\r\n']/ }" >>"$GITHUB_OUTPUT"
fi
[ "$verdict" = inconclusive ] && exit 0
exit "$code"
