# The worker alone: no tests, no examples, no model.
#
#   docker build -t darkroom:cuda .                # the last target, with the CUDA wheels of torch that Linux gets
#   docker build -t darkroom:cpu --target cpu .
#   docker build -t darkroom:demo --target demo .  # the CPU's, with the demo's model and jobs
#
# Weights lie on the volume /models and downloaded adapters on /cache; neither is part of the image.

FROM debian:trixie-slim AS base
ENV LANG=C.UTF-8 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1
# Versions are Debian stable's: its security updates are wanted at every build, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates fonts-dejavu-core fonts-nanum fonts-vlgothic fonts-wqy-microhei \
        libfribidi0 libstdc++6 python3 \
    && rm -rf /var/lib/apt/lists/*


# The dependencies, with those of the engine, of cut-outs and of tracing, as a file of their own: as long as they stay the
# same, so do the large layers below, whatever else changes in pyproject.toml.
FROM base AS requirements
WORKDIR /build
COPY pyproject.toml ./
RUN python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = project['optional-dependencies']; \
    print(*project['dependencies'], *extras['engine'], *extras['cutout'], *extras['tracing'], sep='\n')" > requirements.txt


FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/python
WORKDIR /build
COPY constraints.txt ./


FROM build AS packages-cuda
COPY --from=requirements /build/requirements.txt ./
RUN /opt/python/bin/pip install --constraint constraints.txt --requirement requirements.txt


# torch's own index has the wheels without CUDA; where it cannot be reached, or with "", this target takes the same as
# the other: it works, gigabytes larger. torch goes first and alone, so that nothing that needs it can bring another
# build of it.
FROM build AS packages-cpu
ARG TORCH_INDEX_URL="https://download.pytorch.org/whl/cpu"
RUN /opt/python/bin/pip install --constraint constraints.txt \
        ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch
COPY --from=requirements /build/requirements.txt ./
RUN /opt/python/bin/pip install --constraint constraints.txt --requirement requirements.txt


# The code, apart from its dependencies: a changed line of it changes one layer of a megabyte.
FROM build AS code
COPY pyproject.toml README.md LICENSE ./
COPY config ./config
COPY clients ./clients
COPY watermark ./watermark
COPY inference ./inference
COPY worker ./worker
RUN /opt/python/bin/pip install --no-deps --target /opt/darkroom .


FROM base AS runtime
ARG VERSION=0.2.0.dev0
ARG REVISION=""
LABEL org.opencontainers.image.title="Darkroom" \
      org.opencontainers.image.description="Headless image generation worker" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The uid is a number that deployments can name; both volumes take their owner from the folders here.
RUN groupadd --gid 10001 darkroom \
    && useradd --uid 10001 --gid darkroom --create-home --shell /usr/sbin/nologin darkroom \
    && install --directory --owner=darkroom --group=darkroom /models /cache
ENV PATH=/opt/darkroom/bin:/opt/python/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/opt/darkroom \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/models \
    CACHE_DIR=/cache \
    METRICS_PORT=9464
VOLUME ["/models", "/cache"]
EXPOSE 9464
WORKDIR /home/darkroom
# No tini. As PID 1 the worker gets the signals itself: it handles SIGTERM and SIGINT, and waits for the engine, its one
# child, however that ends; the engine starts no processes that could be left to PID 1. (A test runs it as the first
# process of a container.) What is lost is the first second of a start: until its handlers stand, PID 1 hears no
# SIGTERM. `docker run --init` closes that as well.
USER 10001:10001
STOPSIGNAL SIGTERM
# Whether the process answers at all. Whether it takes jobs is /health/ready, and no reason to be restarted.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['METRICS_PORT'] + '/health/live', timeout=5)"]
ENTRYPOINT ["darkroom"]
CMD ["run"]


FROM runtime AS cpu
ENV DEVICE=cpu
COPY --from=packages-cpu /opt/python /opt/python
COPY --from=code /opt/darkroom /opt/darkroom


# For `deploy/compose.yaml --profile demo`: 16 MB of model, the demo's jobs, and the small backend that shows them.
FROM cpu AS demo
ENV MODEL_ID=/opt/darkroom/examples/demo_model/checkpoint \
    HF_HUB_OFFLINE=1
COPY examples /opt/darkroom/examples


# CUDA's libraries are wheels, so the driver is all that the host must give: `compute` for CUDA, `utility` for NVML. Triton
# builds what launches the adapters' kernel with gcc and Python's headers, at the first start with a new /cache, and
# COMPILE=blocks what it compiles.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=packages-cuda /opt/python /opt/python
COPY --from=code /opt/darkroom /opt/darkroom
