# An image that trains on NVIDIA GPUs: CUDA's compiler for the kernels, torch for the same CUDA, neox built in place.
#
#   docker build -t neox .
#   docker run --gpus all --ipc host --ulimit memlock=-1 -v "$PWD/data:/data" -v "$PWD/runs:/runs" neox \
#       deepspeed train.py --conf configs/pythia/160M.yml --set data.train=[/data/corpus] run.dir=/runs/first
#
# Build arguments: BASE, an image with a CUDA compiler of the version that TORCH was built with; TORCH, what pip is to install; ARCHS, the GPUs.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${BASE}

ARG TORCH=torch==2.13.0
ARG ARCHS="8.0;9.0a;10.0+PTX"
ARG JOBS=8

ENV DEBIAN_FRONTEND=noninteractive \
    LANG=C.UTF-8 \
    VIRTUAL_ENV=/opt/neox \
    PATH=/opt/neox/bin:$PATH \
    TORCH_CUDA_ARCH_LIST=${ARCHS} \
    DS_BUILD_OPS=0

RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential cmake git ninja-build openssh-client pdsh python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /neox
RUN python3 -m venv "$VIRTUAL_ENV"

# torch in a layer of its own: it is the largest part and changes least.
COPY constraints.txt Makefile ./
RUN pip install --no-cache-dir -c constraints.txt pip setuptools wheel pybind11 ninja packaging \
 && pip install --no-cache-dir -c constraints.txt "${TORCH}"

COPY . .
RUN MAX_JOBS=${JOBS} pip install --no-cache-dir -c constraints.txt --no-build-isolation -e ".[eval,wandb]" \
 && neox doctor

CMD ["neox", "--help"]
