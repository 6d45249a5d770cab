"""Builds an image's steps in a clean Debian root and starts its service there, without a Docker engine.

    sudo python -m scripts.image_in_root --engines engines

For machines that have no Docker engine. Every instruction of the Dockerfile that the target needs is carried
out in order: `FROM debian:…` is a fresh debootstrap root, RUN runs inside it, COPY obeys .dockerignore. Then
the image starts as its own user on a read-only root, has to pass its own HEALTHCHECK, answer `/v1/models`
and `/metrics`, and end with code 0 on SIGTERM. Prints the image's size.

Needs root (chroot, mount), debootstrap, and the network that apt and pip use here. It is no sandbox: use it
on this project's Dockerfile only.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from scripts.dockerfile import Stage, command, expand, flags, pairs, read_stages

REPOSITORY = Path(__file__).resolve().parent.parent
#: Steps see copies of these, read-only: a package's install script must not change this machine.
RESOLVER = Path("/etc/resolv.conf")
DEVICES = ("null", "zero", "full", "random", "urandom")


@dataclass
class Image:
    """A root folder with what its instructions declared."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    entrypoint: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def copy(self, root: Path) -> Image:
        clean(root)
        subprocess.run(["cp", "-a", str(self.root), str(root)], check=True)
        return Image(
            root,
            dict(self.environment),
            {},
            self.workdir,
            self.user,
            self.shell,
            self.entrypoint,
            self.healthcheck,
        )


def clean(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def debian_root(work: Path, suite: str) -> Image:
    """What `debian:SUITE-slim` holds, made by debootstrap once and kept."""
    root = work / f"debian-{suite}"
    if not (root / "finished").exists():
        clean(root)
        print(f"debootstrap {suite} …", flush=True)
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", suite, str(root)], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"debootstrap failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        # what the slim images leave out, too
        for left_out in (
            "var/cache/apt/archives",
            "var/lib/apt/lists",
            "usr/share/doc",
            "usr/share/man",
            "usr/share/locale",
        ):
            clean(root / left_out)
            (root / left_out).mkdir()
        # and their rule for apt, without which every package stays beside what it installed
        rule = 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };\n'
        (root / "etc/apt/apt.conf.d/docker-clean").write_text(
            rule + 'Dir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n'
        )
        (root / "finished").touch()
    return Image(root, {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})


@dataclass(frozen=True)
class Bind:
    """A file or folder of this machine as the root sees it."""

    outside: Path
    inside: str
    writable: bool = False


def enter(root: Path, read_only: bool, binds: list[Bind]) -> list[str]:
    """The command before `chroot`: mounts and processes of its own, the root read-only if asked."""
    steps = ["mount --make-rprivate /", f"mount --bind {root} {root}"]
    for bind in binds:
        target = f"{root}{bind.inside}"
        steps.append(f"mount --bind {bind.outside} {target}")
        if not bind.writable:
            steps.append(f"mount -o remount,ro,bind {target}")
    if read_only:
        steps.append(f"mount -o remount,ro,bind {root}")
        steps += [f"mount -t tmpfs -o mode=1777 none {root}{p}" for p in ("/tmp", "/cache")]
    steps += [f"mount -t proc none {root}/proc", f"mount -t tmpfs -o mode=755 none {root}/dev"]
    for device in DEVICES:
        node = f"{root}/dev/{device}"
        steps += [f"touch {node}", f"mount --bind /dev/{device} {node}"]
    steps += [f"mkdir {root}/dev/shm", f"mount -t tmpfs -o mode=1777 none {root}/dev/shm", 'exec "$@"']
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", "; ".join(steps), "sh"]


def place(root: Path, inside: str, folder: bool) -> None:
    """Makes the spot that a bind covers."""
    spot = root / inside.lstrip("/")
    if folder:
        spot.mkdir(parents=True, exist_ok=True)
    elif not spot.exists():
        spot.parent.mkdir(parents=True, exist_ok=True)
        spot.touch()


def network_binds(root: Path, work: Path) -> tuple[list[Bind], dict[str, str]]:
    """Names, certificates and pip's settings as this machine has them: copies, read-only, gone after the step."""
    copies = work / "from-host"
    copies.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    certificates = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    wanted = [(RESOLVER, "/etc/resolv.conf", ""), (Path("/etc/pip.conf"), "/run/pip.conf", "PIP_CONFIG_FILE")]
    if certificates:
        wanted.append((Path(certificates), "/run/certificates.crt", "PIP_CERT"))
    binds = []
    for source, inside, variable in wanted:
        if source.is_file():
            copy = copies / source.name
            shutil.copyfile(source, copy)
            place(root, inside, folder=False)
            binds.append(Bind(copy, inside))
            if variable:
                environment[variable] = inside
    return binds, environment


def run_step(image: Image, text: str, work: Path) -> None:
    given, script = flags(text)
    binds, environment = network_binds(image.root, work)
    if "type=cache" in given.get("mount", ""):
        inside = given["mount"].split("target=")[1].split(",")[0]
        place(image.root, inside, folder=True)
        cache = work / "pip-cache"
        cache.mkdir(parents=True, exist_ok=True)
        binds.append(Bind(cache, inside, writable=True))
    environment = image.environment | image.arguments | environment | {"HOME": "/root"}
    form = command(script)
    words = form if isinstance(form, list) else [*image.shell, form]
    go = f'cd {image.workdir} && exec "$@"'
    full = [*enter(image.root, False, binds), "chroot", str(image.root), "/bin/sh", "-ec", go, "sh", *words]
    done = subprocess.run(full, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for bind in binds:
        spot = image.root / bind.inside.lstrip("/")
        if bind.inside.startswith("/run/"):
            spot.unlink()
    if done.returncode:
        sys.exit(f"RUN {script[:100]} … ended with {done.returncode}:\n{done.stdout[-4000:]}")


def ignored(relative: str, patterns: list[str]) -> bool:
    """.dockerignore: the last matching pattern decides; a pattern matches a folder's contents too."""
    result = False
    parents = ["/".join(relative.split("/")[: n + 1]) for n in range(relative.count("/") + 1)]
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        names = {bare, bare.removeprefix("**/")}
        ends = [relative, relative.rsplit("/", 1)[-1]] if bare.startswith("**/") else []
        hit = any(
            fnmatch.fnmatch(p, n) for p in parents + ends for n in names if "/" in n or "/" not in p or ends
        )
        result = (not pattern.startswith("!")) if hit else result
    return result


def copy_step(image: Image, text: str, images: dict[str, Image]) -> None:
    given, rest = flags(text)
    *sources, target = rest.split()
    destination = image.root / target.lstrip("/")
    patterns = [p for p in (REPOSITORY / ".dockerignore").read_text().splitlines() if p and p[0] != "#"]
    for source in sources:
        if "from" in given:
            clean(destination)
            subprocess.run(
                ["cp", "-a", str(images[given["from"]].root / source.lstrip("/")), str(destination)],
                check=True,
            )
            continue
        origin = REPOSITORY / source
        files = [origin] if origin.is_file() else [p for p in origin.rglob("*") if p.is_file()]
        kept = [p for p in files if not ignored(str(p.relative_to(REPOSITORY)), patterns)]
        if not kept:
            sys.exit(f"COPY {source}: nothing is left of it after .dockerignore")
        for path in kept:
            into = destination / path.name if origin.is_file() else destination / path.relative_to(origin)
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, into)


def build(
    stage: Stage, stages: dict[str, Stage], outer: dict[str, str], work: Path, images: dict[str, Image]
) -> Image:
    """The stage's image, after those that it stands on or copies from."""
    if stage.name in images:
        return images[stage.name]
    if stage.base in stages:
        below = build(stages[stage.base], stages, outer, work, images)
    elif stage.base.startswith("debian:"):
        below = debian_root(work, stage.base.split(":")[1].split("@")[0].removesuffix("-slim"))
    else:
        sys.exit(
            f"stage {stage.name} stands on {stage.base}, which is no Debian image; only FLAVOUR=cpu runs here"
        )
    for instruction in stage.instructions:
        source = flags(instruction.text)[0].get("from")
        if source:
            build(stages[source], stages, outer, work, images)
    if not stage.instructions:
        images[stage.name] = below
        return below
    image = images[stage.name] = below.copy(work / f"stage-{stage.name}")
    for instruction in stage.instructions:
        name, text = instruction.name, instruction.text
        if name not in {"RUN", "HEALTHCHECK"}:
            text = expand(text, image.environment | image.arguments)
        print(f"  {stage.name}: {name} {text[:90]}", flush=True)
        if name == "ARG":
            key, _, default = text.partition("=")
            image.arguments[key] = outer.get(key, default)
        elif name == "ENV":
            image.environment |= pairs(text)
        elif name == "SHELL":
            image.shell = list(command(text))
        elif name == "RUN":
            run_step(image, text, work)
        elif name == "COPY":
            copy_step(image, text, images)
        elif name == "WORKDIR":
            image.workdir = text
            (image.root / text.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            image.user = text
        elif name == "ENTRYPOINT":
            image.entrypoint = list(command(text))
        elif name == "HEALTHCHECK":
            _, probe = flags(text + " ")
            image.healthcheck = (
                [] if probe.strip() == "NONE" else list(command(probe.strip().removeprefix("CMD ")))
            )
        elif name not in {"LABEL", "EXPOSE", "STOPSIGNAL", "CMD"}:
            sys.exit(f"Dockerfile line {instruction.line}: {name} is not understood here")
    return image


def inside(
    image: Image, words: list[str], engines: Path | None, extra: dict[str, str]
) -> subprocess.Popen[str]:
    """Starts `words` as the image's user on its read-only root."""
    binds = [Bind(engines.resolve(), "/engines")] if engines else []
    uid, gid = image.user.split(":")
    as_user = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
    chroot = [
        shutil.which("chroot") or "chroot",
        str(image.root),
        "/bin/sh",
        "-ec",
        f'cd {image.workdir} && exec "$@"',
        "sh",
    ]
    full = [*enter(image.root, True, binds), *chroot, *as_user, *words]
    return subprocess.Popen(
        full, env=image.environment | extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check_service(image: Image, engines: Path, port: int) -> None:
    """Start, health, answers, read-only root, no tools, SIGTERM."""
    extra = {"VERNIER_PORT": str(port), "VERNIER_METRICS_PORT": str(port + 1), "VERNIER_HOST": "127.0.0.1"}
    started = time.monotonic()
    service = inside(image, image.entrypoint, engines, extra)
    try:
        while True:
            probe = inside(image, image.healthcheck, engines, extra)
            report, _ = probe.communicate(timeout=30)
            if probe.returncode == 0:
                break
            if service.poll() is not None or time.monotonic() - started > 90:
                service.kill()
                sys.exit(f"not healthy:\n{report[-1500:]}\n{service.communicate()[0][-4000:]}")
        print(f"healthy after {time.monotonic() - started:.1f} s, by its own HEALTHCHECK")
        base = f"http://127.0.0.1:{port}"
        models = json.load(urllib.request.urlopen(f"{base}/v1/models", timeout=5))["models"]
        print("serves", ", ".join(f"{m['name']} {m['version']} ({m['precision']})" for m in models))
        text = urllib.request.urlopen(f"http://127.0.0.1:{port + 1}/metrics", timeout=5).read().decode()
        if "vernier_ready 1.0" not in text:
            sys.exit("/metrics does not say vernier_ready 1.0")
        expect_failure(image, ["python", "-c", "open('/srv/vernier/app/x', 'w')"], "the root can be written")
        expect_failure(
            image, ["python", "-c", "open('/engines/x', 'w')"], "/engines can be written by the service"
        )
        for tool in ("gcc", "g++", "make", "pip", "pip3"):
            expect_failure(image, ["sh", "-c", f"command -v {tool}"], f"{tool} is in the image")
        children = subprocess.run(
            ["pgrep", "-P", str(service.pid)], capture_output=True, text=True, check=True
        )
        os.kill(int(children.stdout.split()[0]), signal.SIGTERM)
        output, _ = service.communicate(timeout=40)
    finally:
        service.kill()
    if service.returncode != 0:
        sys.exit(f"ended with {service.returncode} on SIGTERM:\n{output[-3000:]}")
    print("ended with 0 on SIGTERM")


def expect_failure(image: Image, words: list[str], complaint: str) -> None:
    process = inside(image, words, None, {})
    process.communicate(timeout=30)
    if process.returncode == 0:
        sys.exit(complaint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="service")
    parser.add_argument(
        "--engines", type=Path, help="engine packages to serve; without it nothing is started"
    )
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "image")
    parser.add_argument("--port", type=int, default=18000)
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("this needs root: it mounts and changes roots")
    if not shutil.which("debootstrap"):
        sys.exit("install debootstrap (apt-get install debootstrap)")
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    stages, outer = read_stages(REPOSITORY / "Dockerfile", {"FLAVOUR": "cpu"})
    image = build(stages[options.target], stages, outer, work, {})
    size = int(
        subprocess.run(
            ["du", "-sm", "--apparent-size", str(image.root)], capture_output=True, text=True
        ).stdout.split()[0]
    )
    ours = [
        int(
            subprocess.run(
                ["du", "-sm", "--apparent-size", str(image.root / p)], capture_output=True, text=True
            ).stdout.split()[0]
        )
        for p in ("opt/vernier", "srv/vernier")
    ]
    print(f"{options.target}: {size} MB unpacked ({ours[0]} MB Python packages, {ours[1]} MB Vernier)")
    if options.engines:
        check_service(image, options.engines, options.port)


if __name__ == "__main__":
    main()
