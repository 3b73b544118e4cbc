#!/usr/bin/env bash
# ssp_jax.main, except that a run which SIGTERM made save and stop ends with 143, not 0: whoever
# started the container must see that the run is not done.
set -uo pipefail

terminated="" child="" code=0
stop() {
  terminated=yes
  if [[ -n $child ]]; then kill -TERM "$child"; fi
}
trap stop TERM # before the run starts, so that no signal is lost
python -m ssp_jax.main "$@" &
child=$!
if [[ -n $terminated ]]; then stop; fi
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child" && code=0 || code=$?; done
if [[ -n $terminated && $code == 0 ]]; then code=143; fi
exit "$code"
