#!/bin/bash
# Wait until this machine's Ray has ended, as it does without its head, and end what it left behind
# (a log monitor, agents), unless another was started meanwhile. `ray down` reaches the head alone.
processes() { pgrep -u "$(id -u)" "$@"; }

tail --pid="$(processes -n raylet)" -f /dev/null
sleep 5
processes -f 'raylet|ray st(art|op)' > /dev/null || ray stop --force
