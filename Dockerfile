# rlsync with its CUDA stack, from requirements/cuda.lock. The wheels bring CUDA; the host brings the driver.
#
#     docker build -t rlsync .
#     docker run --gpus all --ipc=host -it -v "$PWD/results:/rlsync/results" rlsync rlsync doctor
#
# --ipc=host: actor and engines share memory. In two containers, both need it, and --pid=host as well.
FROM python:3.12-slim-bookworm

# Triton and torch.compile build small C programs when engines start.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git procps util-linux \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /rlsync
COPY requirements/cuda.lock requirements/cuda.lock
RUN pip install --no-cache-dir --no-deps -r requirements/cuda.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .

# The environment is this image's own python, which scripts/bootstrap.sh takes because it is named; FlashInfer's sampler is compiled
# by a compiler of CUDA, which is not here.
ENV PYTHON=/usr/local/bin/python \
    RLSYNC_LOCK=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VLLM_USE_FLASHINFER_SAMPLER=0
CMD ["bash"]
