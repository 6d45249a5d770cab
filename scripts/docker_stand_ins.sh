#!/usr/bin/env bash
# Runs a command with a Docker engine of its own, on a Debian machine that reaches Debian's packages and no container
# registry. As root; three minutes the first time, seconds later.
#
#   scripts/docker_stand_ins.sh docker compose --profile cpu up --build
#
# The engine has its own socket and its own images under VERNIER_DOCKER_DIR, so that an engine of the machine never sees
# the stand-ins, and ends with the command. Stand-ins: Debian by debootstrap; Prometheus and Alertmanager from Debian's
# packages; Grafana, which Debian does not have, by something that only listens.
#
# The exit code is the command's; 69 when this machine cannot run an engine. The last line then says why.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${VERNIER_DOCKER_DIR:-/var/cache/vernier-docker}
unavailable() { echo "containers were not tested: $1" >&2; exit 69; }
[ $# -gt 0 ] || { echo "usage: scripts/docker_stand_ins.sh COMMAND..." >&2; exit 2; }
[ "$(id -u)" = 0 ] || unavailable "a Docker engine needs root"
command -v apt-get >/dev/null || unavailable "this is no Debian machine"
mkdir -p "$work/config/cli-plugins"
exec 9>"$work/lock"
flock -w 900 9 || unavailable "another engine holds $work"

export DOCKER_HOST=unix://$work/docker.sock DOCKER_CONFIG=$work/config DOCKER_BUILDKIT=1 DEBIAN_FRONTEND=noninteractive

# --- programs ---------------------------------------------------------------------------------------------

missing=()
command -v dockerd >/dev/null || missing+=(docker.io)
command -v debootstrap >/dev/null || missing+=(debootstrap)
command -v iptables >/dev/null || missing+=(iptables)
if [ ${#missing[@]} -gt 0 ]; then
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$work/apt.log" 2>&1 9>&- ||
    unavailable "apt-get cannot install ${missing[*]}: $(tail -n 1 "$work/apt.log")"
fi
mirror=$(awk '/^URIs:/ {print $2; exit}' /etc/apt/sources.list.d/*.sources 2>/dev/null ||
  awk '$1 == "deb" {print $2; exit}' /etc/apt/sources.list)

# --- the engine -------------------------------------------------------------------------------------------

stop() {  # PID
  if docker info >/dev/null 2>&1; then
    docker ps -aq | xargs -r docker rm -fv >/dev/null 2>&1 || true
  fi
  kill "$1" 2>/dev/null || true
  for _ in $(seq 60); do kill -0 "$1" 2>/dev/null || return 0; sleep 0.5; done
  kill -9 "$1" 2>/dev/null || true
}
# of a run that was killed
old=$(cat "$work/docker.pid" 2>/dev/null) || old=
[ "$(cat "/proc/${old:-none}/comm" 2>/dev/null)" != dockerd ] || stop "$old"
trap '[ -z "${engine:-}" ] || stop "$engine"' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

rm -f "$work/docker.pid"
setsid dockerd --host "$DOCKER_HOST" --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/docker.pid" \
  >"$work/dockerd.log" 2>&1 9>&- &
engine=$!
for _ in $(seq 120); do
  docker info >/dev/null 2>&1 && break
  kill -0 "$engine" 2>/dev/null || break
  sleep 0.5
done
docker info >/dev/null 2>&1 || unavailable "dockerd does not start: $(tail -n 1 "$work/dockerd.log")"
# what a run that was killed has left
docker ps -aq | xargs -r docker rm -fv >/dev/null
docker volume ls -q | xargs -r docker volume rm -f >/dev/null
docker image prune --force >/dev/null
docker builder prune --force --keep-storage 8GB >/dev/null

# compose 2 and buildx are newer than Debian 12; those of Debian 13 run there too
plugins() {
  mkdir -p lists/partial
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >trixie.list
  local apt=(apt-get -oDir::Etc::SourceList="$PWD/trixie.list" -oDir::Etc::SourceParts=/dev/null
    -oDir::State::Lists="$PWD/lists" -oAPT::Sandbox::User=root)
  "${apt[@]}" update -qq
  "${apt[@]}" download -qq docker-compose docker-buildx
  for package in docker-compose_*.deb docker-buildx_*.deb; do dpkg -x "$package" unpacked; done
  cp unpacked/usr/libexec/docker/cli-plugins/* "$work/config/cli-plugins/"
}
if ! docker compose version >/dev/null 2>&1 || ! docker buildx version >/dev/null 2>&1; then
  (cd "$work" && plugins) >"$work/plugins.log" 2>&1 9>&- ||
    unavailable "compose and buildx cannot be had: $(tail -n 1 "$work/plugins.log")"
fi

# --- the images -------------------------------------------------------------------------------------------

has() { docker image inspect "$1" >/dev/null 2>&1; }

debian=$(sed -n 's/^ARG DEBIAN_IMAGE=//p' Dockerfile)
if ! has "$debian"; then
  release=${debian#*:}
  if [ ! -e "$work/root.ready" ]; then
    rm -rf "$work/root"
    debootstrap --variant=minbase --include=ca-certificates "${release%-slim}" "$work/root" "$mirror" \
      >"$work/debootstrap.log" 2>&1 || unavailable "debootstrap fails: $(tail -n 1 "$work/debootstrap.log")"
    # as this machine reaches its package indexes, its certificates among it
    cp /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/"
    if ls /etc/apt/sources.list.d/*.sources >/dev/null 2>&1; then
      cp /etc/apt/sources.list.d/*.sources "$work/root/etc/apt/sources.list.d/"
      rm -f "$work/root/etc/apt/sources.list"
    fi
    [ ! -f /etc/pip.conf ] || sed '/file:/d; /constraint/d; /find-links/d' /etc/pip.conf >"$work/root/etc/pip.conf"
    touch "$work/root.ready"
  fi
  certificates=/etc/ssl/certs/ca-certificates.crt
  tar -C "$work/root" -c . | docker import -c 'CMD ["bash"]' \
    -c "ENV SSL_CERT_FILE=$certificates PIP_CERT=$certificates" - "$debian" >/dev/null
fi

stand_in() {  # IMAGE PACKAGES DATA SIGNAL PROGRAM...: Debian's program under the name that compose asks for
  local image=$1 packages=$2 data=$3 signal=$4; shift 4
  docker build -q -t "$image" - >/dev/null <<DOCKERFILE
FROM $debian
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages && rm -rf /var/lib/apt/lists/* \
 && mkdir -p $data && chown nobody:nogroup $data
USER nobody
WORKDIR $data
VOLUME $data
STOPSIGNAL $signal
ENTRYPOINT [$(printf '"%s", ' "$@" | sed 's/, $//')]
DOCKERFILE
}
tag() { sed -n "s/^$1=//p" .env; }
stand_in "prom/prometheus:$(tag PROMETHEUS_TAG)" "prometheus wget" /prometheus SIGTERM /usr/bin/prometheus
stand_in "prom/alertmanager:$(tag ALERTMANAGER_TAG)" prometheus-alertmanager /alertmanager SIGTERM \
  /usr/bin/prometheus-alertmanager
stand_in "grafana/grafana:$(tag GRAFANA_TAG)" python3 /var/lib/grafana SIGINT \
  python3 -m http.server 3000 --directory /var/lib/grafana-dashboards

"$@" 9>&- </dev/null &
command=$!
trap 'kill -TERM $command 2>/dev/null; wait $command; exit 143' TERM
trap 'kill -INT $command 2>/dev/null; wait $command; exit 130' INT
wait "$command"
