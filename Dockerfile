# Vernier's images. `docker build --build-arg FLAVOUR=gpu --target service .`
#
#   FLAVOUR   cpu    any CPU, ONNX Runtime (the default)
#             gpu    NVIDIA GPU, on NVIDIA's TensorRT image; builds missing plans itself
#             lean   NVIDIA GPU, TensorRT's lean runtime; runs version-compatible plans and builds none
#   target    service   the server
#             builder   build_engine.py (cpu and gpu): the gpu one measures on, and builds plans for, its GPU
#
# Every image runs as user 10001, needs no writable root file system (only /tmp and /cache), and has no
# compiler and no pip. scripts/pin_images.sh replaces the tags below by the digests that they have today.

ARG FLAVOUR=cpu
ARG DEBIAN_IMAGE=debian:bookworm-slim
ARG TENSORRT_IMAGE=nvcr.io/nvidia/tensorrt:26.07-py3
ARG CUDA_DEVEL_IMAGE=nvcr.io/nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG CUDA_BASE_IMAGE=nvcr.io/nvidia/cuda:13.0.2-base-ubuntu24.04

# --- what a CPU needs -----------------------------------------------------------------------------------

FROM ${DEBIAN_IMAGE} AS python-cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
# pip stays in an environment of its own; what it installs goes to another, which the images take over
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/vernier
COPY requirements/base.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip --python /opt/vernier/bin/python install \
      --require-hashes --no-deps --only-binary=:all: -r /requirements/base.txt

FROM python-cpu AS python-builder-cpu
COPY requirements/build.txt /requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip --python /opt/vernier/bin/python install \
      --require-hashes --no-deps --only-binary=:all: -r /requirements/build.txt

# --- what a GPU needs: PyCUDA is compiled here, with CUDA's headers, and only the wheel leaves ------------

FROM ${TENSORRT_IMAGE} AS python-gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY requirements/pycuda-build.txt requirements/cuda.txt /requirements/
# without cuRAND the module needs nothing but the driver's libcuda, which the container runtime mounts
RUN python3 -m venv /opt/pip \
 && /opt/pip/bin/pip install --no-cache-dir --require-hashes -r /requirements/pycuda-build.txt \
 && echo 'CUDA_ENABLE_CURAND = False' > /root/.aksetup-defaults.py \
 && PATH=/usr/local/cuda/bin:$PATH /opt/pip/bin/pip wheel --no-cache-dir --require-hashes --no-deps \
      --no-build-isolation --wheel-dir /wheels -r /requirements/cuda.txt
# TensorRT's own bindings belong to the image's Python, hence the system's packages; ours come first
RUN python3 -m venv --without-pip --system-site-packages /opt/vernier \
 && /opt/pip/bin/pip --python /opt/vernier/bin/python install --no-cache-dir --no-index --no-deps \
      --ignore-installed /wheels/*.whl

FROM python-gpu AS python-builder-gpu
COPY requirements/build.txt /requirements/
RUN /opt/pip/bin/pip --python /opt/vernier/bin/python install --no-cache-dir --ignore-installed \
      --require-hashes --no-deps --only-binary=:all: -r /requirements/build.txt

FROM ${CUDA_DEVEL_IMAGE} AS python-lean
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY requirements/pycuda-build.txt requirements/tensorrt-lean.txt /requirements/
RUN python3 -m venv /opt/pip \
 && /opt/pip/bin/pip install --no-cache-dir --require-hashes -r /requirements/pycuda-build.txt \
 && echo 'CUDA_ENABLE_CURAND = False' > /root/.aksetup-defaults.py \
 && PATH=/usr/local/cuda/bin:$PATH /opt/pip/bin/pip wheel --no-cache-dir --require-hashes --no-deps \
      --no-build-isolation --wheel-dir /wheels -r /requirements/tensorrt-lean.txt
RUN python3 -m venv --without-pip /opt/vernier \
 && /opt/pip/bin/pip --python /opt/vernier/bin/python install --no-cache-dir --no-index --no-deps /wheels/*.whl

# the lean runtime builds nothing, so it has no builder; the name has to exist
FROM python-lean AS python-builder-lean

# --- the systems that the images stand on -----------------------------------------------------------------

FROM ${DEBIAN_IMAGE} AS system-cpu
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/*
ENV VERNIER_RUNTIME=onnxruntime

FROM ${TENSORRT_IMAGE} AS system-gpu
# NVIDIA's image is a development image; its compilers would be of use to an intruder only
RUN rm -rf /usr/local/cuda/bin/nvcc* /usr/local/cuda/bin/ptxas /usr/local/cuda/nvvm \
      /usr/bin/gcc* /usr/bin/g++* /usr/bin/cc /usr/bin/c++ /usr/bin/cpp* /usr/bin/*-linux-gnu-gcc* \
      /usr/bin/*-linux-gnu-g++* /usr/bin/make /usr/bin/cmake /usr/local/bin/cmake /usr/local/bin/pip* /usr/bin/pip*
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VERNIER_RUNTIME=tensorrt

FROM ${CUDA_BASE_IMAGE} AS system-lean
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VERNIER_RUNTIME=tensorrt-lean

# --- the images -------------------------------------------------------------------------------------------

# hadolint ignore=DL3006
FROM python-${FLAVOUR} AS python
# hadolint ignore=DL3006
FROM python-builder-${FLAVOUR} AS python-builder

# hadolint ignore=DL3006
FROM system-${FLAVOUR} AS service
ARG FLAVOUR
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="vernier-${FLAVOUR}" \
      org.opencontainers.image.description="Inference at the lowest precision that keeps the model's accuracy" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /cache --shell /usr/sbin/nologin vernier \
 && install -d -o vernier -g vernier /cache /engines
COPY --from=python /opt/vernier /opt/vernier
COPY LICENSE /srv/vernier/
COPY app /srv/vernier/app
ENV PATH=/opt/vernier/bin:$PATH \
    PYTHONPATH=/srv/vernier/app \
    HOME=/cache \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    VERNIER_HOST=0.0.0.0 \
    VERNIER_ENGINES_DIR=/engines \
    VERNIER_METRICS_PORT=8002 \
    VERNIER_CACHE_DIR=/cache
WORKDIR /srv/vernier
# without it every start would compile every module: the root is read-only
RUN python -m compileall -q /opt/vernier/lib /srv/vernier/app
USER 10001:10001
# predictions; gRPC, where it is set; health and metrics, which need no key and no certificate
EXPOSE 8000 8001 8002
# to the supervisor, which is the first process: the entry point is no shell
STOPSIGNAL SIGTERM
# the first start on a new kind of GPU may build plans before it is ready
HEALTHCHECK --interval=10s --timeout=3s --start-period=600s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['VERNIER_METRICS_PORT'] + '/v2/health/ready', timeout=2)"]
ENTRYPOINT ["python", "-m", "vernier"]

FROM service AS builder
COPY --from=python-builder /opt/vernier /opt/vernier
COPY build_engine.py /srv/vernier/
HEALTHCHECK NONE
ENTRYPOINT ["python", "build_engine.py"]
CMD ["--help"]
