# syntax=docker/dockerfile:1
# One image for CPU and CUDA: torch from PyPI carries CUDA on Linux x86-64, and uses it where a GPU is given.
#   docker build -t onebase .
#   docker build -t onebase:cpu --build-arg TORCH_INDEX_URL=…an index of CPU wheels of torch… .   (gigabytes smaller)
#   docker build -t onebase:tune --build-arg EXTRAS=tune .
# How to run it: deploy/README.md.
ARG PYTHON_VERSION=3.11

# The compiler, for the CPU kernels and for dependencies without a wheel for this platform; the last stage has none. No
# version is named here and below, for Debian's mirrors keep only the newest.
FROM python:${PYTHON_VERSION}-slim-bookworm AS compiler
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# What the server depends on. It changes with pyproject.toml and constraints.txt only, so that a change of code neither
# installs it again nor pushes its layer again.
FROM compiler AS dependencies
RUN python -m venv /opt/onebase
ENV PATH=/opt/onebase/bin:$PATH
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# An index with CPU wheels only is asked for torch alone: everything else comes from the usual one.
ARG TORCH_INDEX_URL=""
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "$TORCH_INDEX_URL" ]; then \
        pip install --no-deps --constraint constraints.txt --index-url "$TORCH_INDEX_URL" torch; \
    fi
# Extras of pyproject.toml that name packages: `tune`.
ARG EXTRAS=""
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import sys, tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [project['optional-dependencies'][name] for name in sys.argv[1:]]; \
print(*project['dependencies'], *sum(extras, []), sep='\n')" $EXTRAS > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

# Onebase itself, as a wheel with its CPU kernels.
FROM compiler AS wheel
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY kernels kernels
COPY adapters_store adapters_store
COPY server server
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /dist .

FROM python:${PYTHON_VERSION}-slim-bookworm
LABEL org.opencontainers.image.title="Onebase" \
      org.opencontainers.image.description="One NF4 base model, thousands of adapters: a multi-adapter inference server." \
      org.opencontainers.image.licenses="Apache-2.0"
# For the CPU library of bitsandbytes, which is linked against libgomp.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
# The id is fixed so that volumes can be given to it: chown 10001:10001.
RUN groupadd --gid 10001 onebase \
    && useradd --uid 10001 --gid onebase --create-home --shell /usr/sbin/nologin onebase \
    && install --directory --owner=onebase --group=onebase /models /adapters /cache
COPY --from=dependencies /opt/onebase /opt/onebase
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /opt/onebase/bin/pip install --no-cache-dir --no-index --no-deps /dist/*.whl

# Beyond this container the server listens only with ONEBASE_API_KEY and ONEBASE_ADMIN_KEY set: without, it refuses to start.
ENV PATH=/opt/onebase/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ONEBASE_HOST=0.0.0.0 \
    ONEBASE_PORT=8000 \
    ONEBASE_STORE=/adapters \
    ONEBASE_CACHE_DIR=/cache
USER 10001:10001
WORKDIR /home/onebase
VOLUME ["/models", "/adapters", "/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive, not ready: a server that loads or restarts its engine must not be killed for it. The start period is for a base
# that is downloaded first.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['ONEBASE_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["onebase"]
CMD ["serve"]
