# The image that k8s/ and cluster/*.yaml name:  docker build -t hone:0.1.0 .
#
# python:3.11-slim and not rayproject/ray:2.60.0-py311: that one brings a conda environment with pins of its own, and constraints.txt
# should be the only place where versions are chosen. KubeRay and the launcher ask of an image only what is installed here.
FROM python:3.11-slim

# wget: KubeRay's readiness probe of a Serve worker runs it.
# rsync, openssh-client: the launcher's head copies files to new nodes and starts them from inside its container.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/*

# The uid that the manifests run as.
RUN useradd --uid 1000 --create-home --shell /bin/bash hone

WORKDIR /opt/hone

# Into the system Python and not a virtual environment: KubeRay and the launcher may start login shells, which reset PATH.
# torch alone first: by far the largest layer, and it changes least often. This build runs on CPUs as well as on NVIDIA GPUs.
RUN pip install --no-cache-dir torch==2.13.0

COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY hone hone
COPY models models
COPY training training
COPY serving serving
COPY cluster cluster
RUN pip install --no-cache-dir -c constraints.txt '.[postgres]'

# The launcher reads HOME from the image to place the files it mounts.
ENV HOME=/home/hone PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /home/hone
