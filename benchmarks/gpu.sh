#!/usr/bin/env bash
# What only a GPU can tell, in 25 minutes: `benchmarks/gpu.sh` does usual, runs, stacked and step in this order, a file each;
# `benchmarks/gpu.sh runs step` only these. Stopped, it goes on where it was: figures that are in benchmarks/results/gpu
# are not measured again. With $OUT set the files, those from before too, end up there: copy them back into
# benchmarks/results/gpu before the next session.
set -u
cd "$(dirname "$0")/.."
before=benchmarks/results/gpu
out=${OUT:-$before}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
if [ "$out" != "$before" ] && [ -d "$before" ]; then cp "$before"/*.csv "$out"; fi
declare -A minutes=([usual]=8 [runs]=7 [stacked]=5 [step]=2) # no case begins after so many; one takes about two
failed=0
[ $# -gt 0 ] || set -- usual runs stacked step
for name in "$@"; do
  "$python" benchmarks/run.py "$name" --device cuda --minutes "${minutes[$name]}" --csv "$out/$name.csv" || failed=1
done
exit $failed
