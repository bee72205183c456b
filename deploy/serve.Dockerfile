# A server of one model, without torch and Ray: docker build -f deploy/serve.Dockerfile -t dlopt-serve:0.1.0 .
#   docker run -p 8000:8000 -v $PWD/runs:/runs:ro dlopt-serve:0.1.0 mnist --keys /runs/keys.txt
# The run is a folder below /runs, a job's name, or s3://BUCKET/runs/RUN. What is installed is deploy/serve-requirements.txt and nothing else.
FROM python:3.12-slim-bookworm AS build
COPY deploy/serve-requirements.txt /src/
RUN python -m venv /opt/dlopt \
    && /opt/dlopt/bin/pip install --no-cache-dir --no-compile -r /src/serve-requirements.txt
COPY pyproject.toml README.md /src/
COPY dlopt /src/dlopt
RUN /opt/dlopt/bin/pip install --no-cache-dir --no-compile --no-deps /src

FROM python:3.12-slim-bookworm
RUN useradd --uid 1000 --create-home dlopt
COPY --from=build /opt/dlopt /opt/dlopt
ENV PATH=/opt/dlopt/bin:$PATH DLOPT_HOME=/runs PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/dlopt
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["dlopt", "serve", "--host", "0.0.0.0"]
