# All of dlopt, for the nodes of a cluster: docker build -f deploy/train.Dockerfile -t dlopt-train:0.1.0 .
# With --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu it has no CUDA, which is several GB less.
FROM python:3.12-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
RUN useradd --uid 1000 --create-home dlopt \
    && mkdir -p /runs /opt/dlopt/jobs \
    && chown dlopt /runs
COPY pyproject.toml README.md /src/
COPY dlopt /src/dlopt
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" '/src[samples,text,remote]'
COPY jobs /opt/dlopt/jobs
ENV PATH=/opt/venv/bin:$PATH DLOPT_HOME=/runs RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/dlopt
CMD ["dlopt", "--help"]
